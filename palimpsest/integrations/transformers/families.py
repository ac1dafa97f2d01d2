"""The native models of transformers that keep a delta-rule memory, and how to read one of their layers.

A layer of any family is the same six steps: project, convolve, gate, remember, normalise under a gate, project back.
Families differ in which projections are fused and what the gate is called; the functions here say that and nothing more.

    B sequences, T tokens, H key heads, HV value heads, K and V their channels, D = 2 H K + H_V V channels convolved
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palimpsest.ops.gates import SigmoidDecay, SoftplusDecay


class Logits(NamedTuple):
    """What a layer says about each token before anything is convolved or squashed."""

    mixed: Tensor  # [B, T, D]: q, k and v side by side, on their way to the convolution
    decay: Tensor  # [B, T, H, K] for KDA, [B, T, HV] for one decay a head
    beta: Tensor  # [B, T, HV]
    gate: Tensor  # [B, T, HV, V]: of the way out


class Heads(NamedTuple):
    """H, HV, K and V of a layer."""

    keys: int
    values: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Family:
    """One native model.

    Attributes:
        model_type: its name in transformers, and of its folder there.
        layer, model, pretrained: names of its classes: the memory layer, the stack of layers, the base of all its models.
        logits: reads a layer.
        decay: the layer's gate, a function from decay logits to log decays; KDA's are values that a kernel takes whole.
        norm, way_out: names of the layer's gated norm and last projection.
        apart: its other layers keep packed documents apart when told where they begin.
        latent: its attention has keys wider than its values.
    """

    model_type: str
    layer: str
    model: str
    pretrained: str
    logits: Callable[[Any, Tensor], Logits]
    decay: Callable[[Any], Callable[[Tensor], Tensor]]
    norm: str = "o_norm"
    way_out: str = "o_proj"
    apart: bool = True
    latent: bool = False

    @property
    def module(self) -> str:
        """Where transformers keeps it."""
        return f"transformers.models.{self.model_type}.modeling_{self.model_type}"


def heads(layer) -> Heads:
    """The sizes of a layer's memory."""
    if hasattr(layer, "num_v_heads"):
        return Heads(layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)
    return Heads(layer.num_heads, layer.num_heads, layer.head_dim, layer.head_dim)


def _kda_logits(layer, x: Tensor) -> Logits:
    shape = (*x.shape[:2], layer.num_heads, layer.head_dim)
    mixed = torch.cat((layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)), -1)
    forget = layer.forget_gate
    decay = forget.f_proj(x) if hasattr(forget, "f_proj") else forget.f_b_proj(forget.f_a_proj(x))
    gate = layer.g_proj(x) if hasattr(layer, "g_proj") else layer.g_b_proj(layer.g_a_proj(x))
    return Logits(mixed, decay.view(shape), layer.b_proj(x), gate.view(shape))


def _kda_decay(layer) -> Callable[[Tensor], Tensor]:
    forget = layer.forget_gate
    floor = getattr(forget, "safe_gate_lower_bound", None)
    if getattr(forget, "safe_gate", False):
        floor = forget.lower_bound
    if floor is None:
        return SoftplusDecay(forget.A_log, forget.dt_bias)
    return SigmoidDecay(forget.A_log, forget.dt_bias, float(floor))


def _head_decay(layer) -> Callable[[Tensor], Tensor]:
    def log_decay(logits: Tensor) -> Tensor:
        return -layer.A_log.float().exp() * torch.nn.functional.softplus(logits.float() + layer.dt_bias.float())

    return log_decay


def _qwen3_next_logits(layer, x: Tensor) -> Logits:
    q, k, v, z, b, a = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x), layer.in_proj_ba(x))
    return Logits(torch.cat([y.flatten(2) for y in (q, k, v)], -1), a, b, z)


def _qwen3_5_logits(layer, x: Tensor) -> Logits:
    z = layer.in_proj_z(x).unflatten(-1, (layer.num_v_heads, layer.head_v_dim))
    return Logits(layer.in_proj_qkv(x), layer.in_proj_a(x), layer.in_proj_b(x), z)


def _olmo_logits(layer, x: Tensor) -> Logits:
    mixed = torch.cat((layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)), -1)
    gate = layer.g_proj(x).unflatten(-1, (layer.num_v_heads, layer.head_v_dim))
    return Logits(mixed, layer.a_proj(x), layer.b_proj(x), gate)


def _kda(model_type: str, prefix: str, layer: str, model: str, apart: bool = True) -> Family:
    pretrained = f"{prefix}PreTrainedModel"
    return Family(model_type, layer, model, pretrained, _kda_logits, _kda_decay, apart=apart, latent=apart)


def _qwen(model_type: str, prefix: str, text: str, logits=_qwen3_5_logits) -> Family:
    names = (f"{prefix}GatedDeltaNet", f"{prefix}{text}Model", f"{prefix}PreTrainedModel")
    return Family(model_type, *names, logits, _head_decay, norm="norm", way_out="out_proj")


FAMILIES = {
    family.model_type: family
    for family in (
        _kda("kimi_linear", "KimiLinear", "KimiLinearDeltaAttention", "KimiLinearModel"),
        _kda("bailing_hybrid", "BailingHybrid", "BailingHybridDeltaAttention", "BailingHybridModel"),
        _kda("glm5_next", "Glm5Next", "Glm5NextTextLinearAttention", "Glm5NextTextModel", apart=False),
        _qwen("qwen3_next", "Qwen3Next", "", _qwen3_next_logits),
        _qwen("qwen3_5", "Qwen3_5", "Text"),
        _qwen("qwen3_5_moe", "Qwen3_5Moe", "Text"),
        Family(
            "olmo_hybrid", "OlmoHybridGatedDeltaNet", "OlmoHybridModel", "OlmoHybridPreTrainedModel", _olmo_logits, _head_decay
        ),
    )
}  # fmt: skip
