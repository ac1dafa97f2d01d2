"""A latent cache at an address that stays: room for the tokens to come, and its length on the device.

Letters as in layers/layer_state.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.layers.layer_state import LatentState


@dataclass(frozen=True)
class LatentCache:
    """What `LatentState` holds, rewritten in place, so that a step needs neither a new shape nor a look at the host.

    Attributes:
        rows: [B, capacity, C]; row b holds its tokens from the left without gaps, and finite numbers behind them.
        length: [B], int64, tokens of each sequence. One beyond the capacity would overwrite the last: whoever steps
            keeps count.

    >>> cache = LatentCache.of(LatentState(torch.ones(2, 3, 4)), capacity=5)
    >>> cache.append_(torch.zeros(2, 4))
    >>> cache.length, cache.value([0, 1], [4, 4]).latent.shape
    (tensor([4, 4]), torch.Size([2, 4, 4]))
    """

    rows: Tensor
    length: Tensor

    @classmethod
    def of(cls, state: LatentState, capacity: int) -> LatentCache:
        """A copy of state with room for `capacity` tokens in all, at least as many as it holds."""
        B, _, C = state.latent.shape
        cache = cls(
            state.latent.new_zeros(B, capacity, C), torch.zeros(B, device=state.latent.device, dtype=torch.long)
        )
        cache.load_(state)
        return cache

    def load_(self, state: LatentState) -> None:
        """Take over a state of as many sequences, in place."""
        self.length.copy_(state.num_tokens())
        if state.valid is None:
            self.rows[:, : state.latent.shape[1]] = state.latent
        else:
            for b, row in enumerate(state.rows()):
                self.rows[b, : len(row)] = row

    def append_(self, latent: Tensor, mask: Tensor | None = None) -> None:
        """One more row a sequence, [B, C]; where mask [B] is False it is not kept."""
        B, capacity, _ = self.rows.shape
        at_B = self.length.clamp(max=capacity - 1)
        self.rows.index_put_((torch.arange(B, device=latent.device), at_B), latent)
        self.length.add_(1 if mask is None else mask)

    def value(self, sequences: Sequence[int], lengths: Sequence[int]) -> LatentState:
        """Some of the sequences as a plain state, a copy; their lengths from one who has counted."""
        index = torch.tensor(list(sequences), device=self.rows.device)
        latent = self.rows[:, : max(lengths)].index_select(0, index)
        if len(set(lengths)) == 1:
            return LatentState(latent)
        at = torch.arange(latent.shape[1], device=latent.device)
        return LatentState(latent, at < torch.tensor(list(lengths), device=latent.device)[:, None])
