"""A sequence split over ranks: who holds which tokens, and what the ranks tell one another about them.

Words    fragment   tokens that follow one another, on one rank; a rank holds one, or several (zigzag holds two)
         piece      the part of one document in one fragment; states have one row a piece
         open       a piece whose document began on the left of it: what enters it comes from another fragment
Letters  R ranks, B sequences, L tokens of a rank, P pieces of a rank, C channels, W taps of a convolution.
Traffic  All-gathers of fixed sizes that every rank computes from the table of fragments: no rank asks another how much.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import (
    _disable_dynamo as uncompiled,  # torch.compiler.disable would load the compiler with this file
)
from torch.autograd.function import once_differentiable

from palimpsest.ops.packing import borders, check_cu_seqlens

# torch 2.13 renamed both.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
ALIGN = 64  # tokens: a chunk of the GPU kernels


class Piece(NamedTuple):
    """The part of one document in one fragment; places are of the whole sequence.

    Attributes:
        start, stop: its tokens.
        document: where its document starts.
        begins: the document begins with it.
        ends: the document ends with it.
        at: its first token among its rank's own.
    """

    start: int
    stop: int
    document: int
    begins: bool
    ends: bool
    at: int


class Fragment(NamedTuple):
    """Tokens that follow one another, on one rank.

    Attributes:
        start, stop: its tokens, of the whole sequence.
        rank: who holds it.
        slot: which of that rank's fragments it is.
        at: its first token among that rank's own.
        pieces: of the documents in it.
        first_row: of its pieces, among that rank's.
    """

    start: int
    stop: int
    rank: int
    slot: int
    at: int
    pieces: tuple[Piece, ...]
    first_row: int

    @property
    def open(self) -> bool:
        """A memory enters it."""
        return not self.pieces[0].begins

    @property
    def hands_on(self) -> bool:
        """A memory leaves it for the next fragment."""
        return not self.pieces[-1].ends

    @property
    def through(self) -> bool:
        """What enters it leaves it again, changed."""
        return self.open and self.hands_on and len(self.pieces) == 1


class SequenceSplit:
    """Who holds which tokens of a sequence, or of documents packed in one. Made by `split_sequence`, alike on every rank.

    Args:
        tokens: of the whole.
        documents: their borders, from 0 to `tokens`; (0, tokens) of one.
        ranges: of each rank, the (start, stop) of its fragments, in the order in which it holds them.
        rank: which of them this process is.
        group: through which ranks speak; None if one process holds all fragments.
    """

    def __init__(
        self,
        tokens: int,
        documents: tuple[int, ...],
        ranges: tuple[tuple[tuple[int, int], ...], ...],
        rank: int,
        group: Any = None,
    ):
        self.tokens, self.documents, self.ranges, self.rank, self.group = tokens, documents, ranges, rank, group

    @cached_property
    def fragments(self) -> tuple[Fragment, ...]:
        """All, in the order of their tokens; empty ones are none."""
        found = []
        for rank, ranges in enumerate(self.ranges):
            at = row = slot = 0
            for start, stop in ranges:
                if start < stop:
                    pieces = tuple(self._pieces(start, stop, at))
                    found.append(Fragment(start, stop, rank, slot, at, pieces, row))
                    at, row, slot = at + stop - start, row + len(pieces), slot + 1
        return tuple(sorted(found, key=lambda fragment: fragment.start))

    def _pieces(self, start: int, stop: int, at: int):
        for first, last in zip(self.documents, self.documents[1:]):
            a, b = max(first, start), min(last, stop)
            if a < b:
                yield Piece(a, b, first, a == first, b == last, at + a - start)

    @cached_property
    def mine(self) -> tuple[Fragment, ...]:
        """This rank's fragments, in the order in which it holds them."""
        return tuple(sorted((f for f in self.fragments if f.rank == self.rank), key=lambda fragment: fragment.slot))

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """This rank's, in the order in which it holds them: the rows of its states."""
        return tuple(piece for fragment in self.mine for piece in fragment.pieces)

    @cached_property
    def length(self) -> int:
        """L, the tokens of this rank."""
        return sum(f.stop - f.start for f in self.mine)

    @cached_property
    def most_fragments(self) -> int:
        """The most fragments that a rank holds."""
        return max((f.slot + 1 for f in self.fragments), default=0)

    @cached_property
    def open_pieces(self) -> tuple[int, ...]:
        """Rows of this rank's open pieces."""
        return tuple(row for row, piece in enumerate(self.pieces) if not piece.begins)

    @property
    def size(self) -> int:
        """R, the number of ranks."""
        return len(self.ranges)

    def cu_seqlens(self, batch: int = 1, device: torch.device | str = "cpu") -> Tensor:
        """Borders of this rank's pieces for kernels, [batch P + 1] int32, of `batch` such rows end to end."""
        key = batch, torch.device(device)
        if key not in self._kept:
            ends = [b * self.length + piece.at for b in range(batch) for piece in self.pieces]
            self._kept[key] = torch.tensor([*ends, batch * self.length], dtype=torch.int32).to(device)
        return self._kept[key]

    @cached_property
    def _kept(self) -> dict:
        return {}

    @uncompiled
    def times(self, n: int) -> SequenceSplit:
        """The same split where each token is n: the sub-steps of Gated DeltaProduct."""
        if ("times", n) not in self._kept:
            ranges = tuple(tuple((n * a, n * b) for a, b in ranges) for ranges in self.ranges)
            documents = tuple(n * x for x in self.documents)
            self._kept["times", n] = SequenceSplit(n * self.tokens, documents, ranges, self.rank, self.group)
        return self._kept["times", n]

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a tensor that has all of them in dimension `dim`.

        Raises:
            ValueError: it has another number of tokens.
        """
        if x.shape[dim] != self.tokens:
            raise ValueError(f"x has {x.shape[dim]} tokens in dimension {dim}; the split is of {self.tokens}")
        parts = [x.narrow(dim, f.start, f.stop - f.start) for f in self.mine]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    @uncompiled
    def whole(self, x: Tensor) -> Tensor:
        """All tokens [B, tokens, C] of each rank's own x [B, L, C], in their order; gradients go back to where x was.

        Every rank calls it, and every rank's backward does.
        """
        self.check_tokens("x", x)
        return _Whole.apply(self, x)

    def heads_of(self, rank: int, heads: int) -> slice:
        """Which of `heads` a rank works on where each rank takes all tokens for some heads: shares as even as can be."""
        return slice(rank * heads // self.size, (rank + 1) * heads // self.size)

    @uncompiled
    def to_heads(self, x: Tensor) -> Tensor:
        """All tokens of this rank's heads, [B, tokens, H', C], of each rank's tokens for all heads, [B, L, H, C]."""
        return _Turned.apply(self, True, x.shape[2], x)

    @uncompiled
    def to_tokens(self, x: Tensor, heads: int) -> Tensor:
        """The way back from `to_heads`: [B, tokens, H', C] -> [B, L, H, C] with H = `heads`."""
        return _Turned.apply(self, False, heads, x)

    @uncompiled
    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """[L]: of each of this rank's tokens, its place in its document."""
        parts = [torch.arange(p.start - p.document, p.stop - p.document, device=device) for p in self.pieces]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=device)

    @uncompiled
    def next_tokens(self, labels: Tensor, ignored: int) -> Tensor:
        """[B, L]: the label of the token that follows each token in its document; `ignored` after a document's last.

        Args:
            labels: [B, L], of this rank's tokens. ignored: stands where there is none.
        """
        self.check_tokens("labels", labels)
        target = torch.full_like(labels, ignored)
        firsts = labels.new_full((self.most_fragments, len(labels)), ignored)
        for f in self.mine:
            firsts[f.slot] = labels[:, f.at]
        firsts = self.all_gather(firsts)
        for f in self.mine:
            for piece in f.pieces:
                stop = piece.at + piece.stop - piece.start
                target[:, piece.at : stop - 1] = labels[:, piece.at + 1 : stop]
            if f.hands_on:
                after = self.fragments[self.fragments.index(f) + 1]
                target[:, f.at + f.stop - f.start - 1] = firsts[after.rank, after.slot]
        return target

    @uncompiled
    def convolve(
        self,
        convs: Callable,
        streams: Sequence[Tensor],
        weights: Sequence[Tensor],
        states: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`short_convs` over this rank's part: what stands before a piece, the halo, comes from the fragments on its left.

        Args:
            convs: `ops.short_conv.short_convs`.
            streams: [B, L, C] each. weights: as `short_convs`.
            states: [B P, C, W - 1] each; rows of pieces that begin their document are read; zeros if None.

        Returns:
            The streams [B, L, C], and their states after each piece [B P, C, W - 1].
        """
        self.check_tokens("streams", streams[0])
        widths, shapes = [x.shape[-1] for x in streams], [x.shape for x in streams]
        *streams, rows = _Halo.apply(self, weights[0].shape[-1] - 1, *streams)
        windows = list(rows.split(widths, dim=1))
        if states is not None:
            begins = [p.begins for p in self.pieces] * len(streams[0])
            begins = torch.tensor(begins, device=rows.device)[:, None, None]
            windows = [torch.where(begins, s.to(w.dtype), w) for s, w in zip(states, windows)]
        windows = [w.contiguous() for w in windows]
        if not self.pieces:  # no token, but weights of which every rank has a gradient
            return [x + 0 * weight.sum().to(x.dtype) for x, weight in zip(streams, weights)], windows
        cu_seqlens = None if len(self.pieces) == 1 else self.cu_seqlens(len(streams[0]), rows.device)
        ys, after = convs([self.as_rows(x) for x in streams], weights, states=windows, cu_seqlens=cu_seqlens)
        return [y.view(shape) for y, shape in zip(ys, shapes)], after

    def as_rows(self, x: Tensor) -> Tensor:
        """x [B, L, ...] as kernels want it with `cu_seqlens`: one packed row [1, B L, ...]; x itself where each sequence is
        one piece."""
        return x if len(self.pieces) == 1 else x.flatten(0, 1)[None]

    def check_tokens(self, name: str, x: Tensor) -> None:
        """Raise ValueError unless x is [B, L, ...]."""
        if x.ndim < 2 or x.shape[1] != self.length:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; rank {self.rank} of this split holds {self.length} of the {self.tokens} "
                f"tokens: expected [B, {self.length}, ...], as `split.shard` gives"
            )

    def all_gather(self, x: Tensor) -> Tensor:
        """[R, ...] of each rank's x of the same shape; no gradient."""
        if self.group is None:
            return x[None]
        found = x.new_empty(self.size, *x.shape)
        if x.numel():
            _all_gather(found.view(-1), x.contiguous().view(-1), group=self.group)
        return found

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum of each rank's x, a new tensor; no gradient."""
        x = x.clone()
        if self.group is not None and x.numel():
            dist.all_reduce(x, group=self.group)
        return x

    def agree(self, kind: str, facts: Sequence[int], trouble: str | None = None) -> None:
        """Raise ValueError on every rank unless all have the same facts and no trouble. Once for each `kind`: it waits.

        Args:
            kind: what is about to be done, for the message.
            facts: whole numbers that must be the same everywhere.
            trouble: what is wrong on this rank, if anything.
        """
        if kind in self._agreed or self.group is None:
            if trouble:
                raise ValueError(trouble)
            return
        agree(self.group, kind, facts, trouble)
        self._agreed.add(kind)

    @cached_property
    def _agreed(self) -> set[str]:
        return set()


def agree(group: Any, kind: str, facts: Sequence[int], trouble: str | None = None) -> None:
    """See SequenceSplit.agree."""
    rank = dist.get_rank(group)
    where = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    digest = hashlib.sha256(repr(list(facts)).encode()).digest()
    said = torch.tensor([trouble is None, *struct.unpack("<3q", digest[:24])], dtype=torch.int64, device=where)
    heard = said.new_empty(dist.get_world_size(group), len(said))
    _all_gather(heard.view(-1), said, group=group)
    rows = heard.tolist()
    if trouble:
        raise ValueError(trouble)
    if refused := [other for other, row in enumerate(rows) if not row[0]]:
        raise ValueError(
            f"{kind}: rank {refused[0]} of the group refused its part and says why; rank {rank} stops, too"
        )
    if different := [other for other, row in enumerate(rows) if row != rows[0]]:
        mine = ", ".join(map(str, facts[:8])) + (", ..." if len(facts) > 8 else "")
        raise ValueError(
            f"{kind}: rank {different[0]} of the group came with something else than rank 0 (rank {rank} has {mine}); every "
            "rank must give the same sizes, dtypes and borders of documents"
        )


def split_sequence(
    tokens: int,
    group: Any = None,
    *,
    layout: Literal["contiguous", "zigzag"] = "contiguous",
    cu_seqlens: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    segments: int = 1,
    align: int = ALIGN,
) -> SequenceSplit:
    """Share the tokens of a sequence, or of documents packed in one, among the ranks of a group.

    Every rank calls it with the same arguments, which it proves before anything is computed; that waits for all of them.

    Args:
        tokens: of the whole sequence.
        group: a `torch.distributed` process group, or a DeviceMesh of one dimension; None for this process alone.
        layout: "contiguous": rank r holds the r-th part, natural for memories. "zigzag": the r-th part of 2 R and the r-th
            from the end, so that causal attention costs every rank the same.
        cu_seqlens: [N + 1] borders of packed documents, of the whole, on the CPU or a device; one document if None.
        lengths: tokens of each rank, contiguous; shares as even as can be if None. Zero is a length.
        segments: without a group: so many fragments on this one device, which then work side by side.
        align: where nothing else is said, borders between fragments are multiples of it: chunks of the kernels.

    Returns:
        The table of who holds what, for `kda(..., split=...)`, layers and models.

    Raises:
        ValueError: something does not fit, or the ranks did not come with the same; the same on every rank.
        RuntimeError: a group was given and torch.distributed is not running.

    >>> split = split_sequence(256, segments=2)
    >>> [(f.start, f.stop, f.open) for f in split.fragments]
    [(0, 128, False), (128, 256, True)]
    """
    size, rank = 1, 0
    if group is not None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "a group was given and torch.distributed is not running; start the processes by torchrun"
            )
        group = group.get_group() if hasattr(group, "get_group") else group
        size, rank = dist.get_world_size(group), dist.get_rank(group)
    trouble, documents, ranges = None, (0,), ()
    try:
        documents = _documents(tokens, cu_seqlens)
        ranges = _ranges(tokens, size, group is None, layout, lengths, segments, align)
    except (TypeError, ValueError) as error:
        trouble = str(error)
        if group is None:
            raise
    if group is not None:
        facts = [documents[-1], *documents, *(x for rank in ranges for pair in rank for x in pair)]
        agree(group, "split_sequence", facts, trouble)
    return SequenceSplit(tokens, documents, ranges, rank, group if size > 1 else None)


def _documents(tokens: int, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"tokens is {tokens!r}; expected a whole number, 1 or more")
    if cu_seqlens is None:
        return 0, tokens
    if isinstance(cu_seqlens, Tensor):
        cu_seqlens = cu_seqlens.cpu()
        last = int(cu_seqlens[-1]) if cu_seqlens.ndim == 1 and len(cu_seqlens) else tokens
        if last > tokens:
            raise ValueError(
                f"cu_seqlens ends at {last} and all ranks together hold {tokens} tokens; a document longer than that needs "
                "more ranks, or tokens of the next call"
            )
    check_cu_seqlens(cu_seqlens, 1, tokens)
    return tuple(sorted(set(borders(cu_seqlens, tokens))))  # an empty document has no piece


def _ranges(tokens, size, alone, layout, lengths, segments, align) -> tuple[tuple[tuple[int, int], ...], ...]:
    for name, number in (("segments", segments), ("align", align)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name} is {number!r}; expected a whole number, 1 or more")
    if layout not in ("contiguous", "zigzag"):
        raise ValueError(f"layout is {layout!r}; expected 'contiguous' or 'zigzag'")
    if segments > 1 and not alone:
        raise ValueError(f"segments is {segments} with a group; segments of one device are for a process alone")
    if lengths is not None:
        lengths = list(lengths)
        if layout == "zigzag" or len(lengths) != size or sum(lengths) != tokens or min(lengths) < 0:
            raise ValueError(
                f"lengths is {lengths}, layout {layout!r}; expected {size} numbers whose sum is {tokens}, and 'contiguous'"
            )
        ends = [sum(lengths[:n]) for n in range(size + 1)]
        return tuple(((a, b),) for a, b in zip(ends, ends[1:]))
    if alone:
        return (tuple(_even(tokens, segments, align)),)
    if layout == "contiguous":
        return tuple((pair,) for pair in _even(tokens, size, align))
    parts = _even(tokens, 2 * size, align)
    return tuple(
        (parts[r], parts[-1 - r]) if r < size - 1 else ((parts[r][0], parts[-1 - r][1]),)  # the middle two are one
        for r in range(size)
    )


def _even(tokens: int, parts: int, align: int) -> list[tuple[int, int]]:
    units = -(-tokens // align)
    ends = [min(tokens, align * (i * units // parts)) for i in range(parts + 1)]
    return list(zip(ends, ends[1:]))


class _Whole(torch.autograd.Function):
    """Every rank's tokens to every rank; back, the sum of what all ranks say about each token."""

    @staticmethod
    def forward(ctx, split: SequenceSplit, x: Tensor):
        ctx.split = split
        most = max(sum(b - a for a, b in ranges) for ranges in split.ranges)
        padded = x.new_zeros(most, x.shape[0], *x.shape[2:])
        padded[: x.shape[1]] = x.transpose(0, 1)
        found = split.all_gather(padded)
        parts = [found[f.rank, f.at : f.at + f.stop - f.start] for f in split.fragments]
        return torch.cat(parts).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        split, (d_whole,) = ctx.split, gradients
        if split.group is None:
            return None, split.shard(d_whole)
        if dist.get_backend(split.group) != "nccl":
            return None, split.shard(split.sum_over_ranks(d_whole))
        most = max(sum(b - a for a, b in ranges) for ranges in split.ranges)
        d_whole = d_whole.transpose(0, 1)
        sent = d_whole.new_zeros(split.size, most, *d_whole.shape[1:])
        for f in split.fragments:
            sent[f.rank, f.at : f.at + f.stop - f.start] = d_whole[f.start : f.stop]
        mine = torch.empty_like(sent[0])
        _reduce_scatter(mine.view(-1), sent.view(-1), group=split.group)
        return None, mine[: split.length].transpose(0, 1)


class _Turned(torch.autograd.Function):
    """Tokens for heads, or heads for tokens: an all-to-all, whose backward is the other one."""

    @staticmethod
    def forward(ctx, split: SequenceSplit, to_heads: bool, heads: int, x: Tensor):
        ctx.split, ctx.to_heads, ctx.heads = split, to_heads, heads
        return _turned(split, to_heads, heads, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, None, _turned(ctx.split, not ctx.to_heads, ctx.heads, gradients[0])


def _turned(split: SequenceSplit, to_heads: bool, heads: int, x: Tensor) -> Tensor:
    if split.group is None:
        return split.shard(x) if not to_heads else _in_order(split, [x])
    (B, _, _, C), ranks = x.shape, range(split.size)
    lengths = [sum(b - a for a, b in ranges) for ranges in split.ranges]
    slices = [split.heads_of(rank, heads) for rank in ranks]
    counts = [at.stop - at.start for at in slices]
    if to_heads:
        sent = [x[:, :, at] for at in slices]
        shapes = [(B, length, counts[split.rank], C) for length in lengths]
    else:
        sent = [_of_rank(split, x, rank) for rank in ranks]
        shapes = [(B, split.length, count, C) for count in counts]
    sizes = [math.prod(shape) for shape in shapes]
    found = x.new_empty(sum(sizes))
    flat = torch.cat([part.reshape(-1) for part in sent])
    dist.all_to_all_single(found, flat, sizes, [part.numel() for part in sent], group=split.group)
    parts = [part.view(shape) for part, shape in zip(found.split(sizes), shapes)]
    return _in_order(split, parts) if to_heads else torch.cat(parts, 2)


def _of_rank(split: SequenceSplit, x: Tensor, rank: int) -> Tensor:
    parts = [x[:, a:b] for a, b in split.ranges[rank]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _in_order(split: SequenceSplit, parts: list[Tensor]) -> Tensor:
    """All tokens [B, tokens, ...] of each rank's [B, L, ...]."""
    return torch.cat([parts[f.rank][:, f.at : f.at + f.stop - f.start] for f in split.fragments], 1)


class _Halo(torch.autograd.Function):
    """The last tokens before each piece, [B P, C, n], of all streams side by side; zeros before a document's first.

    The streams pass through, so that a rank whose own output does not depend on its halo still meets the others.
    """

    @staticmethod
    def forward(ctx, split: SequenceSplit, count: int, *streams: Tensor):
        ctx.split, ctx.count, ctx.widths = split, count, [x.shape[-1] for x in streams]
        B = len(streams[0])
        tails = streams[0].new_zeros(split.most_fragments * count, B, sum(ctx.widths))
        for f in split.mine:
            size = min(count, f.stop - f.start)
            stop, at = (f.slot + 1) * count, f.at + f.stop - f.start
            if size:
                tails[stop - size : stop] = torch.cat([x[:, at - size : at] for x in streams], -1).transpose(0, 1)
        found = split.all_gather(tails).flatten(0, 1)
        found = torch.cat((found, found.new_zeros(1, *found.shape[1:])))  # the last row stands before a document
        windows = found[_places(split, count, found.device)]  # [P, n, B, C]
        ctx.rows = len(found)
        windows = (
            windows.permute(2, 0, 3, 1).flatten(0, 1) if split.pieces else found.new_zeros(0, found.shape[-1], count)
        )
        ctx.set_materialize_grads(True)
        return *(x.view_as(x) for x in streams), windows

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        split, count = ctx.split, ctx.count
        *d_streams, d_windows = gradients
        B = len(d_streams[0])
        d_found = d_windows.new_zeros(ctx.rows, B, d_windows.shape[1])
        if split.pieces and count:
            d_rows = d_windows.unflatten(0, (B, -1)).permute(1, 3, 0, 2)  # [P, n, B, C]
            d_found.index_add_(0, _places(split, count, d_found.device).flatten(), d_rows.flatten(0, 1))
        d_found = split.sum_over_ranks(d_found[:-1]).unflatten(0, (split.size, -1))[split.rank] if count else d_found
        d_streams = [d.clone() for d in d_streams]
        for f in split.mine:
            size = min(count, f.stop - f.start)
            stop, at = (f.slot + 1) * count, f.at + f.stop - f.start
            if size:
                parts = d_found[stop - size : stop].transpose(0, 1).split(ctx.widths, -1)
                for d, part in zip(d_streams, parts):
                    d[:, at - size : at] += part
        return None, None, *d_streams


def _places(split: SequenceSplit, count: int, device: torch.device) -> Tensor:
    """[P, count]: where the tokens before each piece lie among the gathered tails; the row after all of them for none."""
    key = "halo", count, device
    if key not in split._kept:
        where, slots = {}, split.most_fragments
        for f in split.fragments:
            for t in range(max(f.start, f.stop - count), f.stop):
                where[t] = ((f.rank * slots) + f.slot + 1) * count - (f.stop - t)
        none = split.size * slots * count
        rows = [[where[t] if t >= p.document else none for t in range(p.start - count, p.start)] for p in split.pieces]
        split._kept[key] = torch.tensor(rows, dtype=torch.long).view(len(rows), count).to(device)
    return split._kept[key]
