"""What a layer remembers between calls: plain values, passed in and handed out.

Letters  B sequences, H heads, K key channels, V value channels, D = H K channels of a convolution, W its width,
         S tokens held, T tokens to append, C = R + P: R latent channels beside P position channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class LayerState:
    """The base of every layer's state, those of layers from outside included.

    A subclass is a frozen dataclass; its fields are tensors, tuples of tensors, or None, and the first dimension of each
    tensor counts the sequences. That alone lets a model copy, fork, join, move, save and roll it back. A subclass
    overrides what it can do better: a cache that only grows need not be copied.

    Attributes:
        kind: a word for tables.
        in_place: `step_` rewrites these very tensors, and their shapes stay.
        in_heads: `finite` tells heads apart.

    >>> @dataclass(frozen=True)
    ... class Average(LayerState):
    ...     total: Tensor  # [B, D]
    >>> state = Average(torch.ones(2, 3))
    >>> list(state.tensors()), state.select(torch.tensor([0, 0, 1])).total.shape
    (['total'], torch.Size([3, 3]))
    """

    kind: ClassVar[str] = "state"
    in_place: ClassVar[bool] = False
    in_heads: ClassVar[bool] = False

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, those of a tuple numbered: {"memory": ..., "conv.0": ..., "conv.1": ...}."""
        named: dict[str, Tensor] = {}
        for name, value in self._values().items():
            if isinstance(value, tuple):
                named |= {f"{name}.{i}": tensor for i, tensor in enumerate(value)}
            elif value is not None:
                named[name] = value
        return named

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> Self:
        """The state that `tensors` names so.

        Raises:
            ValueError: a tensor is missing, or one is unknown.
        """
        values: dict[str, Any] = {}
        rest = dict(named)
        for f in dataclasses.fields(cls):  # type: ignore[arg-type]
            if "tuple" in str(f.type):
                count = sum(name.rpartition(".")[0] == f.name for name in rest)
                values[f.name] = tuple(rest.pop(f"{f.name}.{i}", None) for i in range(count))
                missing = any(x is None for x in values[f.name])
            else:
                values[f.name] = rest.pop(f.name, None)
                missing = values[f.name] is None and "None" not in str(f.type)
            if missing:
                raise ValueError(f"a {cls.__name__} needs a tensor {f.name!r}; there are {', '.join(named) or 'none'}")
        if rest:
            raise ValueError(f"a {cls.__name__} has no tensor {next(iter(rest))!r}")
        return cls(**values)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The state with every tensor changed."""
        values = self._values().items()
        return type(self)(
            **{
                name: tuple(map(change, value))
                if isinstance(value, tuple)
                else None
                if value is None
                else change(value)
                for name, value in values
            }
        )

    def copy(self) -> Self:
        """One that no `step_` on this one changes."""
        return self.map(Tensor.clone)

    def select(self, index: Tensor) -> Self:
        """The sequences of index [n], a copy."""
        return self.map(lambda x: x.index_select(0, index))

    @classmethod
    def join(cls, states: Sequence[Any]) -> Self:
        """The sequences of several states as one batch."""
        named = [state.tensors() for state in states]
        return cls.from_tensors({name: torch.cat([tensors[name] for tensors in named]) for name in named[0]})

    def bookmark(self) -> Any:
        """What a later state needs to become this one again, see `back_to`: a copy, where nothing smaller will do."""
        return self.copy()

    def back_to(self, bookmark: Any) -> Self:
        """The earlier state that gave the bookmark; this one came of it by reading on. A copy."""
        return bookmark.copy()

    def form(self) -> str:
        """Kind, shapes without the batch and types: what must agree between states of one model."""
        return f"a {type(self).__name__}" + "".join(
            f", {name} {tuple(x.shape[1:])} {dtype_name(x)}" for name, x in self.tensors().items()
        )

    def finite(self) -> Tensor:
        """Where all is finite: [B, H] for a state in heads, [B, 1] for another."""
        return torch.stack([x.isfinite().flatten(1).all(1) for x in self.tensors().values()]).all(0)[:, None]

    def account(self) -> dict[str, int]:
        """Bytes, under the names of `LayerBytes`."""
        return {"memory": sum(x.nbytes for x in self.tensors().values())}

    def _values(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class KDAState(LayerState):
    """The memory of one memory layer: constant in size, whatever the length.

    Attributes:
        memory: [B, H, K, V], float32 (float64 in a float64 model).
        conv: the last W - 1 inputs of the q, k and v convolutions, oldest first, each [B, D, W - 1]; () without
            convolutions.
    """

    kind: ClassVar[str] = "kda"
    in_place: ClassVar[bool] = True
    in_heads: ClassVar[bool] = True

    memory: Tensor
    conv: tuple[Tensor, ...]

    def form(self) -> str:
        windows = "".join(f", a window {tuple(x.shape[1:])} {dtype_name(x)}" for x in self.conv)
        return f"a memory {tuple(self.memory.shape[1:])} {dtype_name(self.memory)}{windows}"

    def finite(self) -> Tensor:
        finite_BH = self.memory.isfinite().flatten(2).all(-1)
        for window in self.conv:
            in_heads = window.unflatten(1, (-1, self.memory.shape[1], self.memory.shape[2]))
            finite_BH = finite_BH & in_heads.isfinite().all(-1).all(-1).all(1)
        return finite_BH

    def account(self) -> dict[str, int]:
        return {"memory": self.memory.nbytes, "windows": sum(window.nbytes for window in self.conv)}


@dataclass
class CacheBuffer:
    """Rows behind a latent, with space to grow. Nobody rewrites a row that is filled, so older states stay true."""

    rows: Tensor  # [B, capacity, C]
    end: list[int]  # one number, how many rows are filled; nothing while a thread is claiming more

    def claim(self, start: int, count: int) -> bool:
        """Whether rows start .. start + count are now the caller's to write.

        Taking the one number out of a list happens whole or not at all, so of two threads that go on from one state one
        gets the rows; the other finds nothing, or another number, and makes a copy.
        """
        try:
            end = self.end.pop()
        except IndexError:
            return False
        mine = end == start and start + count <= self.rows.shape[1]
        self.end.append(start + count if mine else end)
        return mine


@dataclass(frozen=True)
class LatentState(LayerState):
    """The cache of one latent attention layer: one latent row a token, shared by all heads.

    Attributes:
        latent: [B, S, R + P], the normalised latent beside the position channels of the key; often a view of `buffer`.
        valid: [B, S], True where a row is a token and not padding; None when every row is.
        buffer: spare rows behind latent, None if there are none; never needed to tell what the state holds.
    """

    kind: ClassVar[str] = "latent"

    latent: Tensor
    valid: Tensor | None = None
    buffer: CacheBuffer | None = field(default=None, repr=False, compare=False)

    def num_tokens(self) -> Tensor:
        """Tokens of each sequence, [B]."""
        B, S, _ = self.latent.shape
        if self.valid is None:
            return torch.full((B,), S, device=self.latent.device)
        return self.valid.sum(1)

    def rows(self) -> list[Tensor]:
        """The tokens of each sequence without padding, [S_b, C] each."""
        if self.valid is None:
            return list(self.latent)
        return [latent[valid] for latent, valid in zip(self.latent, self.valid)]

    @classmethod
    def of_rows(cls, rows: list[Tensor]) -> LatentState:
        """One state from sequences of different lengths, [S_b, C] each: padded on the right."""
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        latent = pad_sequence(rows, batch_first=True)
        valid = torch.arange(latent.shape[1], device=latent.device) < lengths[:, None]
        return cls(latent, None if len({len(row) for row in rows}) == 1 else valid)

    @classmethod
    def of_packed(cls, rows: Tensor, ends: list[int]) -> LatentState:
        """One state from sequences end to end, [T, C], borders as in cu_seqlens: padded on the right.

        >>> LatentState.of_packed(torch.ones(3, 1), [0, 1, 3]).valid
        tensor([[ True, False],
                [ True,  True]])
        """
        starts = torch.tensor(ends, device=rows.device)
        most = max(b - a for a, b in zip(ends, ends[1:]))
        if all(b - a == most for a, b in zip(ends, ends[1:])):
            return cls(rows.unflatten(0, (len(ends) - 1, most)))
        at = torch.arange(most, device=rows.device)
        valid = at < starts.diff()[:, None]
        latent = rows[(starts[:-1, None] + at).clamp(max=len(rows) - 1)]
        return cls(torch.where(valid[..., None], latent, 0), valid)

    def append(self, latent: Tensor, valid: Tensor | None = None) -> LatentState:
        """The state with T more rows, [B, T, C]; valid [B, T] says which of them are tokens, all if None.

        This state keeps its value. With gradients off, the rows go into the spare rows that the last append left; with
        gradients on into a new tensor, since attention may have kept the old one for its backward pass.
        """
        S, T = self.latent.shape[1], latent.shape[1]
        if self.valid is not None or valid is not None:
            old, new = (
                torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if v is None else v
                for x, v in ((self.latent, self.valid), (latent, valid))
            )
            valid = torch.cat([old, new], dim=1)
        if torch.is_grad_enabled():
            return LatentState(torch.cat([self.latent, latent], dim=1), valid)

        buffer = self._buffer_for(latent)
        buffer.rows[:, S : S + T] = latent
        return LatentState(buffer.rows[:, : S + T], valid, buffer)

    def _buffer_for(self, latent: Tensor) -> CacheBuffer:
        """A buffer that begins with this state's rows, with the next ones claimed: its own if they are free, or a copy."""
        buffer, S, count = self.buffer, self.latent.shape[1], latent.shape[1]
        if (
            buffer is not None
            and buffer.rows.data_ptr() == self.latent.data_ptr()
            and buffer.rows.shape[0] == len(latent)
            and buffer.rows.dtype == latent.dtype
            and (torch.is_inference_mode_enabled() or not buffer.rows.is_inference())  # torch forbids such writes
            and buffer.claim(S, count)
        ):
            return buffer
        capacity = S + count + max(64, S // 8)  # an eighth more: few copies, little waste
        rows = latent.new_empty(len(latent), capacity, latent.shape[2])
        rows[:, :S] = self.latent
        return CacheBuffer(rows, [S + count])

    # As a state of a model: caches are shared, since no step rewrites a row of theirs.

    def tensors(self) -> dict[str, Tensor]:
        return {"latent": self.latent, "valid": self._all_valid()}

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> LatentState:
        if named.keys() != {"latent", "valid"}:
            raise ValueError(f"a LatentState has the tensors latent and valid; there are {', '.join(named) or 'none'}")
        latent, valid = named["latent"], named["valid"]
        if valid.dtype != torch.bool or valid.shape != latent.shape[:2]:
            raise ValueError(
                f"valid is {valid.dtype} of shape {tuple(valid.shape)}; expected torch.bool of shape {tuple(latent.shape[:2])}"
            )
        return cls(latent, None if valid.all() else valid)

    def map(self, change: Callable[[Tensor], Tensor]) -> LatentState:
        return LatentState(change(self.latent), None if self.valid is None else change(self.valid))

    def copy(self) -> LatentState:
        return self

    def select(self, index: Tensor) -> LatentState:
        picked = super().select(index)
        return picked if picked.valid is None else LatentState.of_rows(picked.rows())

    @classmethod
    def join(cls, states: Sequence[Any]) -> LatentState:
        return cls.of_rows([row for state in states for row in state.rows()])

    def bookmark(self) -> int:
        return self.latent.shape[1]

    def back_to(self, bookmark: int) -> LatentState:
        return LatentState(self.latent[:, :bookmark], None if self.valid is None else self.valid[:, :bookmark])

    def form(self) -> str:
        return f"a latent cache of width {self.latent.shape[-1]} {dtype_name(self.latent)}"

    def finite(self) -> Tensor:
        return (self.latent.isfinite().all(-1) | ~self._all_valid()).all(-1, keepdim=True)

    def account(self) -> dict[str, int]:
        return {
            "latent": self.latent.nbytes + (0 if self.valid is None else self.valid.nbytes),
            "spare": 0 if self.buffer is None else self.buffer.rows.nbytes - self.latent.nbytes,
            "bytes_per_token": self.latent.shape[-1] * self.latent.element_size(),
        }

    def _all_valid(self) -> Tensor:
        return torch.ones_like(self.latent[..., 0], dtype=torch.bool) if self.valid is None else self.valid
