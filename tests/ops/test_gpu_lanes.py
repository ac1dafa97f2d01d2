"""The Hopper kernels, lane by lane on a CPU: every case of the law, every gradient, without a GPU.

`warp_on_cpu.h` plays the lanes, the matrix fragments, the swizzled tiles, the barriers and the copies; shared memory and
all outputs start as NaN. It does not play time: races are for compute-sanitizer on a GPU.
"""

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from palimpsest.ops import gates, reference
from palimpsest.ops.gpu.hopper import delta_memory, precompile
from palimpsest.testing import CASES, Case, assert_within_budget, judge

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to play the lanes")
C, K = 64, 128
STRUCTURES = {
    "intra_chunk": "IntraChunkArguments",
    "inter_chunk_forward": "InterChunkArguments",
    "inter_chunk_both": "Both",
    "forward": "Arguments",
    "gradient": "Arguments",
}
INTRA = (
    "q k erase g A_log dt_bias tiles M norms cu_seqlens chunk_offsets",
    "T N H HV",
    "scale floor",
    "gate wide_g wide_e",
)
INTER = "tiles rows state out state_out memories cu_seqlens chunk_offsets", "T N HV V", "", ""
ORDER = "ready", "ready_tiles producers", "", ""
GRADIENT = (
    "q k erase g A_log dt_bias write norms M R d_out d_write memories d_memories dq dk dv dg d_erase dA_log d_bias "
    "cu_seqlens chunk_offsets", "T N H HV", "scale floor", "gate wide_g wide_e",
)  # fmt: skip


@pytest.fixture(autouse=True)
def the_same_numbers_each_time():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def lanes(tmp_path_factory):
    """Compile one kernel file as C++ and return a function that runs one of its kernels on tensors."""
    folder, libraries = tmp_path_factory.mktemp("lanes"), {}

    def run(file, kernel, fields, grid, *values, erase=0):
        """`fields` and `values` of each structure that the argument is made of, one after the other."""
        key, structure = (file, kernel, erase), STRUCTURES[kernel[:-2] if file == "inter_chunk" else file]
        if key not in libraries:
            source, library = folder / f"{kernel}{erase}.cpp", folder / f"{kernel}{erase}.so"
            source.write_text(
                f'#include "{HERE}/warp_on_cpu.h"\n#include "{precompile.ROOM}/{file}.cu"\n'
                f'static {structure} a;\nextern "C" void run({structure}* x, int bx, int by)'
                f" {{ a = *x; cpu_run(bx, by, {delta_memory.THREADS[file]}, [] {{ {kernel}(a); }}); }}"
            )
            command = ["g++", "-O1", "-w", "-fPIC", "-shared", f"-DERASE={erase}", str(source), "-o", str(library)]
            subprocess.run(command, check=True)
            libraries[key] = ctypes.CDLL(str(library))
        parts = []
        for names, given in zip(fields, values):
            parts.append(structure_of(names)())
            for name, _ in parts[-1]._fields_:
                value = given.get(name, 0)
                setattr(parts[-1], name, value.data_ptr() if isinstance(value, torch.Tensor) else value)
        libraries[key].run(ctypes.create_string_buffer(b"".join(map(bytes, parts))), *grid)

    return run


def structure_of(fields):
    kinds = zip(fields, (ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int))
    return type(
        "Structure", (ctypes.Structure,), {"_fields_": [(x, kind) for names, kind in kinds for x in names.split()]}
    )


class Kernels:
    """Forward and backward as ops/gpu/hopper/delta_memory.py launches them."""

    def __init__(
        self,
        run,
        q,
        k,
        v,
        g,
        erase,
        state,
        *,
        scale=1.0,
        cu_seqlens=None,
        gate=0,
        A_log=None,
        dt_bias=None,
        floor=-5.0,
        erase_before_decay=False,
    ):
        self.run, self.kind = run, 0 if erase.ndim == 3 else 2 if erase_before_decay else 1
        B, T, H, _ = q.shape
        HV, V = v.shape[2:]
        N, chunks, offsets = B, B * -(-T // C), None
        if cu_seqlens is not None:
            N, chunks = len(cu_seqlens) - 1, T // C + len(cu_seqlens) - 1
            offsets = torch.cat((torch.zeros(1), ((cu_seqlens.diff() + C - 1) // C).cumsum(0))).int()
        self.tiles = chunks * HV
        wide = torch.float32
        nan = lambda *shape, dtype=torch.bfloat16: torch.full(shape, torch.nan, dtype=dtype)
        x = self.x = dict(
            q=q, k=k, erase=erase, g=g, A_log=A_log, dt_bias=dt_bias, write=v, rows=v, state=state, cu_seqlens=cu_seqlens,
            strength=erase if erase.ndim == 3 else 0, chunk_offsets=offsets, T=T, N=N, H=H, HV=HV, V=V, scale=scale,
            floor=floor, gate=gate, wide_g=g.dtype == wide, wide_e=erase.dtype == wide, wide_strength=erase.dtype == wide,
            tiles=nan(self.tiles, delta_memory.TILE[K] // 4, dtype=wide), M=nan(self.tiles, C, C),
            norms=nan(self.tiles, 2, C, dtype=wide),
            memories=nan(self.tiles, V, K), d_memories=nan(self.tiles, V, K), out=nan(*v.shape),
            state_out=nan(*state.shape, dtype=wide),
        )  # fmt: skip
        self.x = {name: 0 if value is None else value for name, value in x.items()}
        self.gated = "_gated" if gate else ""

    def forward(self):
        """As two launches and as one; the bits are the same, however the work is shared out."""
        x, parts = self.x, self.x["V"] // 64
        tasks, results = x["N"] * x["HV"], []
        intra, ready = {**x, "M": 0, "norms": 0}, torch.zeros(self.tiles + 2, dtype=torch.int32)
        for groups in range(parts + 1):
            inter = {
                **x,
                "out": torch.full_like(x["out"], torch.nan),
                "state_out": torch.full_like(x["state_out"], torch.nan),
            }
            if groups:
                self.run("intra_chunk", f"intra_chunk{self.gated}", (INTRA,), (self.tiles, 1), intra, erase=self.kind)
                self.run("inter_chunk", f"inter_chunk_forward_{groups}", (INTER,), (tasks, parts // groups), inter)
            else:
                fields, order = (INTRA, INTER, ORDER), dict(ready=ready, ready_tiles=self.tiles, producers=2)
                grid = (2 + tasks * parts, 1)
                self.run("forward", f"forward{self.gated}", fields, grid, intra, inter, order, erase=self.kind)
            results.append((inter["out"], inter["state_out"]))
            torch.testing.assert_close(results[-1], results[0], rtol=0, atol=0, equal_nan=True)
        return results[0]

    def backward(self, d_out, d_state):
        x = self.x
        dv = torch.full_like(x["write"], torch.nan)  # holds R until each tile of it is read
        nan = lambda like: torch.full_like(like, torch.nan)
        d_write, d_first = nan(x["write"]), nan(x["state_out"])
        reverse = {
            **x,
            "rows": d_out,
            "state": d_state,
            "out": d_write,
            "state_out": d_first,
            "memories": x["d_memories"],
        }
        self.run("intra_chunk", f"intra_chunk{self.gated}", (INTRA,), (self.tiles, 1), x, erase=self.kind)
        for groups in (1, 2)[: x["V"] // 64]:
            grid = (x["N"] * x["HV"], 2 * (x["V"] // 64) // groups)
            self.run("inter_chunk", f"inter_chunk_both_{groups}", (INTER, INTER), grid, {**x, "out": dv}, reverse)
        heads = (*x["write"].shape[:3], K)
        gradients = dict(
            d_out=d_out, d_write=d_write, dq=torch.full(heads, torch.nan, dtype=torch.bfloat16),
            dk=torch.full(heads, torch.nan, dtype=torch.bfloat16), dv=dv, R=dv, dg=nan(x["g"]), d_erase=nan(x["erase"]),
            dA_log=torch.zeros(self.tiles // x["HV"], x["HV"]), d_bias=torch.zeros(self.tiles // x["HV"], x["HV"], 4, K),
        )  # fmt: skip
        name = f"gradient_{x['V']}{self.gated}"
        self.run("gradient", name, (GRADIENT,), (self.tiles, 1), {**x, **gradients}, erase=self.kind)
        dq, dk = (gradients[name].float().unflatten(2, (x["H"], -1)).sum(3) for name in ("dq", "dk"))
        dv = d_write if self.kind else gradients["dv"]
        parameters = (gradients["dA_log"].sum(0), gradients["d_bias"].sum((0, 2)))
        return dq, dk, dv, gradients["dg"], gradients["d_erase"], d_first, *parameters


SUBSET = [case for x, case in enumerate(CASES) if x % 17 == 0]  # every key, strength and decay


def test_the_law_in_half_precision(lanes):
    cases = [Case(x.keys, x.beta, x.decay, 130, 1, 1, K, 64) for x in SUBSET]
    report = judge(lambda *x: Kernels(lanes, *x).forward(), dtype=torch.bfloat16, cases=cases)
    assert report.passed, str(report)


def drawn(T, H=1, HV=1, V=64, decay="half_slow", beta="sigmoid", keys="correlated"):
    q, k, *_ = Case(keys, beta, decay, T, 1, H, K, V).kda(torch.bfloat16)
    _, _, v, g, strength, state = Case(keys, beta, decay, T, 1, HV, K, V, 1).kda(torch.bfloat16)
    return q, k, v, g, strength, state


def truth_of(law, inputs, d_out, d_state, dtype=torch.float64):
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    output, state = law(*leaves)
    loss = (output * d_out.to(dtype)).sum() + (state * d_state.to(dtype)).sum()
    return [x.detach() for x in (output, state, *torch.autograd.grad(loss, leaves))]


def close(name, actual, truth, relative=1e-2):
    error = (actual.double() - truth).norm() / truth.norm().clamp_min(1e-30)
    assert error < relative, f"{name}: relative error {error:.1e}"


def kda_law(q, k, v, g, beta, state):
    q, k = (x.repeat_interleave(v.shape[2] // k.shape[2], 2) for x in (q, k))
    return reference.delta_memory(q, k, beta[..., None] * k, beta[..., None] * v, g, state)


NAMES = "output state d_q d_k d_v d_log_decay d_erase d_state".split()


@pytest.mark.parametrize(
    ("T", "HV", "V", "decay"),
    [
        (1, 8, 64, "slow"),
        (100, 2, 64, "half_slow"),
        (130, 1, 128, "fast"),
        (70, 1, 64, "floor"),
        (400, 1, 64, "half_slow"),
    ],
)
def test_every_gradient(lanes, T, HV, V, decay):
    inputs = drawn(T, HV=HV, V=V, decay=decay)
    kernels = Kernels(lanes, *inputs)
    d_out, d_state = torch.randn_like(inputs[2]), torch.randn_like(inputs[5])
    truth = truth_of(kda_law, inputs, d_out, d_state)
    for name, a, t in zip(NAMES, (*kernels.forward(), *kernels.backward(d_out, d_state)), truth):
        close(name, a, t)


def test_gradients_of_vectors_that_erase(lanes):
    q, k, v, g, _, state = drawn(90)
    inputs = q, k, v, g, torch.nn.functional.normalize(torch.randn(q.shape), dim=-1).bfloat16(), state
    kernels = Kernels(lanes, *inputs)
    d_out, d_state = torch.randn_like(v), torch.randn_like(state)
    law = lambda q, k, v, g, erase, state: reference.delta_memory(q, k, erase, v, g, state)
    for name, a, t in zip(
        NAMES, (*kernels.forward(), *kernels.backward(d_out, d_state)), truth_of(law, inputs, d_out, d_state)
    ):
        close(name, a, t)


def test_gradients_where_erase_reads_before_the_decay(lanes):
    """The core that DPLR asks for."""
    q, k, v, g, _, state = drawn(100)
    erase = torch.nn.functional.normalize(torch.randn_like(k.float()), dim=-1).bfloat16()
    inputs = q, k, v, g, erase, state
    kernels = Kernels(lanes, *inputs, erase_before_decay=True)
    d_out, d_state = torch.randn_like(v), torch.randn_like(state)

    def law(q, k, v, g, erase, state):
        outputs = []
        for t in range(q.shape[1]):
            read = torch.einsum("bhkv,bhk->bhv", state, erase[:, t])
            state = g[:, t].exp()[..., None] * state + k[:, t][..., None] * (v[:, t] - read)[..., None, :]
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        return torch.stack(outputs, 1), state

    truth = truth_of(law, inputs, d_out, d_state)
    for name, a, t in zip(NAMES, (*kernels.forward(), *kernels.backward(d_out, d_state)), truth):
        close(name, a, t)


@pytest.mark.parametrize("gate", [1, 2])
def test_gradients_through_gates_and_norms(lanes, gate):
    rng = torch.Generator().manual_seed(gate)
    draw = lambda *shape: torch.randn(*shape, generator=rng)
    q, k, v, x, beta = (draw(1, 80, 2, n).bfloat16() for n in (K, K, 64, K, 1))
    state, A_log, dt_bias, beta = draw(1, 2, K, 64), draw(2), draw(2, K) - 2, beta[..., 0]
    inputs = q, k, v, x, beta, state
    kernels = Kernels(lanes, *inputs, gate=gate, A_log=A_log, dt_bias=dt_bias)

    def law(q, k, v, x, beta, state, A_log, dt_bias):
        g = gates.softplus_decay(x, A_log, dt_bias) if gate == 1 else gates.sigmoid_decay(x, A_log, dt_bias, -5.0)
        return kda_law(gates.l2norm(q), gates.l2norm(k), v, g, beta.sigmoid(), state)

    d_out, d_state = torch.randn_like(v), torch.randn_like(state)
    truth = truth_of(law, (*inputs, A_log, dt_bias), d_out, d_state)
    ours = (*kernels.forward(), *kernels.backward(d_out, d_state))
    for name, a, t in zip((*NAMES, "d_A_log", "d_dt_bias"), ours, truth):
        close(name, a, t, 5e-2 if name == "d_A_log" else 1e-2)  # two numbers, each a sum of 10,000 of either sign


def test_no_state_is_a_state_of_zeros(lanes):
    *inputs, state = drawn(70)
    d_out, zeros = torch.randn_like(inputs[2]), torch.zeros_like(state)
    given, none = Kernels(lanes, *inputs, zeros), Kernels(lanes, *inputs, zeros)
    none.x["state"] = 0
    ours = (*none.forward(), *none.backward(d_out, 0)[:5])
    for x, y in zip(ours, (*given.forward(), *given.backward(d_out, zeros)[:5])):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_packed_is_one_by_one(lanes):
    inputs = drawn(150, HV=2)
    borders = torch.tensor([0, 0, 5, 70, 70, 150], dtype=torch.int32)
    state = torch.randn(5, 2, K, 64)
    output, last = Kernels(lanes, *inputs[:5], state, cu_seqlens=borders).forward()
    for n, (start, stop) in enumerate(zip(borders.tolist(), borders.tolist()[1:])):
        if start == stop:
            torch.testing.assert_close(last[n], state[n], rtol=0, atol=0)
            continue
        alone = Kernels(lanes, *(x[:, start:stop].contiguous() for x in inputs[:5]), state[n : n + 1])
        for ours, theirs in zip((output[:, start:stop], last[n : n + 1]), alone.forward()):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


ORDER_PROGRAM = """
static Layout layout;
static int step, room, beyond, *found, *places;
extern "C" int run(const int* cu_seqlens, const int* chunk_offsets, int T, int N, int HV, int by, int tiles, int* out, int* at) {
    layout = {cu_seqlens, chunk_offsets, T, N, HV}, step = by, room = tiles, beyond = 0, found = out, places = at;
    cpu_run(by, 1, 32, [] {
        int place = blockIdx.x;
        ChunkOrder order(layout, threadIdx.x);
        Chunk x = order.skip(place);
        for (; x.count > 0 && place < room; x = order.skip(step), place += step)
            if (threadIdx.x == 0) found[place] = x.tile, places[place] = order.chunk;
        beyond += x.count > 0;
    });
    return beyond;
}
"""


@pytest.mark.parametrize("packed", [False, True])
def test_every_chunk_is_prepared_once_and_in_time(tmp_path, packed):
    source, library = tmp_path / "order.cpp", tmp_path / "order.so"
    source.write_text(f'#include "{HERE}/warp_on_cpu.h"\n#include "{precompile.ROOM}/forward.cu"\n{ORDER_PROGRAM}')
    subprocess.run(["g++", "-O1", "-w", "-fPIC", "-shared", str(source), "-o", str(library)], check=True)
    HV, by, lengths = 3, 7, [0, 500, 1, 64, 0, 65, 700, 10] * 3 if packed else [300] * 13
    chunks = [-(-x // C) for x in lengths]
    tiles, N = sum(chunks) * HV, len(lengths)
    borders, offsets = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths, chunks))
    found, level = (torch.full((tiles,), -1, dtype=torch.int32) for _ in range(2))
    where = (borders.data_ptr(), offsets.data_ptr()) if packed else (None, None)
    T = sum(lengths) if packed else lengths[0]
    results = map(ctypes.c_void_p, (found.data_ptr(), level.data_ptr()))
    beyond = ctypes.CDLL(str(library)).run(*map(ctypes.c_void_p, where), T, N, HV, by, tiles, *results)
    assert beyond == 0, "there are chunks after the last"
    assert sorted(found.tolist()) == list(range(tiles))
    assert level.tolist() == sorted(level.tolist()), "a later chunk comes before an earlier one"


def test_a_later_token_never_changes_an_earlier_output(lanes):
    inputs = drawn(128)
    before, _ = Kernels(lanes, *inputs).forward()
    changed = [x.clone() for x in inputs]
    for x in changed[:5]:
        x[:, 77:] = -x[:, 77:].abs() * 3
    after, _ = Kernels(lanes, *changed).forward()
    torch.testing.assert_close(before[:, :77], after[:, :77], rtol=0, atol=0)


def test_decay_gradient_where_almost_nothing_is_kept(lanes):
    inputs = drawn(96, decay="floor")
    kernels = Kernels(lanes, *inputs)
    d_out, d_state = torch.randn_like(inputs[2]), torch.zeros_like(inputs[5])
    truth = truth_of(kda_law, inputs, d_out, d_state)[5]
    close("d_log_decay", kernels.backward(d_out, d_state)[3], truth)


def test_a_wrong_kernel_fails(lanes):
    q, k, v, g, beta, state = drawn(130)
    wrong, _ = Kernels(lanes, q, k, v, g, beta / 2, state).forward()
    truth, _ = kda_law(*(x.double() for x in (q, k, v, g, beta, state)))
    peer, _ = Kernels(lanes, q, k, v, g, beta, state).forward()
    with pytest.raises(AssertionError, match="exceeds budget"):
        assert_within_budget("output", wrong, truth, peer)


def test_the_shipped_code_is_that_of_these_sources():
    import zipfile

    with zipfile.ZipFile(precompile.ARCHIVE) as archive:
        assert archive.read("digest").decode() == precompile.digest(), (
            "run python -m palimpsest.ops.gpu.hopper.precompile"
        )
        assert set(archive.namelist()) == {"digest", "compiler", *precompile.variants()}


@pytest.mark.skipif(precompile.compiler() is None, reason="there is no nvcc to compile the kernels anew")
def test_the_machine_code_is_made_of_these_sources(monkeypatch):
    """One of each file: all of them are compared by `precompile --check`."""
    some = ["intra_chunk_0_bf16_64", "inter_chunk_fp16_64", "gradient_1_bf16_64"]
    if precompile.compiler() != precompile.shipped("compiler").decode():
        assert all(precompile.compile_all(some).values())  # other bytes, but they compile
        return
    assert precompile.differences(some) == []
    monkeypatch.setattr(precompile, "shipped", lambda name: b"other machine code")
    assert precompile.differences(some[:1]) == some[:1]


@pytest.mark.parametrize("K", [64, 128])
def test_kernels_get_the_shared_memory_that_they_lay_out(tmp_path, K):
    shared = delta_memory._SHARED
    sizes = [
        ("intra_chunk", "IntraChunkShared", shared["intra_chunk"][K]),
        ("intra_chunk", "Tile", delta_memory.TILE[K]),
    ]
    for groups in (1, 2):
        sizes.append(("inter_chunk", f"InterChunkShared<{groups}>", shared["inter_chunk"][groups, K]))
    sizes.append(
        (
            "forward",
            "char[max(CHUNKS_AT_ONCE * sizeof(IntraChunkShared), sizeof(InterChunkShared<1>))]",
            shared["forward"][K],
        )
    )
    sizes += [("gradient", f"Smem<{K}>", shared["gradient"][K])]
    for x, (file, name, size) in enumerate(sizes):
        source = tmp_path / f"{x}.cpp"
        source.write_text(
            f'#include "{HERE}/warp_on_cpu.h"\n#include "{precompile.ROOM}/{file}.cu"\n'
            f"static_assert(sizeof({name}) == {size}); static_assert({size} <= 232448);"
        )
        subprocess.run(["g++", "-w", "-fsyntax-only", f"-DKEY_DIM={K}", str(source)], check=True)


@pytest.mark.parametrize(
    ("fields", "packed"),
    [
        ((INTRA,), "_INTRA_CHUNK"),
        ((INTER,), "_INTER_CHUNK"),
        ((INTRA, INTER, ORDER), "_FORWARD"),
        ((GRADIENT,), "_GRADIENT"),
    ],
)
def test_arguments_are_packed_as_the_kernels_read_them(fields, packed):
    values, parts = [], []
    for part in map(structure_of, fields):
        ours = [float(x) if kind is ctypes.c_float else x + 1 for x, (_, kind) in enumerate(part._fields_)]
        values += ours
        parts.append(bytes(part(*ours)))
    bytes_ = struct.pack(getattr(delta_memory, packed), *values)
    assert b"".join(parts)[: len(bytes_)] == bytes_
    assert len(bytes_) <= sum(map(len, parts)) <= 512  # the room that a launch has for them


def test_a_launch_hands_over_its_arguments(tmp_path, monkeypatch):
    """Against a driver that only remembers what it was given."""
    from palimpsest.ops.gpu.hopper import launch

    source = tmp_path / "driver.cpp"
    source.write_text("""
        #include <cstring>
        extern "C" {
        unsigned long long seen[16]; char bytes[24];
        int cuModuleLoadData(void** m, const void*) { *m = (void*)0x1234567812345678; return 0; }
        int cuModuleGetFunction(void** f, void* m, const char*) { *f = (char*)m + 1; return 0; }
        int cuFuncSetAttribute(void*, int, int) { return 0; }
        int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                           unsigned shared, void* stream, void** parameters, void** extra) {
            unsigned long long all[] = {(unsigned long long)f, gx, gy, gz, bx, by, bz, shared,
                                        (unsigned long long)stream, (unsigned long long)extra};
            memcpy(seen, all, sizeof all); memcpy(bytes, parameters[0], 24); return 0;
        }
        }""")
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "driver.so")], check=True)
    driver = ctypes.CDLL(str(tmp_path / "driver.so"))
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    monkeypatch.setattr(launch.torch, "zeros", lambda *size, device: None)
    monkeypatch.setattr(launch.torch._C, "_cuda_getCurrentRawStream", lambda device: 0x7FFF00000010, raising=False)
    launch._module.cache_clear()
    address = 0x7F1234567890
    launch.Kernel("inter_chunk_bf16_128", "any", "P2if", 160, 215040, 0).launch((9, 2), address, 3, True, 0.5)
    launch._module.cache_clear()
    seen = list((ctypes.c_ulonglong * 16).in_dll(driver, "seen"))
    assert seen[:10] == [0x1234567812345679, 9, 2, 1, 160, 1, 1, 215040, 0x7FFF00000010, 0]
    assert struct.unpack_from("P2if", (ctypes.c_char * 24).in_dll(driver, "bytes").raw) == (address, 3, 1, 0.5)
