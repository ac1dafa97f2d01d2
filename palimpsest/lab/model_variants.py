"""Who takes part: every memory from the one model code, equal in parameters, so that a difference is the memory's.

A contestant is a pattern of layers, repeated to the model's depth, and changes to the parts of its memory layers. What a
memory saves or spends in projections is given to its MLPs, so that all have the baseline's parameters to within
half a percent; heads and channels are the same, so that every matrix memory holds as many numbers. Both are reported.

To add a contestant: a line in MODEL_VARIANTS; or `ModelVariant("mine", "K", {"conv": False})` in a recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

from palimpsest.checks import check, check_fields
from palimpsest.layers.options import MixerOptions
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM, ModelState
from palimpsest.models.kimi_linear.config import read_layer_types


@dataclass(frozen=True)
class ModelVariant:
    """Args:
        name: in tables and plots.
        pattern: letters of `KimiLinearConfig.layer_types`, repeated to the model's depth: "K", "KKKM", "R".
        parts: changes to `MixerOptions`, such as {"conv": False}.

    >>> ModelVariant("KDA, no convolution", "K", {"conv": False}).pattern
    'K'
    """

    name: str
    pattern: str
    parts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        read_layer_types(self.pattern)  # raises for an unknown letter
        known = [f.name for f in fields(MixerOptions)]
        for part in self.parts:
            near = difflib.get_close_matches(part, known, n=1, cutoff=0.4) or [", ".join(known)]
            check(part in known, f"contestant {self.name!r} changes part {part!r}; did you mean {near[0]}?")
        check_fields(MixerOptions(**self.parts), f"contestant {self.name!r}: ")
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))

    def __reduce__(self):  # a read-only mapping does not travel to other processes by itself
        return ModelVariant, (self.name, self.pattern, dict(self.parts))

    def __hash__(self):
        return hash((self.name, self.pattern, tuple(self.parts.items())))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "pattern": self.pattern, "parts": dict(self.parts)}


MODEL_VARIANTS = {
    c.name: c
    for c in (
        ModelVariant("kda", "K"),
        ModelVariant("gdn", "G"),
        ModelVariant("gdn2", "E"),
        ModelVariant("deltanet", "D"),
        ModelVariant("deltaproduct", "P"),
        ModelVariant("gla", "A"),
        ModelVariant("mamba2", "S"),
        ModelVariant("linear", "L"),
        ModelVariant("softmax", "M"),
        ModelVariant("softmax-rope", "R"),
        ModelVariant("kda-negative", "K", {"beta_max": 2.0}),
        ModelVariant("gdn-negative", "G", {"beta_max": 2.0}),
        ModelVariant("deltanet-negative", "D", {"beta_max": 2.0}),
    )
}
ABOUT = {
    "kda": "Kimi Delta Attention: erases and writes, one decay a channel",
    "gdn": "Gated DeltaNet: erases and writes, one decay a head",
    "gdn2": "Gated DeltaNet 2: erases per key channel, writes per value channel, one decay a channel",
    "deltanet": "DeltaNet: erases and writes, never fades",
    "deltaproduct": "Gated DeltaProduct: erases and writes twice a token, one decay a head",
    "gla": "gated linear attention: writes, one decay a channel, never erases",
    "mamba2": "the memory of Mamba-2: writes, one decay a head, never erases",
    "linear": "linear attention with unit keys: writes, never fades or erases",
    "softmax": "softmax attention (latent) without positions",
    "softmax-rope": "softmax attention (latent) with rotary positions",
    "kda-negative": "KDA with beta up to 2: transitions may have negative eigenvalues",
    "gdn-negative": "Gated DeltaNet with beta up to 2",
    "deltanet-negative": "DeltaNet with beta up to 2",
}


def model_variant(name: str) -> ModelVariant:
    """By its name, or by a pattern of capital letters.

    >>> model_variant("KKKM").pattern
    'KKKM'
    """
    if name in MODEL_VARIANTS:
        return MODEL_VARIANTS[name]
    if name.isupper():
        return ModelVariant(name, name)
    near = difflib.get_close_matches(name, MODEL_VARIANTS, n=1)
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else f"choose one of {', '.join(MODEL_VARIANTS)}, or a pattern such as KKKM"
    )
    raise ValueError(f"contestant {name!r} is unknown; {hint}")


@dataclass(frozen=True, kw_only=True)
class Size:
    """The model around the memory, the same for all contestants.

    Attributes:
        layers, hidden_size: of the model. heads, head_dim: of every layer; a memory holds heads * head_dim^2 numbers.
        mlp: channels between in the baseline's MLPs; the others' are fitted.
    """

    layers: int = 2
    hidden_size: int = 64
    heads: int = 2
    head_dim: int = 32
    mlp: int = 128

    def __post_init__(self):
        check_fields(self, "size: ")
        for name, value in asdict(self).items():
            check(value >= 1, f"size: {name} is {value}; give at least 1")


PAPER_SIZE = Size(layers=2, hidden_size=256, heads=2, head_dim=128, mlp=512)  # arXiv:2510.26692, section 5.1


@cache
def config(who: ModelVariant, size: Size, vocab_size: int) -> KimiLinearConfig:
    """The contestant's model, fitted to the parameters of KDA in this size."""
    target = count_parameters(_config(MODEL_VARIANTS["kda"], size, vocab_size, size.mlp))
    have = count_parameters(_config(who, size, vocab_size, size.mlp))
    step = 8 if size.mlp >= 256 else 1  # tensor cores want multiples of 8; that leaves less than half a percent
    mlp = size.mlp + step * round((target - have) / (3 * size.hidden_size * size.layers * step))
    check(
        mlp >= 1,
        f"contestant {who.name!r} has {have - target} parameters more than KDA, and MLPs of {size.mlp} channels cannot "
        f"make up for it; give mlp at least {size.mlp - mlp + 1}",
    )
    return _config(who, size, vocab_size, mlp)


def _config(who: ModelVariant, size: Size, vocab_size: int, mlp: int) -> KimiLinearConfig:
    pattern = (who.pattern * size.layers)[: size.layers]
    check(
        len(who.pattern) <= size.layers,
        f"contestant {who.name!r} is a pattern of {len(who.pattern)} layers and the model has {size.layers}; "
        "give a size with as many",
    )
    D, P = size.head_dim, max(size.head_dim // 8 * 2, 2)
    return KimiLinearConfig.tiny(
        pattern,
        vocab_size=max(vocab_size, 2),
        hidden_size=size.hidden_size,
        intermediate_size=mlp,
        linear_num_heads=size.heads,
        linear_head_dim=D,
        num_attention_heads=size.heads,
        kv_lora_rank=size.heads * D,  # no bottleneck: what is compared is how softmax looks things up
        qk_nope_head_dim=max(D - P, 1),
        qk_rope_head_dim=P,
        v_head_dim=D,
        num_experts=0,
        tie_word_embeddings=False,
        eos_token_id=None,
        mixer_options=MixerOptions(**who.parts),
    )


def build(who: ModelVariant, size: Size, vocab_size: int) -> KimiLinearForCausalLM:
    """The contestant's model, fresh; torch's seed decides its weights."""
    model = KimiLinearForCausalLM(config(who, size, vocab_size))
    if model.config.mixer_options.gate == "sigmoid":
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # as the bounded gate's authors start it; larger rates leave it no gradient
                torch.nn.init.zeros_(parameter)
    return model


@cache
def count_parameters(config: KimiLinearConfig) -> int:
    """Of the model, without building it: a sweep asks of a few models hundreds of times."""
    with torch.device("meta"):
        return sum(p.numel() for p in KimiLinearForCausalLM(config).parameters())


def state_numbers(config: KimiLinearConfig, length: int) -> int:
    """How many numbers one sequence's state holds after `length` tokens: memories, windows, and latents a token."""
    layers = ModelState.empty(config, device="meta", dtype=torch.float64).account()
    return sum(layer.total + layer.bytes_per_token * length for layer in layers) // 8
