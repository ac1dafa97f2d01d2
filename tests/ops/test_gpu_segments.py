"""The Hopper driver of a part of a longer sequence, its kernels played lane by lane on a CPU: reads, transitions, gradients."""

import contextlib
import ctypes
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from palimpsest.ops import affine
from palimpsest.ops.backends import Segments
from palimpsest.ops.gpu.hopper import delta_memory, precompile
from palimpsest.ops.gpu.register import _arguments
from palimpsest.ops.gpu.workspace import runs_of
from palimpsest.ops.split import split_sequence
from palimpsest.ops.torch_backends import CHUNKED
from palimpsest.ops.variants import kda
from palimpsest.testing import Case, assert_within_budget

HERE = Path(__file__).parent
K, C = 128, 64


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A launch of one compiled kernel, as the driver hands it its arguments."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to play the lanes")
    folder, kinds = (
        tmp_path_factory.mktemp("lanes"),
        {"intra_chunk": "IntraChunkArguments", "inter_chunk": "InterChunkArguments"},
    )

    def kernel(file, name, fields):
        source, library = folder / f"{name}.cpp", folder / f"{name}.so"
        if not library.exists():
            source.write_text(
                f'#include "{HERE}/warp_on_cpu.h"\n#include "{precompile.ROOM}/{file}.cu"\n'
                f'static {kinds[file]} a;\nextern "C" void run({kinds[file]}* x, int bx, int by)'
                f" {{ a = *x; cpu_run(bx, by, {delta_memory.THREADS[file]}, [] {{ {name}(a); }}); }}"
            )
            command = ["g++", "-O1", "-w", "-fPIC", "-shared", "-DERASE=0", str(source), "-o", str(library)]
            subprocess.run(command, check=True)
        run = ctypes.CDLL(str(library)).run

        def launch(grid, *arguments):
            run(ctypes.create_string_buffer(struct.pack(fields, *arguments)), *grid)

        return SimpleNamespace(launch=launch)

    return kernel


@pytest.fixture
def driver(played, monkeypatch):
    """`delta_memory.opened` on a CPU."""
    intra = lambda *_: played("intra_chunk", "intra_chunk", delta_memory._INTRA_CHUNK)
    inter = lambda dtype, K, groups, *_: played(
        "inter_chunk", f"inter_chunk_forward_{groups}", delta_memory._INTER_CHUNK
    )
    monkeypatch.setattr(delta_memory, "_intra_chunk", intra)
    monkeypatch.setattr(delta_memory, "_inter_chunk", inter)
    monkeypatch.setattr(delta_memory, "multiprocessors", lambda device: 132)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(delta_memory, "_side_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def borders_of(cu_seqlens, tokens, C, device):
        chunks = (cu_seqlens.diff() + C - 1) // C
        return cu_seqlens.int(), torch.cat((torch.zeros(1), chunks.cumsum(0))).int()

    found = SimpleNamespace(borders_of=borders_of)
    monkeypatch.setitem(sys.modules, "palimpsest.ops.gpu.triton.borders", found)

    def opened(op, given, rows):
        return delta_memory.opened(_arguments(True, op, given), rows)

    return opened


def by_the_law(op, d_output, d_state, given):
    *tensors, state, scale, cu_seqlens = given
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (state, *tensors)]
        output, after = CHUNKED.kda(*leaves[1:], leaves[0], scale, cu_seqlens)
        pairs = [(output, d_output)] if d_state is None else [(output, d_output), (after, d_state)]
        return torch.autograd.grad([x for x, _ in pairs], leaves, [d for _, d in pairs], materialize_grads=True)


@pytest.mark.parametrize(
    ("borders", "segments", "open_rows"),
    [(None, 3, [1, 2]), ([0, 50, 140], 3, [1, 3]), ([0, 50, 140], 1, [])],
    ids=["one sequence", "documents", "nothing enters"],
)
def test_parts_of_a_sequence_on_hopper(driver, borders, segments, open_rows):
    T = 140
    tensors = Case("correlated", "sigmoid", "half_slow", T, 1, 1, K, 64).kda(torch.bfloat16)[:5]
    cut = None if borders is None else torch.tensor(borders)
    split = split_sequence(T, segments=segments, cu_seqlens=cut, align=32)
    truth = kda(*(x.double() for x in tensors), cu_seqlens=cut)
    calls = []

    def counted(*given):
        calls.append(given[2])
        return driver(*given)

    backend = affine.Backend("played", lambda problem: None, kda=CHUNKED.kda)
    object.__setattr__(backend, "segments", Segments(("kda",), counted, by_the_law))
    output, state = affine.remember(split, backend, "kda", tensors, None, K**-0.5)
    assert calls == ([open_rows] if open_rows else [])
    ends = [i for i, piece in enumerate(split.pieces) if piece.ends]
    for name, ours, law in (("output", output, truth.output), ("state", state[ends], truth.state)):
        error = ((ours.double() - law).norm() / law.norm()).item()
        assert error < 8e-3, f"{name}: {error:.1e}"


def test_rows_that_follow_one_another_go_in_one_launch():
    assert runs_of([0, 1, 2, 5, 7, 8]) == [(0, 3, 0), (5, 1, 3), (7, 2, 4)]
    assert runs_of([]) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("borders", [None, [0, 130, 131, 700]], ids=["one sequence", "documents"])
@pytest.mark.parametrize("decay", ["slow", "floor"])
def test_parts_on_a_gpu(borders, decay):
    """In parts no further from the law than twice as far as whole, output and gradients."""
    T, cut = 700, None if borders is None else torch.tensor(borders, device="cuda")
    tensors = Case("correlated", "sigmoid", decay, T, 1, 2, K, K).kda(torch.bfloat16, "cuda")[:5]
    split = split_sequence(T, segments=4, cu_seqlens=cut)
    weight = torch.randn(1, T, 2, K, device="cuda")

    def results(dtype, **how):
        leaves = [x.to(dtype or x.dtype).requires_grad_() for x in tensors]
        output = kda(*leaves, **how).output
        return [output.detach(), *torch.autograd.grad(output, leaves, weight.to(output.dtype))]

    truth = results(torch.float64, cu_seqlens=cut, backend="chunked")
    whole, parts = results(None, cu_seqlens=cut), results(None, split=split)
    for name, ours, peer, law in zip("output q k v log_decay beta".split(), parts, whole, truth):
        assert_within_budget(name, ours, law, peer, torch.bfloat16)
