"""The numbers that define a Kimi Linear model, and their official JSON form.

Field names are the official config.json's where it has one. Its layer lists count from 1 and are turned into
`layer_types`, a name a layer, here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from palimpsest.checks import check_fields, require, shown
from palimpsest.layers.options import MixerOptions
from palimpsest.models.kimi_linear.mixers import is_full_attention, letters

BYTES = {  # 256 tokens and an end mark
    "vocab_size": 257,
    "model_max_length": 4096,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
ROUTERS = ("unbiased", "official_alias")
OFFICIAL_PATTERN = "KKKM" * 6 + "KKM"


@dataclass(frozen=True)
class KimiLinearConfig:
    """The shape of a Kimi Linear model. The defaults are the released 48B model.

    Attributes:
        vocab_size: tokens 0 .. vocab_size - 1.
        hidden_size: channels between layers.
        intermediate_size: channels inside a dense MLP.
        layer_types: a name a layer, or letters: "K" KDA, "M" latent attention without positions, "R" the same with
            rotary positions, "G" Gated DeltaNet, "P" Gated DeltaProduct, "D" DeltaNet, "E" GDN-2, "A" gated linear
            attention, "L" linear attention, "S" scalar decay without erasing (as in Mamba-2), and those of
            `mixers.register_mixer`.
        linear_num_heads, linear_head_dim: heads of a memory layer, and channels of each head's key and value.
        short_conv_kernel_size: tokens that the short convolutions of a memory layer see, the token itself included.
        mixer_options: what the memory layers are made of; a layer type overrides what makes it what it is, such as
            the decay of Gated DeltaNet.
        num_attention_heads: heads of a latent attention layer.
        kv_lora_rank: channels of a latent, from which every head's keys and values are made.
        qk_nope_head_dim, qk_rope_head_dim: channels of a head's key from the latent, and of the part that all heads
            share, which carries the positions where there are any.
        v_head_dim: channels of a head's value.
        rope_theta: base of the rotary positions of "R".
        num_experts: experts of the sparse layers; 0 makes every layer dense.
        num_experts_per_token: experts that work on each token.
        num_shared_experts: experts that work on every token besides, as one MLP.
        moe_intermediate_size: channels inside an expert.
        first_k_dense_replace, moe_layer_freq: layer i (from 0) is sparse from the first on, and where i divides by the
            second.
        moe_renormalize: whether the weights of a token's experts are made to sum to 1.
        routed_scaling_factor: multiplies those weights.
        num_expert_group, topk_group: experts stand in so many groups, and a token chooses among those of its best few.
        router: "unbiased" weighs experts by their scores; "official_alias" by the biased scores, as the released remote
            code does by mistake.
        rms_norm_eps: added to the mean square in every norm but that of the latents.
        initializer_range: standard deviation of fresh weights.
        tie_word_embeddings: one matrix for the embedding and the output.
        model_max_length: tokens that the model was made for; nothing here depends on it.
        bos_token_id, pad_token_id: None where the tokenizer has none.
        eos_token_id: the token that ends a text, several, or None.

    Raises:
        ValueError: numbers that do not fit together.

    >>> KimiLinearConfig.tiny("KKKM").layer_types
    ('kda', 'kda', 'kda', 'mla')
    """

    vocab_size: int = 163840
    hidden_size: int = 2304
    intermediate_size: int = 9216
    layer_types: tuple[str, ...] = OFFICIAL_PATTERN  # type: ignore[assignment]  # letters become names below

    linear_num_heads: int = 32
    linear_head_dim: int = 128
    short_conv_kernel_size: int = 4
    mixer_options: MixerOptions = field(default_factory=MixerOptions)

    num_attention_heads: int = 32
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0

    num_experts: int = 256
    num_experts_per_token: int = 8
    num_shared_experts: int = 1
    moe_intermediate_size: int = 1024
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    moe_renormalize: bool = True
    routed_scaling_factor: float = 2.446
    num_expert_group: int = 1
    topk_group: int = 1
    router: str = "unbiased"

    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    model_max_length: int = 1048576
    bos_token_id: int | None = 163584
    eos_token_id: int | tuple[int, ...] | None = 163586
    pad_token_id: int | None = 163839

    def __post_init__(self):
        object.__setattr__(self, "layer_types", read_layer_types(self.layer_types))
        if isinstance(self.mixer_options, Mapping):
            options = _build(MixerOptions, dict(self.mixer_options), "mixer_options")
            object.__setattr__(self, "mixer_options", options)
        _check(self)

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the pattern."""
        return len(self.layer_types)

    @property
    def qk_head_dim(self) -> int:
        """Channels of a head's query and key in latent attention."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_sparse(self, layer: int) -> bool:
        """Whether layer (from 0) has a mixture of experts instead of a dense MLP."""
        return self.num_experts > 0 and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def replace(self, **changes: Any) -> KimiLinearConfig:
        """The same config but for some fields.

        >>> KimiLinearConfig.tiny().replace(router="official_alias").router
        'official_alias'
        """
        return _build(KimiLinearConfig, {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | changes)

    @classmethod
    def official_48b(cls) -> KimiLinearConfig:
        """Kimi-Linear-48B-A3B: 27 layers, 49.1e9 parameters, 3e9 of them at work on each token."""
        return cls()

    @classmethod
    def tiny(cls, layer_types: str | Iterable[str] = "KKKM", **changes: Any) -> KimiLinearConfig:
        """200 thousand parameters and every part of the large model, for tests and first steps. Bytes as tokens."""
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "linear_num_heads": 2,
            "linear_head_dim": 16,
            "num_attention_heads": 2,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "moe_intermediate_size": 32,
        }
        return _build(cls, {"layer_types": layer_types, **BYTES, **sizes, **changes})

    @classmethod
    def small(cls, layer_types: str | Iterable[str] = "KKKM" * 2, **changes: Any) -> KimiLinearConfig:
        """24 million parameters, 12 of them at work on each token. Bytes as tokens."""
        sizes = {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "linear_num_heads": 6,
            "linear_head_dim": 64,
            "num_attention_heads": 6,
            "kv_lora_rank": 192,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "num_experts": 16,
            "num_experts_per_token": 4,
            "moe_intermediate_size": 128,
        }
        return _build(cls, {"layer_types": layer_types, **BYTES, **sizes, **changes})

    @classmethod
    def medium(cls, layer_types: str | Iterable[str] = "KKKM" * 3, **changes: Any) -> KimiLinearConfig:
        """172 million parameters, 95 of them at work on each token, in heads of the released sizes."""
        sizes = {
            "vocab_size": 32768,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "linear_num_heads": 6,
            "num_attention_heads": 6,
            "kv_lora_rank": 384,
            "num_experts": 16,
            "num_experts_per_token": 4,
            "moe_intermediate_size": 256,
            "tie_word_embeddings": True,
        }
        return _build(cls, {"layer_types": layer_types, **BYTES, "eos_token_id": None, **sizes, **changes})

    @classmethod
    def from_dict(cls, official: Mapping[str, Any]) -> KimiLinearConfig:
        """The config of an official config.json, already parsed.

        Raises:
            ValueError: another model's, layers missing or listed twice, or an option that this model does not have.
        """
        return _from_official(cls, official)

    def to_dict(self) -> dict[str, Any]:
        """The official config.json; what it has no field for goes under "palimpsest", if it is not the default."""
        return _to_official(self)


def read_layer_types(pattern: str | Iterable[str]) -> tuple[str, ...]:
    """Names from letters or names.

    >>> read_layer_types("KM")
    ('kda', 'mla')
    """
    if isinstance(pattern, str):
        known = letters()
        unknown = sorted(set(pattern) - known.keys())
        if unknown:
            raise ValueError(
                f"layer_types {shown(pattern)} has unknown letters {', '.join(unknown[:8])}; the letters are "
                f"{', '.join(f'{letter} ({name})' for letter, name in known.items())}; register_mixer adds one"
            )
        pattern = [known[letter] for letter in pattern]
    if not isinstance(pattern, Iterable):
        raise ValueError(f"layer_types is {shown(pattern)}; expected letters such as 'KKKM', or names")
    names, known_names = tuple(pattern), set(letters().values())
    for name in names:
        if not isinstance(name, str) or name not in known_names:
            raise ValueError(
                f"layer_types names {shown(name)}; the types are {', '.join(letters().values())}; a layer of your own "
                "is registered with register_mixer before its config is read: on the command line, --plugin FILE.py does so"
            )
    if not names:
        raise ValueError("layer_types is empty; give at least one layer, such as 'KKKM'")
    return names


def _check(config: KimiLinearConfig) -> None:
    check_fields(config)
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        least = LEAST.get(f.name, 1)
        if f.type in ("int", "float"):
            words = f"at least {least}" if f.type == "int" else "above 0" if least else "at least 0"
            require(f.name, value, value >= least if f.type == "int" or not least else value > 0, words)
        elif f.name.endswith("token_id"):
            ids = value if isinstance(value, tuple) else (value,)
            require(f.name, value, value is None or (bool(ids) and min(ids) >= 0), "a token, from 0 on")
    if config.router not in ROUTERS:
        raise ValueError(f"router is {shown(config.router)}; choose one of {', '.join(map(repr, ROUTERS))}")
    if "mla_rope" in config.layer_types and config.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim is {config.qk_rope_head_dim}; rotation turns pairs, so it must be even")
    if not config.num_experts:
        return
    E, k, groups = config.num_experts, config.num_experts_per_token, config.num_expert_group
    if E % groups:
        raise ValueError(f"num_experts {E} does not divide into num_expert_group {groups} groups")
    if config.topk_group > groups:
        raise ValueError(f"topk_group {config.topk_group} is more than the num_expert_group {groups} there are")
    if k > E // groups * config.topk_group:
        raise ValueError(f"num_experts_per_token {k} is more than the {E // groups * config.topk_group} to choose from")


LEAST: dict[str, int] = dict.fromkeys(  # where it is not 1
    ("num_experts", "num_shared_experts", "first_k_dense_replace", "qk_rope_head_dim", "initializer_range"), 0
)


def _build(cls, values: dict[str, Any], where: str = "the config"):
    known = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name)[:80], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}"
            raise ValueError(f"{where} has no field {shown(name)}; {hint}")
    return cls(**values)


SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rope_theta",
    "num_experts",
    "num_experts_per_token",
    "num_shared_experts",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "moe_layer_freq",
    "moe_renormalize",
    "routed_scaling_factor",
    "num_expert_group",
    "topk_group",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "model_max_length",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
LINEAR_NAMES = {  # official name inside linear_attn_config -> ours
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "short_conv_kernel_size",
}
FIXED = {  # options of the official file that exist in one form only, here as in the released code
    "q_lora_rank": None,
    "rope_scaling": None,
    "hidden_act": "silu",
    "moe_router_activation_func": "sigmoid",
    "use_grouped_topk": True,
    "num_nextn_predict_layers": 0,
}


def _to_official(config: KimiLinearConfig) -> dict[str, Any]:
    latent = [i + 1 for i, name in enumerate(config.layer_types) if is_full_attention(name)]
    memory = [i + 1 for i, name in enumerate(config.layer_types) if not is_full_attention(name)]
    official = {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "mla_use_nope": "mla_rope" not in config.layer_types,
        "use_cache": True,
        **FIXED,
        **{name: _as_json(getattr(config, name)) for name in SAME_NAME},
        "linear_attn_config": {
            "kda_layers": memory,
            "full_attn_layers": latent,
            **{theirs: getattr(config, ours) for theirs, ours in LINEAR_NAMES.items()},
        },
    }
    ours: dict[str, Any] = {}
    if set(config.layer_types) - {"kda", "mla"}:
        ours["layer_types"] = list(config.layer_types)
    if config.mixer_options.changes():
        ours["mixer_options"] = config.mixer_options.changes()
    if config.router != "unbiased":
        ours["router"] = config.router
    return official | ({"palimpsest": ours} if ours else {})


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _from_official(cls, official: Mapping[str, Any]) -> KimiLinearConfig:
    if not isinstance(official, Mapping):
        raise ValueError(
            f"the config is a {type(official).__name__}; expected a JSON object with model_type 'kimi_linear'"
        )
    if official.get("model_type") != "kimi_linear":
        raise ValueError(
            f"the config is of model_type {shown(official.get('model_type'))}; this model reads 'kimi_linear'"
        )
    for name, only in FIXED.items():
        came = official.get(name, only)
        if type(came) is not type(only) or came != only:
            raise ValueError(f"the config has {name} = {shown(came)}; this model has only {only!r}")
    heads = official.get("num_key_value_heads")
    if heads is not None and heads != official.get("num_attention_heads", heads):
        raise ValueError(
            f"the config has {shown(heads)} num_key_value_heads and {shown(official['num_attention_heads'])} "
            "num_attention_heads; latent attention has one of each a head, so give the same number"
        )
    linear, ours = official.get("linear_attn_config"), official.get("palimpsest", {})
    if not isinstance(linear, Mapping):
        raise ValueError("the config has no linear_attn_config; it lists kda_layers and full_attn_layers from 1")
    if not isinstance(ours, Mapping):
        raise ValueError(f'the config under "palimpsest" is {shown(ours)}; expected an object')
    extra = dict(ours)
    if "parts" in extra:  # its name in earlier files
        extra.setdefault("mixer_options", extra.pop("parts"))
    if not isinstance(extra.get("mixer_options", {}), Mapping):
        raise ValueError(f"mixer_options is {shown(extra['mixer_options'])}; expected an object")
    values = {name: official[name] for name in SAME_NAME if name in official}
    values |= {ours: linear[theirs] for theirs, ours in LINEAR_NAMES.items() if theirs in linear}
    if values.get("num_experts") is None:
        values["num_experts"] = 0
    ends = values.get("eos_token_id")
    if isinstance(ends, list):
        values["eos_token_id"] = ends[0] if len(ends) == 1 else tuple(ends)
    rotary = not official.get("mla_use_nope", True)
    require(
        "mla_use_nope", official.get("mla_use_nope"), official.get("mla_use_nope") in (True, False, None), "a boolean"
    )
    listed = _layers_from_lists(official, linear, "mla_rope" if rotary else "mla")
    values["layer_types"] = extra.pop("layer_types", listed)
    if isinstance(values["layer_types"], list) and len(values["layer_types"]) != len(listed):
        raise ValueError(
            f"layer_types has {len(values['layer_types'])} layers and linear_attn_config lists {len(listed)}; "
            "they must name the same ones"
        )
    return _build(cls, values | extra, 'the config under "palimpsest"')


def _layers_from_lists(official: Mapping[str, Any], linear: Mapping[str, Any], latent: str) -> list[str]:
    kda, full = (_numbers(linear, name) for name in ("kda_layers", "full_attn_layers"))
    count = official.get("num_hidden_layers", len(kda | full))
    require("num_hidden_layers", count, isinstance(count, int) and type(count) is not bool, "a whole number")
    for problem, layers in (
        ("lists layers twice", kda & full),
        ("names layers that do not exist", {i for i in kda | full if not 1 <= i <= count}),
    ):
        _refuse_layers(problem, sorted(layers), count)
    if len(kda | full) < count:
        first = (i for i in range(1, count + 1) if i not in kda and i not in full)  # lazily: count may be anything
        _refuse_layers("leaves layers out", [i for i, _ in zip(first, range(9))], count)
    return ["kda" if i in kda else latent for i in range(1, count + 1)]


def _numbers(linear: Mapping[str, Any], name: str) -> set[int]:
    listed = linear.get(name) or []
    whole = isinstance(listed, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in listed)
    require(name, listed, whole, "a list of layers, whole numbers from 1")
    require(name, listed, len(set(listed)) == len(listed), "a list without repetition")
    return set(listed)


def _refuse_layers(problem: str, layers: list[int], count: int) -> None:
    if layers:
        named = ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")
        raise ValueError(
            f"linear_attn_config {problem}: {named}; kda_layers and full_attn_layers together hold each of "
            f"1..{count} once"
        )
