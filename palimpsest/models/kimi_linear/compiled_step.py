"""A token of a small model on a CPU as one compiled call: otherwise it is bound by the calls, not by the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from palimpsest.layers.kimi_delta_attention import KimiDeltaAttention
from palimpsest.layers.latent_attention import MultiHeadLatentAttention
from palimpsest.layers.latent_cache import LatentCache
from palimpsest.layers.layer_state import KDAState, LatentState
from palimpsest.layers.linears import is_plain
from palimpsest.layers.mlp import GatedMLP
from palimpsest.layers.moe import MoE
from palimpsest.layers.norms import RMSNorm
from palimpsest.layers.short_conv import ShortConvolution
from palimpsest.models.kimi_linear.unchanged import Parts
from palimpsest.ops import decode
from palimpsest.ops.gates import SigmoidDecay

if TYPE_CHECKING:
    from palimpsest.models.kimi_linear.model import DecoderLayer, KimiLinearModel

KDA = {
    "q": "q_proj", "k": "k_proj", "v": "v_proj", "f_a": "f_a_proj", "g_a": "g_a_proj", "b": "b_proj", "f_b": "f_b_proj",
    "g_b": "g_b_proj", "out": "o_proj", "q_conv": "q_conv1d", "k_conv": "k_conv1d", "v_conv": "v_conv1d",
    "o_norm": "o_norm",
}  # fmt: skip
LATENT = {
    "q": "q_proj", "kv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_b": "kv_b_proj", "out": "o_proj"
}  # fmt: skip
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


class CompiledStep:
    """The plan of a model, made anew when a weight has moved.

    A model fits whose layers are the released ones, without positions, in fp32 on a CPU, with plain projections that nobody
    watches. For others, and for batches too large for it, `run` gives None and the layers run one by one.
    """

    def __init__(self) -> None:
        self._prepared: Prepared | None = None

    def __reduce__(self):  # addresses are not copied: a copy of the model makes its own plan
        return CompiledStep, ()

    def run(self, model: KimiLinearModel, ids: Tensor, layers: Sequence) -> tuple[Tensor, tuple] | None:
        """The hidden states [B, D] after a token and the states of the layers after it, edited in place."""
        if len(ids) > decode.MOST_COMPILED or not decode.compiled(ids) or model.training:
            return None
        prepared = self._prepared
        if prepared is None or not prepared.parts.unchanged():
            self._prepared = prepared = _prepare(model)
        if prepared.plan is None or any(isinstance(x, LatentState) and x.valid is not None for x in layers):
            return None
        states, after = [], []
        for layer in layers:
            if isinstance(layer, KDAState):
                states.append((layer.memory, layer.conv))
            elif isinstance(layer, LatentCache):
                states.append((layer.rows, layer.length))
            else:
                held = layer.latent.shape[1]
                layer = layer.append(layer.latent.new_empty(len(ids), 1, layer.latent.shape[-1]))  # the kernel fills it
                states.append((layer.latent, held))
            after.append(layer)
        x = prepared.plan.run(ids.long().contiguous(), states)
        return None if x is None else (x, tuple(after))


class Prepared(NamedTuple):
    """The plan, None if the model does not fit, and what was looked at to make it."""

    plan: Any
    parts: Parts


def _prepare(model: KimiLinearModel) -> Prepared:
    parts = Parts.of(model)
    fits = all(x.tensor.is_cpu and x.tensor.dtype == torch.float32 and x.tensor.is_contiguous() for x in parts.tensors)
    layers = (
        [_described(layer) for layer in cast("list[DecoderLayer]", model.layers)]
        if fits and not parts.watched and all(map(is_plain, parts.linears()))
        else [None]
    )
    plan = None
    if all(layers):
        plan = decode.ON_CPU["token_plan"](model.embed_tokens.weight, model.norm.weight, _sizes(model), layers)
    return Prepared(plan, parts)


def _described(layer: DecoderLayer) -> dict | None:
    """A layer as tensors by name, None if it is not one of those that the plan knows."""
    mixer, mlp = layer.self_attn, layer._channel_mixer
    described: dict = {"norm_in": layer.input_layernorm.weight, "norm_post": layer.post_attention_layernorm.weight}
    if type(mixer) is KimiDeltaAttention and mixer._steps_whole:
        names, gate, o = KDA, mixer._gate(), mixer.options
        described |= {
            "A_log": mixer.A_log,
            "dt_bias": mixer.dt_bias,
            "latent": 0,
            "H": mixer.num_heads,
            "K": mixer.head_dim,
        }
        described |= {"W": mixer.q_conv1d.weight.shape[-1], "kind": 2 if isinstance(gate, SigmoidDecay) else 1}
        described |= {"floor": getattr(gate, "floor", 0.0), "silu": o.output_gate == "silu", "beta_max": o.beta_max}
        described["eps"] = mixer.o_norm.eps
    elif type(mixer) is MultiHeadLatentAttention and mixer.rope is None:
        names, described["latent"] = LATENT, 1
    else:
        return None
    modules = {name: getattr(mixer, module) for name, module in names.items()}
    if type(mlp) is GatedMLP:
        modules |= {name: getattr(mlp, module) for name, module in MLP.items()}
        described["sparse"] = 0
    elif type(mlp) is MoE and mlp.gate.num_groups == mlp.gate.groups_per_token:
        described |= {"router": mlp.gate.weight, "bias": mlp.gate.e_score_correction_bias, "sparse": 1}
        described |= {"gate": mlp.experts.w1, "up": mlp.experts.w3, "down": mlp.experts.w2}
        if hasattr(mlp, "shared_experts"):
            modules |= {f"shared_{name}": getattr(mlp.shared_experts, module) for name, module in MLP.items()}
    else:
        return None
    if not all(type(module) in (nn.Linear, ShortConvolution, RMSNorm) for module in modules.values()):
        return None
    return described | {name: module.weight for name, module in modules.items()}


def _sizes(model: KimiLinearModel) -> dict:
    config = model.config
    sparse = config.num_experts > 0
    latent = next(
        (layer.self_attn for layer in model.layers if isinstance(layer.self_attn, MultiHeadLatentAttention)), None
    )
    router = next((m.gate for m in model.modules() if isinstance(m, MoE)), None)
    return {
        "D": config.hidden_size, "heads": config.num_attention_heads, "N": config.qk_nope_head_dim,
        "P": config.qk_rope_head_dim, "V": config.v_head_dim, "R": config.kv_lora_rank,
        "E": config.num_experts if sparse else 0, "k": config.num_experts_per_token if sparse else 0,
        "I": config.moe_intermediate_size if sparse else 0,
        "S": config.moe_intermediate_size * config.num_shared_experts if sparse else 0,
        "dense": config.intermediate_size, "low": config.linear_head_dim,
        "renormalize": config.moe_renormalize, "biased": router is not None and router.weigh_by != "unbiased",
        "eps": config.rms_norm_eps, "latent_eps": latent.kv_a_layernorm.eps if latent else 1e-6,
        "scaling": config.routed_scaling_factor,
    }  # fmt: skip
