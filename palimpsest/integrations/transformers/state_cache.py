"""A model's state in the shape of transformers' cache: it reorders, forks and goes back, exactly."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from palimpsest.models.kimi_linear.model_state import ModelState

KEPT_WHILE_RECORDING = 64  # calls that can be taken back


class Call(NamedTuple):
    """What one forward read, and the state before it."""

    before: ModelState | None
    ids: Tensor  # [B, n]
    mask: Tensor | None


class StateCache(Cache):
    """The state of `PalimpsestForCausalLM` between calls.

    A memory cannot be run backwards. Taking tokens back returns to the state before the call that read them, and the
    tokens of that call that stay are read again with the next one: the same function of the same text.

    Attributes:
        state: after everything read; None before the first token.
        pending: tokens that are still to be read again, [B, n], or None.
    """

    def __init__(self):
        super().__init__(layers=[])
        self.state: ModelState | None = None
        self.pending: Tensor | None = None
        self.tokens = 0
        self.keep = 1
        self.calls: list[Call] = []

    def read(self, before: ModelState | None, ids: Tensor, mask: Tensor | None, after: ModelState) -> None:
        """Note a call of the model."""
        self.calls = [*self.calls, Call(before, ids, mask)][-self.keep :]
        self.state, self.pending = after, None
        self.tokens += ids.shape[1]

    def take(self) -> tuple[ModelState | None, Tensor | None]:
        """The state to go on from, and the tokens to read before any new ones."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self.tokens -= pending.shape[1]
        return self.state, pending

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove tokens; a positive number is the length to be left.

        Raises:
            RuntimeError: they were read before the calls that are kept.
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else self.tokens - tokens_to_remove
        if count <= 0:
            return
        if self.pending is not None:  # taken back further before it was read again
            left = max(self.pending.shape[1] - count, 0)
            count -= self.pending.shape[1] - left
            self.tokens -= self.pending.shape[1] - left
            self.pending = self.pending[:, :left] if left else None
        while count:
            if not self.calls:
                raise RuntimeError(
                    f"{count} tokens more were to be taken back than are kept; call activate_past_recording() before reading"
                )
            call = self.calls[-1]
            self.calls = self.calls[:-1]
            left = max(call.ids.shape[1] - count, 0)
            if left and call.mask is not None and not bool(call.mask[:, :left].all()):
                raise RuntimeError(
                    "the tokens to be taken back were read with padding, in one call; crop between calls"
                )
            count -= call.ids.shape[1] - left
            self.tokens -= call.ids.shape[1] - left
            self.state, self.pending = call.before, call.ids[:, :left] if left else None

    def activate_past_recording(self) -> None:
        self.keep = KEPT_WHILE_RECORDING

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        return self.keep > 1

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_sliding(self) -> list[bool]:
        return []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def reset(self) -> None:
        self.state, self.pending, self.tokens, self.calls = None, None, 0, []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self._select([row for row in range(self.state.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(self.state.batch_size)[indices.cpu()].tolist() if self.state is not None else [])

    def _select(self, rows: list[int]) -> None:
        if self.state is None:
            return
        index = torch.tensor(rows, device=self.state.device)
        pick: Any = lambda x: None if x is None else x.index_select(0, index)
        self.state, self.pending = self.state.select(rows), pick(self.pending)
        self.calls = [
            Call(None if call.before is None else call.before.select(rows), pick(call.ids), pick(call.mask))
            for call in self.calls
        ]

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __repr__(self) -> str:
        return f"StateCache({self.tokens} tokens)"
