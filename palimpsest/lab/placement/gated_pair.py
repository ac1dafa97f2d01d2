"""Both mixers in one layer, and gates of all layers that share a budget of attention."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from palimpsest.checks import check

SHARP = 10.0  # AdamW moves a gate's parameter by its rate a step, whatever the gradient: so 1,000 steps can decide


class AttentionBudget(nn.Module):
    """How much of each layer is attention: shares that add up to a budget.

    Args:
        layers: how many. budget: of attention layers, what the shares add up to.
        decide: weight of the penalty that is 0 only where each share is all or nothing.

    >>> AttentionBudget(4, budget=1.0)()
    tensor([0.2500, 0.2500, 0.2500, 0.2500], grad_fn=<ClampBackward1>)
    """

    def __init__(self, layers: int, budget: float = 1.0, decide: float = 0.05):
        super().__init__()
        check(0 < budget < layers, f"budget is {budget}; give more than 0 and less than the {layers} layers")
        self.budget, self.decide = budget, decide
        self.weight = nn.Parameter(torch.zeros(layers))

    def forward(self) -> Tensor:
        """[layers], each from 0 to 1."""
        return (self.budget * (SHARP * self.weight).softmax(0)).clamp(max=1.0)

    def penalty(self) -> Tensor:
        """A scalar for the loss."""
        share = self()
        return self.decide * (share * (1 - share)).sum()


class GatedPair(nn.Module):
    """y = (1 - g) memory(x) + g attention(x), g this layer's share of the budget.

    Args:
        memory, attention: the two mixers, as a layer of the model has them.
        budget: of all layers. layer: which this is.
    """

    def __init__(self, memory: nn.Module, attention: nn.Module, budget: AttentionBudget, layer: int):
        super().__init__()
        self.memory, self.attention, self.layer = memory, attention, layer
        self._budget = [budget]  # the model's, not this layer's own: its parameters are counted once

    def without_state(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """y [B, T, D] of x [B, T, D]."""
        return self(x, cu_seqlens=cu_seqlens)[0]

    def forward(self, x: Tensor, state: None = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, None]:
        """As of a mixer, but nobody continues from it: a pair is pruned before it generates."""
        gate = self._budget[0]()[self.layer].to(x.dtype)
        held = self.memory(x, cu_seqlens=cu_seqlens)[0]
        looked = self.attention(x, cu_seqlens=cu_seqlens)[0]
        return (1 - gate) * held + gate * looked, None


def pair_up(memories: nn.Module, attentions: nn.Module, budget: float = 1.0) -> AttentionBudget:
    """Gives every layer of a model the mixer of the same layer of another beside its own.

    Args:
        memories: a causal model of memory layers; changed. attentions: one of as many attention layers; used up.
        budget: of attention layers.

    Returns:
        The budget, which is now a part of the first model.
    """
    layers, others = (list(cast(nn.ModuleList, m.model.layers)) for m in (memories, attentions))  # type: ignore[union-attr]
    shared = AttentionBudget(len(layers), budget)
    for i, (layer, other) in enumerate(zip(layers, others)):
        layer.self_attn = GatedPair(layer.self_attn, other.self_attn, shared, i)  # type: ignore[arg-type]
    memories.attention_budget = shared
    return shared
