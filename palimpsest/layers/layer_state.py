"""What a layer remembers between calls: plain values, passed in and handed out.

Letters  B sequences, H heads, K key channels, V value channels, D = H K channels of a convolution, W its width,
         S tokens held, T tokens to append, C = R + P: R latent channels beside P position channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class KDAState:
    """The memory of one KDA layer: constant in size, whatever the length.

    Attributes:
        memory: [B, H, K, V], float32 (float64 in a float64 model).
        conv: the last W - 1 inputs of the q, k and v convolutions, oldest first, each [B, D, W - 1]; () without
            convolutions.
    """

    memory: Tensor
    conv: tuple[Tensor, ...]


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
class LatentState:
    """The cache of one latent attention layer: one latent row a token, shared by all heads.

    Attributes:
        latent: [B, S, R + P], the normalised latent beside the position channels of the key; often a view of `buffer`.
        valid: [B, S], True where a row is a token and not padding; None when every row is.
        buffer: spare rows behind latent, None if there are none; never needed to tell what the state holds.
    """

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
