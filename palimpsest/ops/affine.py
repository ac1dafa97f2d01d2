"""The memory of a sequence that lies in fragments: each is an affine map of the memory that enters it.

    S_out = D S_in + E          o_t = o_t(from zero) + R_t S_in          E, D, R of a fragment need nothing of the others

Forward   every rank runs its fragments from zero for E, and from the identity without values for D and the reads R; ranks
          exchange D and E, each composes what enters its own fragments, and adds its effect: R S_in, D S_in.
Backward  dF = sum_t R_t^T do_t is what a fragment itself says about S_in; ranks exchange it, and each composes the gradient of
          what leaves its fragments, dS_out = dF + D^T dS_out of the fragments after. Then the kernels' own backward, once.
Numbers   D, E and dF travel in the dtype of memories and are composed in fp64, so that no setting of matrix products touches
          them. A fragment that nothing enters is computed by the same launches as without a split: the same bits.
Letters   B sequences, L tokens of this rank, P pieces of it, O of them open, HV value heads, K, V channels; see split.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from palimpsest.ops.arguments import state_dtype
from palimpsest.ops.backends import Backend, Op, Segments
from palimpsest.ops.split import Fragment, SequenceSplit, uncompiled

_OPS = ("core", "kda", "kda_from_logits", "dplr", "linear")  # in this order they are numbered where ranks agree


class Opened(NamedTuple):
    """What a rank's tokens are before it is known what enters them.

    Attributes:
        output: [B, L, HV, V], from the states given.
        state: [B P, HV, K, V], after each piece, from those.
        reads: [B, L', HV, K], what each token of an open piece reads of the memory that enters it: R; L' is L or less.
        transitions: [B O, HV, K, K], D of the open pieces.
    """

    output: Tensor
    state: Tensor
    reads: Tensor
    transitions: Tensor


class Call(NamedTuple):
    """What stays the same between forward and backward, tensors apart.

    `run(*tensors, state, scale, cu_seqlens)` is a backend's function; `values` the place of the values among the tensors.
    """

    split: SequenceSplit
    backend: Backend
    op: Op
    run: Callable
    values: int
    scale: float
    batch: int
    gate: Any


@uncompiled
def remember(
    split: SequenceSplit,
    backend: Backend,
    op: Op,
    tensors: Sequence[Tensor],
    state: Tensor | None,
    scale: float,
    gate: Any = None,
) -> tuple[Tensor, Tensor]:
    """Run `op` of a backend over this rank's tokens as a part of the whole. Every rank calls it, and its backward.

    Args:
        split: the table of who holds what.
        tensors: as the backend's function takes them, [B, L, ...] of this rank's tokens.
        state: [B P, HV, K, V]; only rows of pieces that begin their document are read; zeros if None.
        scale: as the backend's function takes it.
        gate: of kda_from_logits, a gate with A_log and dt_bias.

    Returns:
        The output [B, L, HV, V], and the memory after each piece [B P, HV, K, V].

    Raises:
        ValueError: a shape that does not fit the split, or that differs between ranks.
    """
    values = 3 if op == "core" else 2
    v = tensors[values]
    _meet(split, op, tensors, v, state)
    run: Any = getattr(backend, op)
    if gate is not None:
        tensors, logits = (*tensors, gate.A_log, gate.dt_bias), run
        run = lambda *x: logits(*x[:5], replace(gate, A_log=x[5], dt_bias=x[6]), *x[7:])
    call = Call(split, backend, op, run, values, scale, len(v), gate)
    count = len(tensors) - 2 * (gate is not None)
    rows = (*(split.as_rows(x) for x in tensors[:count]), *tensors[count:])
    output, after = _Affine.apply(call, state, *rows)
    return (output if output.shape[:2] == v.shape[:2] else output.view(v.shape)), after


def _meet(split: SequenceSplit, op: Op, tensors: Sequence[Tensor], v: Tensor, state: Tensor | None) -> None:
    trouble = None
    N, K = len(v) * len(split.pieces), tensors[0].shape[-1]
    try:
        split.check_tokens("q", tensors[0])
        if state is not None and tuple(state.shape) != (N, v.shape[2], K, v.shape[3]):
            raise ValueError(
                f"state has shape {tuple(state.shape)}; rank {split.rank} holds {len(split.pieces)} pieces of documents, and "
                f"there it must be {(N, v.shape[2], K, v.shape[3])}: one row a piece, in their order"
            )
    except ValueError as error:
        trouble = str(error)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    facts = (_OPS.index(op), len(v), tensors[0].shape[2], *v.shape[2:], K, dtypes.index(v.dtype), len(tensors))
    split.agree(f"{op} with split", facts, trouble)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, state: Tensor | None, *tensors: Tensor):
        split, v = call.split, tensors[call.values]
        ctx.call, ctx.gave_state = call, state is not None
        ctx.set_materialize_grads(False)
        open_rows = _rows(len(split.pieces), call.batch, split.open_pieces)
        HKV, wide = (v.shape[2], tensors[0].shape[-1], v.shape[3]), state_dtype(v.dtype)
        with torch.autocast(v.device.type, enabled=False):
            first = _first(call, state, tensors, open_rows)
            output, after, reads, transitions = _opened(call, tensors, first, open_rows)
            gathered = _exchange(call, _FORTH, after, transitions, HKV, v)
            if open_rows:
                at = _index(open_rows)
                entering = _entering(call, _received(call, _FORTH, gathered, HKV))
                _add_reads(call, output, reads, entering.to(wide))
                after[at] += (transitions.double() @ entering).to(wide)
                first = v.new_zeros(after.shape, dtype=wide) if first is None else first
                first[at] = entering.to(wide)
        opens = (reads, transitions) if open_rows else (None, None)
        ctx.save_for_backward(gathered if _later(call) else None, first, *opens, *tensors)
        return output, after

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gathered, first, reads, transitions, *tensors), call = ctx.saved_tensors, ctx.call
        split, v = call.split, tensors[call.values]
        d_output, d_after = gradients
        open_rows = _rows(len(split.pieces), call.batch, split.open_pieces)
        HKV, wide = (v.shape[2], tensors[0].shape[-1], v.shape[3]), state_dtype(v.dtype)
        with torch.autocast(v.device.type, enabled=False):
            d_output = torch.zeros_like(v) if d_output is None else d_output
            said = None
            if open_rows:
                said = _sums(call, reads, d_output)
                if d_after is not None:
                    said = said + (transitions.double().mT @ d_after[_index(open_rows)].double()).to(wide)
            heard = _received(call, _BACK, _exchange(call, _BACK, said, None, HKV, v), HKV)
            maps = {} if gathered is None else _received(call, _FORTH, gathered, HKV)
            handed = _handed_back(call, heard, maps)
            if handed:
                N = call.batch * len(split.pieces)
                d_after = v.new_zeros(N, *HKV, dtype=wide) if d_after is None else d_after.to(wide, copy=True)
                for rows, gradient in handed:
                    d_after[_index(rows)] += gradient.to(wide)
            if split.pieces:
                d_first, *found = _gradients(call, d_output, d_after, first, tensors)
            else:
                d_first, found = first, [torch.zeros_like(x) for x in tensors]
            if ctx.gave_state and open_rows:
                d_first = d_first.clone()
                d_first[_index(open_rows)] = 0  # what entered there came from another fragment
        return None, d_first if ctx.gave_state else None, *found


def _first(call: Call, state: Tensor | None, tensors: Sequence[Tensor], open_rows: list[int]) -> Tensor | None:
    """What each piece starts from as far as this rank knows: [B P, HV, K, V]; None for zeros, where the backend likes that."""
    v = tensors[call.values]
    if state is not None:
        first = state.clone()
        if open_rows:
            first[open_rows] = 0
        return first
    if call.backend.starts_empty:
        return None
    N = call.batch * len(call.split.pieces)
    return v.new_zeros(N, v.shape[2], tensors[0].shape[-1], v.shape[3], dtype=state_dtype(v.dtype))


def _cu_seqlens(call: Call, device: torch.device) -> Tensor | None:
    return None if len(call.split.pieces) == 1 else call.split.cu_seqlens(call.batch, device)


def _spans(call: Call, rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """Of each row of states: the row of the tensors that holds its tokens, and from where to where."""
    pieces, L = call.split.pieces, call.split.length
    if len(pieces) == 1:
        return [(row, 0, L) for row in rows]
    found = []
    for row in rows:
        b, piece = row // len(pieces), pieces[row % len(pieces)]
        at = b * L + piece.at
        found.append((0, at, at + piece.stop - piece.start))
    return found


def _opened(call: Call, tensors: Sequence[Tensor], first: Tensor | None, open_rows: list[int]) -> Opened:
    v = tensors[call.values]
    none, cu_seqlens = v.new_empty(0), _cu_seqlens(call, v.device)
    if not call.split.pieces:  # none of the tokens are here
        state = v.new_empty(0, v.shape[2], tensors[0].shape[-1], v.shape[3], dtype=state_dtype(v.dtype))
        return Opened(torch.empty_like(v), state, none, none)
    if not open_rows:
        output, after = call.run(*tensors, first, call.scale, cu_seqlens)
        return Opened(output, after, none, none)
    if kernels := _kernels(call):
        return Opened(*kernels.opened(call.op, _arguments(call, tensors, first, cu_seqlens), open_rows))
    return opened(call, tensors, first, cu_seqlens, open_rows)


def _kernels(call: Call) -> Segments | None:
    segments = call.backend.segments
    return segments if segments is not None and call.op in segments.ops else None


def _arguments(call: Call, tensors: Sequence[Tensor], first: Tensor | None, cu_seqlens: Tensor | None) -> tuple:
    """What the backend's own function takes."""
    if call.gate is not None:
        tensors = (*tensors[:5], replace(call.gate, A_log=tensors[5], dt_bias=tensors[6]))
    return (*tensors, first, call.scale, cu_seqlens)


def opened(call: Call, tensors, first, cu_seqlens, open_rows: list[int]) -> Opened:
    """`Opened` by two runs of the backend's function: all tokens, and those of open pieces without values from the identity."""
    v, K = tensors[call.values], tensors[0].shape[-1]
    output, after = call.run(*tensors, first, call.scale, cu_seqlens)
    spans = _spans(call, open_rows)
    L = max(stop for _, _, stop in spans)
    eye = torch.eye(K, device=v.device, dtype=state_dtype(v.dtype)).expand(len(open_rows), v.shape[2], K, K)
    whole = len(open_rows) == len(after)
    count = len(tensors) - 2 * (call.gate is not None)
    chosen, ends = list(tensors), [0]
    if not whole:
        for i in range(count):
            chosen[i] = torch.cat([tensors[i][row : row + 1, start:stop] for row, start, stop in spans], 1)
        for _, start, stop in spans:
            ends.append(ends[-1] + stop - start)
        cu_seqlens = torch.tensor(ends, dtype=torch.int32).to(v.device)
    chosen[call.values] = v.new_zeros(*chosen[call.values].shape[:-1], K)
    found, transitions = call.run(*chosen, eye.contiguous(), call.scale, cu_seqlens)
    if whole:
        return Opened(output, after, found, transitions)
    reads = found.new_zeros(len(v), L, *found.shape[2:])
    for (row, start, stop), end in zip(spans, ends[1:]):
        reads[row, start:stop] = found[0, end - (stop - start) : end]
    return Opened(output, after, reads, transitions)


def _add_reads(call: Call, output: Tensor, reads: Tensor, entering: Tensor) -> None:
    """o_t += R_t S_in for the tokens of open pieces, in place."""
    rows = _rows(len(call.split.pieces), call.batch, call.split.open_pieces)
    for (row, start, stop), S_HKV in zip(_spans(call, rows), entering):
        o_HTV, R_HTK = output[row, start:stop].transpose(0, 1), reads[row, start:stop].transpose(0, 1)
        if output.is_cuda and output.dtype != torch.float32:
            o_HTV.baddbmm_(R_HTK, S_HKV.to(R_HTK.dtype))
        else:
            o_HTV += (R_HTK.to(S_HKV.dtype) @ S_HKV).to(o_HTV.dtype)


def _sums(call: Call, reads: Tensor, d_output: Tensor) -> Tensor:
    """sum_t R_t^T do_t of each open piece, [B O, HV, K, V], in the dtype of memories."""
    rows, wide, found = (
        _rows(len(call.split.pieces), call.batch, call.split.open_pieces),
        state_dtype(d_output.dtype),
        [],
    )
    for row, start, stop in _spans(call, rows):
        R_HKT, do_HTV = reads[row, start:stop].permute(1, 2, 0), d_output[row, start:stop].transpose(0, 1)
        if R_HKT.is_cuda and R_HKT.dtype != torch.float32:
            found.append(torch.bmm(R_HKT, do_HTV.to(R_HKT.dtype), out_dtype=torch.float32))
        else:
            found.append(R_HKT.to(wide) @ do_HTV.to(wide))
    return torch.stack(found)


def _gradients(call: Call, d_output: Tensor, d_after: Tensor | None, first: Tensor | None, tensors) -> list:
    """Of the first memories and of the tensors, once all is known that enters the pieces and what is said of what leaves."""
    cu_seqlens = _cu_seqlens(call, d_output.device)
    if kernels := _kernels(call):
        return list(kernels.gradients(call.op, d_output, d_after, _arguments(call, tensors, first, cu_seqlens)))
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in (first, *tensors)]
        output, after = call.run(*leaves[1:], leaves[0], call.scale, cu_seqlens)
        outputs, given = ([output], [d_output]) if d_after is None else ([output, after], [d_output, d_after])
        wanted = [x for x in leaves if x is not None]
        found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True, materialize_grads=True))
    return [None if x is None else next(found) for x in leaves]


# What travels: of each fragment, in the order in which its rank holds them, the matrices that another fragment needs.
_FORTH, _BACK = "forth", "back"


def _travels(direction: str, f: Fragment) -> str:
    """E of those that hand a memory on, and D of those that it goes through; back, F of those that a memory enters."""
    if direction == _BACK:
        return "F" if f.open else ""
    return "ED" if f.through else "E" if f.hands_on else ""


def _exchange(
    call: Call, direction: str, memories: Tensor | None, transitions: Tensor | None, HKV, like: Tensor
) -> Tensor:
    """[R, numbers] of all ranks: the matrices of this rank's fragments end to end, as long on every rank.

    memories: [B P, HV, K, V] going forth, [B O, HV, K, V] going back. transitions: [B O, HV, K, K].
    """
    split, parts = call.split, []
    for f in split.mine:
        for matrix in _travels(direction, f):
            if matrix == "E":
                source, rows = memories, _rows(len(split.pieces), call.batch, [f.first_row + len(f.pieces) - 1])
            else:
                source = transitions if matrix == "D" else memories
                rows = _rows(len(split.open_pieces), call.batch, [split.open_pieces.index(f.first_row)])
            assert source is not None
            parts.append(source[_index(rows)].reshape(-1))
    longest = max(sum(size for *_, size in _contents(call, direction, rank, HKV)) for rank in range(split.size))
    mine = like.new_zeros(longest, dtype=state_dtype(like.dtype))
    if parts:
        flat = torch.cat(parts)
        mine[: len(flat)] = flat
    return split.all_gather(mine)


def _contents(call: Call, direction: str, rank: int, HKV) -> list[tuple[Fragment, str, int]]:
    """(fragment, matrix, numbers) of all that a rank sends."""
    H, K, V = HKV
    theirs = sorted((f for f in call.split.fragments if f.rank == rank), key=lambda f: f.slot)
    columns = {"D": K, "E": V, "F": V}
    return [(f, m, call.batch * H * K * columns[m]) for f in theirs for m in _travels(direction, f)]


def _received(call: Call, direction: str, gathered: Tensor, HKV) -> dict[tuple[int, str], Tensor]:
    """(start of the fragment, matrix) -> [B, HV, K, V or K], fp64."""
    H, K, _ = HKV
    found = {}
    for rank in range(call.split.size):
        at = 0
        for f, matrix, size in _contents(call, direction, rank, HKV):
            found[f.start, matrix] = gathered[rank, at : at + size].view(call.batch, H, K, -1)
            at += size
    return found


def _entering(call: Call, maps: dict[tuple[int, str], Tensor]) -> Tensor:
    """What enters this rank's open pieces, [B O, HV, K, V], fp64: composed from the first fragment of its document on."""
    fragments, found = call.split.fragments, {}
    wanted = {f.start for f in call.split.mine if f.open}
    needed = set(wanted)
    for f, after in zip(fragments[-2::-1], fragments[:0:-1]):  # from the right: what a needed one needs
        if f.through and after.start in needed:
            needed.add(f.start)
    S = None
    for before, f in zip(fragments, fragments[1:]):
        if f.start in needed:
            E = maps[before.start, "E"].double()
            S = E if S is None or not before.through else E + maps[before.start, "D"].double() @ S
            found[f.start] = S
    return torch.stack([found[f.start] for f in call.split.mine if f.open], 1).flatten(0, 1)


def _handed_back(call: Call, said: dict[tuple[int, str], Tensor], maps) -> list[tuple[list[int], Tensor]]:
    """Of each of this rank's fragments that hands a memory on: its rows of states, and that memory's gradient, fp64."""
    fragments, split = call.split.fragments, call.split
    mine, needed = {f.start for f in split.mine}, set()
    for f, after in zip(fragments, fragments[1:]):  # from the left: whose gradient a needed one needs
        if f.hands_on and (f.start in mine or (f.through and f.start in needed)):
            needed.add(after.start)
    dS, found = None, []
    for f, after in zip(fragments[-2::-1], fragments[:0:-1]):
        if after.start not in needed:
            continue
        F = said[after.start, "F"].double()
        dS = F + maps[after.start, "D"].double().mT @ dS if after.through else F
        if f.start in mine:
            found.append((_rows(len(split.pieces), call.batch, [f.first_row + len(f.pieces) - 1]), dS))
    return found


def _later(call: Call) -> bool:
    """Whether the backward needs what the ranks said going forth: D of fragments after this rank's own."""
    return any(f.through for f in call.split.fragments)


def _rows(pieces: int, batch: int, which: Sequence[int]) -> list[int]:
    return [b * pieces + piece for b in range(batch) for piece in which]


def _index(rows: list[int]) -> slice | list[int]:
    """Rows as a slice where they follow one another: an index of its own would have to travel to the device."""
    return slice(rows[0], rows[-1] + 1) if rows and rows == list(range(rows[0], rows[-1] + 1)) else rows
