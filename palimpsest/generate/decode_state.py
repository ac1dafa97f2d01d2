"""Sequences between two tokens, as a value: to continue, to fork, to save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.model_state import ModelState
from palimpsest.models.kimi_linear.state_file import read_state, save_state


@dataclass(frozen=True)
class DecodeState:
    """Sequences that have been read and can go on.

    Attributes:
        state: after all tokens.
        logits: [B, N], for the next token.
        seen: [B, N] bool, the tokens that occurred; for the repetition penalty.
    """

    state: ModelState
    logits: Tensor
    seen: Tensor

    def select(self, rows: Sequence[int]) -> DecodeState:
        """Some of the sequences, in the order given; a sequence may occur more than once."""
        index = torch.tensor(list(rows), device=self.logits.device)
        return DecodeState(self.state.select(rows), self.logits[index], self.seen[index])

    @staticmethod
    def join(parts: Sequence[DecodeState]) -> DecodeState:
        """Several as one batch."""
        state = ModelState.join([part.state for part in parts])
        return DecodeState(state, torch.cat([p.logits for p in parts]), torch.cat([p.seen for p in parts]))

    def save(self, path: str | Path, model: KimiLinearForCausalLM) -> None:
        """Write everything to a file; errors as `state_file.save_state`."""
        save_state(path, self.state, model, extra={"logits": self.logits, "seen": self.seen})

    @staticmethod
    def load(path: str | Path, model: KimiLinearForCausalLM) -> DecodeState:
        """Read what `save` wrote; errors as `state_file.load_state`."""
        state, extra = read_state(path, model)
        if extra.keys() != {"logits", "seen"}:
            raise ValueError(f"{str(path)!r} holds a state alone; load it with load_state and give a prompt")
        return DecodeState(state, extra["logits"], extra["seen"])

    @staticmethod
    def before(state: ModelState, vocab_size: int, seen: Tensor | None = None) -> DecodeState:
        """A state before its prompt: the logits are unknown, and so NaN, until a token is read."""
        shape = (state.batch_size, vocab_size)
        if seen is None:
            seen = torch.zeros(shape, dtype=torch.bool, device=state.device)
        return DecodeState(state, torch.full(shape, torch.nan, device=state.device), seen)
