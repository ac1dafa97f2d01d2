"""Four layouts of one model. Official names are the pivot: every layout says how its tensors are made of official ones.

    official   moonshotai/Kimi-Linear-48B-A3B: a tensor an expert, q, k and v convolutions apart
    native     transformers' kimi_linear in memory: convolutions joined, experts stacked, gates in `forget_gate`, all in `mlp`
    fla        flash-linear-attention's names for the memory layers; the rest as official, which FLA does not have
    gguf       llama.cpp's kimi-linear

A tensor is its parts, one behind the other in memory, so a stack of 256 experts is written with one of them at hand.

    E experts, I their width, D hidden channels, H heads, K key channels, V value channels, L latent channels
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from palimpsest.models.kimi_linear.config import KimiLinearConfig
from palimpsest.models.kimi_linear.mixers import is_full_attention
from palimpsest.models.kimi_linear.official_names import official_tensors

LAYOUTS = ("official", "native", "fla", "gguf")


@dataclass(frozen=True)
class Part:
    """A piece of a tensor, out of a tensor of another layout.

    Attributes:
        source: its name there; "" for zeros.
        index: which of the first dimension, None for all of it.
        rows: (first, last) of the next dimension, None for all of it.
        change: what is done to it.
    """

    source: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    change: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Made:
    """A tensor, and what it is made of."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@cache
def official_shapes(config: KimiLinearConfig) -> dict[str, tuple[int, ...]]:
    """Every official tensor of a model and its shape, in the official order.

    >>> official_shapes(KimiLinearConfig.tiny())["model.layers.0.self_attn.A_log"]
    (1, 1, 2, 1)
    """
    from palimpsest.models.kimi_linear.model import KimiLinearForCausalLM

    with torch.device("meta"):
        model = KimiLinearForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in official_tensors(model.state_dict())}


def check_config(config: KimiLinearConfig, layout: str) -> None:
    """Raise ValueError if a layout has no place for a model, in a sentence."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    if layout == "official":
        return
    if set(config.layer_types) - {"kda", "mla"} or config.mixer_options.changes():
        kinds = ", ".join(sorted(set(config.layer_types)))
        raise ValueError(
            f"the {layout} layout has places for the released layers alone; this model has {kinds} with "
            f"{config.mixer_options.changes() or 'no changes'}"
        )
    if layout == "gguf" and (config.num_experts == 0 or config.num_shared_experts == 0 or config.moe_layer_freq != 1):
        raise ValueError(
            "llama.cpp's kimi-linear has experts and a shared one in every layer after the dense ones; this model has not"
        )


def tensors_of(config: KimiLinearConfig, layout: str) -> Iterator[Made]:
    """Every tensor of a layout, made of official ones."""
    check_config(config, layout)
    shapes = official_shapes(config)
    if layout == "official":
        yield from (Made(name, shape, (Part(name),)) for name, shape in shapes.items())
        return
    make = {"native": _native, "fla": _fla, "gguf": _gguf}[layout]
    done: set[str] = set()
    for name in shapes:
        if name not in done:
            made = make(config, shapes, name)
            for one in made:
                done.update(part.source for part in one.parts)
            yield from made


def official_from(config: KimiLinearConfig, layout: str) -> dict[str, Made]:
    """Every official tensor, made of a layout's."""
    check_config(config, layout)
    shapes, back = official_shapes(config), {}
    if layout == "official":
        return {name: Made(name, shape, (Part(name),)) for name, shape in shapes.items()}
    heads = config.num_attention_heads
    for made in tensors_of(config, layout):
        start = 0
        for number, part in enumerate(made.parts):
            if not part.source:
                continue
            official = shapes[part.source]
            if layout == "gguf" and part.source.endswith("kv_b_proj.weight"):
                if made.name.endswith("attn_k_b.weight"):
                    k, v = made.name, made.name.replace("attn_k_b", "attn_v_b")
                    parts = [p for h in range(heads) for p in (Part(k, h, change=_transposed), Part(v, h))]
                    back[part.source] = Made(part.source, official, tuple(parts))
                continue
            stacked = ".experts." in part.source and len(made.shape) == 3
            if layout == "native" and stacked and made.name.endswith("gate_up_proj"):
                width, second = official[0], part.source.endswith("w3.weight")
                back[part.source] = Made(
                    part.source, official, (Part(made.name, number // 2, (width * second, width * (1 + second))),)
                )
            elif stacked:
                back[part.source] = Made(part.source, official, (Part(made.name, number),))
            elif len(made.parts) > 1:
                back[part.source] = Made(part.source, official, (Part(made.name, None, (start, start + official[0])),))
                start += official[0]
            else:
                back[part.source] = Made(part.source, official, (Part(made.name, change=_inverse(part.change)),))
    return {name: back[name] for name in shapes}


def _native(config: KimiLinearConfig, shapes: dict, name: str) -> list[Made]:
    if expert := re.fullmatch(r"(model\.layers\.\d+)\.block_sparse_moe\.experts\.0\.w1\.weight", name):
        E, (I, D) = config.num_experts, shapes[name]
        at = lambda e, w: Part(f"{expert[1]}.block_sparse_moe.experts.{e}.{w}.weight")
        up = tuple(at(e, w) for e in range(E) for w in ("w1", "w3"))
        down = tuple(at(e, "w2") for e in range(E))
        prefix = f"{expert[1]}.mlp.experts"
        return [Made(f"{prefix}.gate_up_proj", (E, 2 * I, D), up), Made(f"{prefix}.down_proj", (E, D, I), down)]
    if name.endswith("q_conv1d.weight"):
        D, _, W = shapes[name]
        parts = tuple(Part(name.replace("q_conv1d", f"{x}_conv1d")) for x in "qkv")
        return [Made(name.replace("q_conv1d", "conv1d"), (3 * D, 1, W), parts)]
    new = name.replace(".block_sparse_moe.", ".mlp.")
    new = re.sub(r"self_attn\.(f_a_proj|f_b_proj|dt_bias|A_log)", r"self_attn.forget_gate.\1", new)
    return [Made(new, shapes[name], (Part(name),))]


def _fla(config: KimiLinearConfig, shapes: dict, name: str) -> list[Made]:
    match = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.(.+)", name)
    if match is None or is_full_attention(config.layer_types[int(match[1])]):
        return [Made(name, shapes[name], (Part(name),))]
    prefix, rest = f"model.layers.{match[1]}.attn", match[2]
    if rest == "A_log":
        return [Made(f"{prefix}.A_log", (config.linear_num_heads,), (Part(name),))]
    lows = {"f_a_proj": "f_proj.0", "f_b_proj": "f_proj.1", "g_a_proj": "g_proj.0", "g_b_proj": "g_proj.1"}
    low = rest.removesuffix(".weight")
    made = [Made(f"{prefix}.{lows.get(low, low)}{rest[len(low) :]}", shapes[name], (Part(name),))]
    if low == "g_b_proj":  # FLA's has a bias; the released model's has none
        made.append(Made(f"{prefix}.g_proj.1.bias", (shapes[name][0],), (Part(""),)))
    return made


GGUF_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_conv1d.weight": "ssm_conv1d_q.weight",
    "self_attn.k_conv1d.weight": "ssm_conv1d_k.weight",
    "self_attn.v_conv1d.weight": "ssm_conv1d_v.weight",
    "self_attn.f_a_proj.weight": "ssm_f_a.weight",
    "self_attn.f_b_proj.weight": "ssm_f_b.weight",
    "self_attn.g_a_proj.weight": "ssm_g_a.weight",
    "self_attn.g_b_proj.weight": "ssm_g_b.weight",
    "self_attn.b_proj.weight": "ssm_beta.weight",
    "self_attn.A_log": "ssm_a",
    "self_attn.dt_bias": "ssm_dt.bias",
    "self_attn.o_norm.weight": "ssm_norm.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.gate.e_score_correction_bias": "exp_probs_b.bias",
    "block_sparse_moe.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "block_sparse_moe.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "block_sparse_moe.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
GGUF_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def _gguf(config: KimiLinearConfig, shapes: dict, name: str) -> list[Made]:
    if name in GGUF_TOP:
        return [Made(GGUF_TOP[name], shapes[name], (Part(name),))]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    assert match is not None
    prefix, rest = f"blk.{match[1]}", match[2]
    if expert := re.fullmatch(r"block_sparse_moe\.experts\.0\.(w[123])\.weight", rest):
        kind = {"w1": "gate", "w3": "up", "w2": "down"}[expert[1]]
        parts = tuple(Part(name.replace(".experts.0.", f".experts.{e}.")) for e in range(config.num_experts))
        return [Made(f"{prefix}.ffn_{kind}_exps.weight", (config.num_experts, *shapes[name]), parts)]
    if rest == "self_attn.kv_b_proj.weight":  # [H (K + V), L] -> keys transposed and values, a matrix a head
        H, K, V, L = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
        keys = tuple(Part(name, None, (h * (K + V), h * (K + V) + K), _transposed) for h in range(H))
        values = tuple(Part(name, None, (h * (K + V) + K, (h + 1) * (K + V))) for h in range(H))
        return [
            Made(f"{prefix}.attn_k_b.weight", (H, L, K), keys),
            Made(f"{prefix}.attn_v_b.weight", (H, V, L), values),
        ]
    if rest == "self_attn.A_log":
        return [Made(f"{prefix}.ssm_a", shapes[name], (Part(name, change=_rate),))]
    shape = shapes[name]
    if "conv1d" in rest:
        shape = (1, shape[0], 1, shape[2])
    return [Made(f"{prefix}.{GGUF_NAMES[rest]}", shape, (Part(name),))]


def _transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous()


def _rate(A_log: Tensor) -> Tensor:
    return -A_log.float().exp()


def _log_rate(a: Tensor) -> Tensor:
    return (-a.float()).log()


def _inverse(change):
    return {None: None, _rate: _log_rate}[change]
