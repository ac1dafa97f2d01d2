"""Every public function and every kernel's operator, called right and wrong: the law's number, or a sentence.

The wrong calls are those of `benchmarks.faults.bad_calls`, where `python -m benchmarks.faults --only "bad calls"` makes all
of them. Here a few hundred are drawn. `python -m pytest tests/ops/test_calls.py --hypothesis-profile=long` draws 20,000.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, note, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from benchmarks.faults.bad_calls import DOORS, FUNCTIONS, Draw, bad_operator_calls, outcome, spoiled
from palimpsest import backends, gates, kda, kda_from_logits, kda_step_
from palimpsest.ops import arguments
from palimpsest.ops.arguments import TABLES
from palimpsest.ops.cpu import jit, register
from palimpsest.ops.gpu import register as gpu

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@st.composite
def draws(draw):
    """Right sizes, from none to a chunk and a bit more."""
    H, channels = draw(st.integers(1, 3)), st.sampled_from([1, 2, 3, 8, 17])
    borders = draw(st.none() | st.lists(st.integers(0, 40), max_size=4).map(sorted))
    T = draw(st.sampled_from([0, 1, 2, 15, 16, 17, 40]))
    sizes = {"H": H, "G": H * draw(st.integers(1, 3)), "K": draw(channels), "V": draw(channels)}
    if borders is None:
        sizes |= {"B": draw(st.integers(0, 3)), "T": T}
    else:
        sizes |= {"B": 1, "T": max([T, *borders]), "borders": (0, *borders, max([T, *borders]))}
    kinds = {"dtype": draw(st.sampled_from(DTYPES)), "gate_dtype": draw(st.sampled_from(DTYPES))}
    return Draw(**sizes, **kinds, with_state=draw(st.booleans()), seed=draw(st.integers(0, 3)))


@settings(max_examples=max(300, settings().max_examples))  # more by hand: the profile "long"
@given(st.sampled_from(list(FUNCTIONS)), draws(), st.sampled_from(["auto", *backends.names()]), st.data())
@example("kda_from_logits", Draw(B=0), "auto", None)
@example("trace", Draw(T=0), "auto", None)
def test_a_call_gives_the_laws_number_or_a_sentence(name, draw, backend, data):
    function = FUNCTIONS[name]
    call = function.draw(draw)
    if function.has_backends:
        call["backend"] = backend
    wrong = list(spoiled(call))
    for at in data.draw(st.lists(st.integers(0, len(wrong) - 1), max_size=2)) if data else ():
        what, changed, value = wrong[at]
        call[changed] = value
        note(what)
    assert outcome(name, call) is None


def test_an_operator_refuses_what_its_kernel_cannot_read():
    wrong = [
        f"{trial.name}: {found}"
        for trial in itertools.islice(bad_operator_calls(), 0, None, 9)
        if (found := trial.run())
    ]
    assert wrong == []


# ---- mutants: with a row taken out of the table, what it refuses is let through ----


ROWS = [(op, i) for op, table in TABLES.items() for i in range(len(table.rows))]


def right(op):
    sizes = {"B": 1, "T": 3, "H": 2, "K": 5, "HV": 4, "V": 7, "N": 1, "P": 1, "HV*K": 20}
    shapes = ([sizes[x] for x in row.shape.removeprefix("numbers ").split()] for row in TABLES[op].rows)
    return [torch.zeros(shape) for shape in shapes]


def wrongs(op, i, x):
    """What a row refuses, by the part of the row that refuses it."""
    yield "shape", torch.zeros([x.shape[0] + 1, *x.shape[1:]] if i == 2 else [*x.shape[:-1], x.shape[-1] + 1])
    yield "dtypes", x.long()
    if i > 2 and not TABLES[op].rows[i].optional:
        yield "optional", None
    if TABLES[op].rows[i].in_place:
        yield "in_place", torch.stack((x, x), -1)[..., 0]


EVERY_DTYPE = tuple({x for x in vars(torch).values() if isinstance(x, torch.dtype)})
WEAKER = {"dtypes": {"dtypes": EVERY_DTYPE}, "optional": {"optional": True}, "in_place": {"in_place": False}}


def weaken(op, i, part, monkeypatch):
    """Take one part of one row out of the table."""
    table, row, expect = TABLES[op], TABLES[op].rows[i], arguments._expect_shape
    monkeypatch.setattr(arguments, "_RIGHT", set())
    if part == "shape":
        passes = lambda of, *rest: None if of is row else expect(of, *rest)
        return monkeypatch.setattr(arguments, "_expect_shape", passes)
    rows = (*table.rows[:i], row._replace(**WEAKER[part]), *table.rows[i + 1 :])
    monkeypatch.setitem(arguments.TABLES, op, table._replace(rows=rows))
    monkeypatch.setitem(arguments._IN_PLACE, op, 0)


@pytest.mark.parametrize(("op", "i"), ROWS, ids=lambda x: str(x))
def test_each_part_of_each_row_is_what_refuses(op, i, monkeypatch):
    tensors, kept = right(op), 1
    arguments.check(op, tensors, kept=kept)
    for part, wrong in wrongs(op, i, tensors[i]):
        changed = [*tensors[:i], wrong, *tensors[i + 1 :]]
        with pytest.raises((ValueError, TypeError)) as refusal:
            arguments.check(op, changed, kept=kept)
        assert TABLES[op].rows[i].name in str(refusal.value)
        if i in (0, 2):  # q and the values give the sizes: all rows then disagree with them
            continue
        with monkeypatch.context() as patched:
            weaken(op, i, part, patched)
            arguments.check(op, changed, kept=kept)


def test_a_call_that_was_right_does_not_speak_for_another():
    """What `check` remembers of a call is all that it would read again."""
    tensors = right("kda_step_")
    for _ in range(2):
        arguments.check("kda_step_", tensors)
        for wrong in (
            tensors[3].double().long(),
            tensors[3].to("meta"),
            tensors[3].to_sparse(),
            tensors[3][..., 1:],
            None,
            3,
        ):
            with pytest.raises((ValueError, TypeError), match="log_decay"):
                arguments.check("kda_step_", [*tensors[:3], wrong, *tensors[4:]])
        for state in (tensors[5].mT.contiguous().mT, torch._neg_view(tensors[5])):
            with pytest.raises(ValueError, match="edited in place"):
                arguments.check("kda_step_", [*tensors[:5], state])
    whole = right("kda")
    arguments.check("kda", whole, torch.tensor([0, 3]))
    for borders in ([0, 2], [1, 3], [0.0, 3.0]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            arguments.check("kda", whole, torch.tensor(borders))


@pytest.mark.parametrize("op", TABLES)
def test_places_layouts_and_sizes_are_refused(op):
    tensors = right(op)
    for i, row in enumerate(TABLES[op].rows):
        for wrong in (tensors[i].to("meta"), tensors[i].to_sparse()):
            with pytest.raises(ValueError, match=rf"{row.name}|q .*{row.name}"):
                arguments.check(op, [*tensors[:i], wrong, *tensors[i + 1 :]], kept=1)
    if TABLES[op].on:
        with pytest.raises(ValueError, match=f"reads tensors on the {TABLES[op].on}"):
            arguments.check(op, [x.to("meta") for x in tensors], kept=1)
    for letter, most in (("K", TABLES[op].key_channels), ("V", TABLES[op].value_channels)):
        for size in (0, most + 1):
            if size == float("inf"):
                continue
            sizes = {"B": 1, "T": 3, "H": 2, "K": 5, "HV": 4, "V": 7, "N": 1, "P": 1} | {letter: int(size)}
            sizes["HV*K"] = 4 * sizes["K"]
            with pytest.raises(ValueError, match="channels a head"):
                arguments.check(op, [torch.zeros([sizes[x] for x in row.shape.removeprefix("numbers ").split()])
                                     for row in TABLES[op].rows], kept=1)  # fmt: skip
    for H, HV in ((0, 4), (3, 4), (2, 0)):
        sizes = {"B": 1, "T": 3, "H": H, "K": 5, "HV": HV, "V": 7, "N": 1, "P": 1, "HV*K": HV * 5}
        with pytest.raises(ValueError, match="the heads of v must be a multiple"):
            arguments.check(op, [torch.zeros([sizes[x] for x in row.shape.removeprefix("numbers ").split()])
                                 for row in TABLES[op].rows], kept=1)  # fmt: skip


class ReachedError(Exception):
    pass


@pytest.mark.parametrize("door", DOORS)
def test_every_door_checks_before_anything_else(door, monkeypatch):
    """A kernel's operator that did not ask the table would go on; this one is told to stop there."""

    def stop(*_, **__):
        raise ReachedError

    call, right = DOORS[door]
    monkeypatch.setattr(arguments, "check", stop)
    monkeypatch.setattr(gpu, "check", stop)
    monkeypatch.setattr(register.jit, "library", lambda: pytest.fail("a kernel was reached"))
    with pytest.raises(ReachedError):
        call(right)
    if door.startswith("gpu"):
        with pytest.raises(ReachedError):  # not the fakes alone
            call({n: x if x is None else torch.zeros(x.shape) for n, x in right.items()})


# ---- under the sanitizers ----


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A command that calls the C kernels from Python, with every address watched."""
    if jit.refusal() is not None or sys.platform != "linux":
        pytest.skip("needs the C kernels, and a Linux loader")
    library = tmp_path_factory.mktemp("sanitized") / "delta_memory.so"
    flags = ("-std=gnu11", "-shared", "-fPIC", "-g", "-O1", "-march=native", "-fopenmp", "-lm")
    watch = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    compiler = jit.find_compiler()
    if subprocess.run([compiler, *flags, *watch, jit.SOURCE, "-o", library], capture_output=True).returncode:
        pytest.skip("this compiler has no sanitizers")
    find = lambda name: subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    runtimes = [find("libasan.so"), find("libstdc++.so")]
    if not all(Path(x).is_absolute() for x in runtimes):
        pytest.skip("this compiler's sanitizers cannot be loaded before Python")
    env = {**os.environ, "LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "tests.ops.sanitized_calls", library]
    return lambda what: subprocess.run(
        [*command, what], env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )


def test_the_sanitizers_find_nothing_in_calls_right_and_wrong(sanitized):
    run = sanitized("calls")
    assert run.returncode == 0, run.stderr
    right, wrong = (int(word) for word in run.stdout.split() if word.isdigit())
    assert right > 200
    assert wrong > 1200


def test_the_sanitizers_would_see_a_call_that_nobody_checked(sanitized):
    run = sanitized("without checks")
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr


# ---- found once ----


def kda_inputs(T=20, H=2, K=8, V=8, B=1):
    draw = Draw(B=B, T=T, H=H, G=H, K=K, V=V)
    return [FUNCTIONS["kda"].draw(draw)[name] for name in ("q", "k", "v", "log_decay", "beta", "state")]


@pytest.mark.parametrize("numbers", [2, 4, 8, 15, 17, 32])
@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_a_gates_parameters_have_their_sizes(backend, numbers):
    x = torch.randn(1, 5, 2, 8)
    for gate in (
        gates.SoftplusDecay(torch.zeros(2), torch.zeros(numbers)),
        gates.SigmoidDecay(torch.zeros(2), torch.zeros(numbers)),
    ):
        with pytest.raises(ValueError, match=f"dt_bias has {numbers} numbers, .*ask for 16"):
            kda_from_logits(x, x, x, x, x[..., 0], gate=gate, backend=backend)
    with pytest.raises(ValueError, match="A_log has 3 numbers"):
        kda_from_logits(
            x, x, x, x, x[..., 0], gate=gates.SoftplusDecay(torch.zeros(3), torch.zeros(16)), backend=backend
        )


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack((x, 2 * x))),
    "a gradient of each": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack((x, 2 * x))),
}


# torch itself, at its first forward-mode derivative
OLD_JIT = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@OLD_JIT
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_derivatives_of_torch_func_are_those_of_the_torch_form(transform):
    """They were silently 0 through the C kernel, which knows no tangents."""
    q, k, v, g, b, state = kda_inputs(T=5, H=1, K=3, V=2)
    run = lambda backend: TRANSFORMS[transform](lambda v: kda(q, k, v, g, b, state=state, backend=backend).output, v)
    found = run("auto")
    torch.testing.assert_close(found, run("chunked"))
    assert found.abs().max() > 0
    if backends.names()[-3] == "cpu" and jit.refusal() is None:
        with pytest.raises(
            ValueError, match="backend 'cpu' cannot run this call: it has no rule for torch.func .*chunked"
        ):
            run("cpu")


@OLD_JIT
def test_dual_numbers_keep_their_tangents():
    q, k, v, g, b, _ = kda_inputs()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(v, torch.ones_like(v))
        found = [forward_ad.unpack_dual(kda(q, k, dual, g, b, backend=x).output).tangent for x in ("auto", "chunked")]
    torch.testing.assert_close(*found)


@OLD_JIT
def test_a_compiled_jvp_is_right_too():
    q, k, v, g, b, _ = kda_inputs(T=4, H=1)
    f = lambda v: torch.func.jvp(lambda v: kda(q, k, v, g, b).output, (v,), (torch.ones_like(v),))[1]
    torch.testing.assert_close(torch.compile(f, backend="aot_eager")(v), f(v))


@pytest.mark.parametrize("backend", ["auto", "reference", "chunked"])
def test_without_tokens_the_state_is_given_back_as_another_tensor(backend):
    *inputs, state = kda_inputs(T=0)
    after = kda(*inputs, state=state, backend=backend).state
    assert torch.equal(after, state)
    after.zero_()
    assert state.abs().sum() > 0


def test_autograd_hears_that_a_step_edited_a_state_that_it_kept():
    """Gradients of what was computed from the old memory would be silently those of the new one."""
    q, k, v, g, b, state = kda_inputs()
    loss = kda(q.requires_grad_(), k, v, g, b, state=state).output.sum()
    with torch.no_grad():
        kda_step_(*(x[:, 0] for x in (q, k, v, g, b)), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("changed", range(5))
def test_a_view_that_is_still_to_be_negated_is_read_negated(changed):
    *tokens, state = kda_inputs(T=1)
    inputs, memory, other = [x[:, 0] for x in tokens], state.clone(), state.clone()
    expected = kda_step_(*inputs, memory)
    inputs[changed] = torch._neg_view(-inputs[changed])
    assert torch.equal(kda_step_(*inputs, other), expected)
    assert torch.equal(other, memory)
    with pytest.raises(ValueError, match="state is a view yet to be negated"):
        kda_step_(*inputs, torch._neg_view(state))


@pytest.mark.parametrize("backend", ["auto", "chunked"])
@pytest.mark.parametrize("kind", [gates.SoftplusDecay, gates.SigmoidDecay])
def test_far_logits_and_rates_are_finite_decays(backend, kind):
    """+inf forgets at once, or as much as the floor lets; a rate that overflows makes a step of the sigmoid."""
    q, k, v, *_ = kda_inputs()
    for A_log, logit in ((0.0, torch.inf), (90.0, 0.5), (90.0, torch.inf), (88.0, -0.5), (200.0, 3.0)):
        logits = torch.full_like(q, -1.0)
        logits[:, 5] = logit
        gate = kind(torch.full((2,), A_log), torch.zeros(2, 8))
        found = kda_from_logits(q, k, v, logits, q[..., 0], gate=gate, backend=backend)
        wide = kind(gate.A_log.double(), gate.dt_bias.double())
        truth = kda_from_logits(*(x.double() for x in (q, k, v, logits, q[..., 0])), gate=wide, backend="reference")
        torch.testing.assert_close(found.output.double(), truth.output, rtol=1e-4, atol=1e-5)


def test_sizes_beyond_what_a_launch_can_count_are_refused():
    x = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device="meta").expand(1, 2**31, 1, 64)
    with pytest.raises(ValueError, match="more than one launch can count: cut the batch"):
        torch.ops.palimpsest_gpu.linear_memory(x, x, x, None, 1.0, None)
