"""The way back: states kept now and then, and the tokens between them.

A memory cannot be run backwards, so going back means reading again from a kept state, over at most `every` - 1 tokens.
The latent caches only grow; of them a checkpoint keeps the length alone, and all checkpoints share the one cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from palimpsest.layers.layer_state import LayerState
from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM
from palimpsest.models.kimi_linear.model_state import ModelState


@dataclass(frozen=True)
class Checkpoint:
    """A state without its latent caches.

    Attributes:
        layers: what each layer's state needs to become that one again: a memory as it was, the length of a latent cache.
        position: [B], tokens read.
        segments: what was read after it, up to the next checkpoint, call by call; each [B, n], or [B] for one step.
    """

    layers: tuple[Any, ...]
    position: Tensor
    segments: tuple[Tensor, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens read after it."""
        return sum(map(_count, self.segments))

    def state(self, latest: ModelState) -> ModelState:
        """A copy of the state that was kept, its latent caches cut from those of a later state."""
        layers = (now.back_to(kept) for kept, now in zip(self.layers, latest.layers, strict=True))
        return ModelState(tuple(layers), self.position)


@dataclass(frozen=True)
class StateHistory:
    """The last states of a long run: a value like the states it holds. Make one with `StateHistory.start`.

    Going back reads the same tokens in the same calls as before, so at the end of any of them it gives the same bits.

    Attributes:
        latest: the state after everything recorded.
        every: tokens between two checkpoints.
        keep: checkpoints kept; older ones are dropped.
        checkpoints: oldest first.

    >>> from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
    >>> model = KimiLinearForCausalLM(KimiLinearConfig.tiny()).eval()
    >>> history = StateHistory.start(ModelState.empty(model.config), every=16, keep=4)
    >>> logits, history = history.read(model, torch.arange(100)[None])
    >>> [int(c.position) for c in history.checkpoints]
    [48, 64, 80, 96]
    >>> state, history = history.rollback(model, 70)
    >>> int(state.position)
    70
    """

    latest: ModelState
    every: int = 64
    keep: int = 8
    checkpoints: tuple[Checkpoint, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("keep", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number >= {least}")

    @classmethod
    def start(cls, state: ModelState, *, every: int = 64, keep: int = 8) -> StateHistory:
        """A history that begins at state, the furthest that can be gone back."""
        return cls(state, every, keep, (_checkpoint(state),))

    @property
    def capacity(self) -> int:
        """Tokens that may be recorded at once, up to the next checkpoint."""
        return self.every - self.checkpoints[-1].num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes that the checkpoints hold beside the latest state."""
        kept = (layer for checkpoint in self.checkpoints for layer in checkpoint.layers)
        return sum(x.nbytes for layer in kept if isinstance(layer, LayerState) for x in layer.tensors().values())

    def record(self, state: ModelState, tokens: Tensor) -> StateHistory:
        """The history one call later.

        Args:
            state: the state after the call.
            tokens: [B, n], what the forward call read, n at most `capacity`; [B], what `step_` read; no padding.

        Raises:
            ValueError: more tokens than fit, or state is not n tokens after the latest one.
        """
        n, B = _count(tokens), self.latest.batch_size
        if tokens.ndim not in (1, 2) or len(tokens) != B or not 1 <= n <= self.capacity:
            raise ValueError(
                f"tokens has shape {tuple(tokens.shape)}; expected [{B}, n] with n from 1 to {self.capacity}, the tokens left "
                f"before the next checkpoint, or [{B}] for a step"
            )
        if state.position.tolist() != [position + n for position in self.latest.position.tolist()]:
            raise ValueError(
                f"the state is at position {state.position.tolist()}; the latest recorded is at "
                f"{self.latest.position.tolist()} and {n} tokens came, without padding"
            )
        last = self.checkpoints[-1]
        checkpoints = (*self.checkpoints[:-1], replace(last, segments=(*last.segments, tokens)))
        if checkpoints[-1].num_tokens == self.every:
            checkpoints = (*checkpoints, _checkpoint(state))[-self.keep :]
        return replace(self, latest=state, checkpoints=checkpoints)

    @torch.no_grad()
    def read(self, model: KimiLinearForCausalLM, tokens: Tensor) -> tuple[Tensor, StateHistory]:
        """Read tokens [B, n], n >= 1, with a checkpoint wherever one is due: the last logits [B, N] and the history."""
        history, logits = self, None
        while tokens.shape[1]:
            now, tokens = tokens.split(
                [min(history.capacity, tokens.shape[1]), max(0, tokens.shape[1] - history.capacity)], 1
            )
            output = model(now, state=history.latest, last_only=True)
            history, logits = history.record(output.state, now), output.logits[:, -1]
        if logits is None:
            raise ValueError("tokens is empty; give at least one token per sequence")
        return logits, history

    @torch.no_grad()
    def rollback(self, model: KimiLinearForCausalLM, position: int) -> tuple[ModelState, StateHistory]:
        """The state at an earlier position, and the history that ends there.

        Args:
            position: tokens read by the first sequence; the others go back as far as it does.

        Raises:
            ValueError: position lies after the latest state or before the oldest checkpoint.
        """
        now, oldest = int(self.latest.position[0]), int(self.checkpoints[0].position[0])
        if not oldest <= position <= now:
            raise ValueError(
                f"position is {position}; this history goes from {oldest} to {now}, "
                "and further back with a larger every or keep"
            )
        kept = [c for c in self.checkpoints if int(c.position[0]) <= position]
        from_here, missing = kept[-1], position - int(kept[-1].position[0])
        state = from_here.state(self.latest)
        history = replace(self, latest=state, checkpoints=(*kept[:-1], replace(from_here, segments=())))
        for segment in from_here.segments:
            if not missing:
                break
            if segment.ndim == 1:
                tokens, (_, after) = segment, model.step_(segment, history.latest.snapshot())
            else:
                tokens = segment[:, :missing]
                after = model(tokens, state=history.latest, last_only=True).state
            missing -= _count(tokens)
            history = history.record(after, tokens)
        return history.latest, history


def _count(segment: Tensor) -> int:
    return 1 if segment.ndim == 1 else segment.shape[1]


def _checkpoint(state: ModelState) -> Checkpoint:
    return Checkpoint(tuple(layer.bookmark() for layer in state.layers), state.position)
