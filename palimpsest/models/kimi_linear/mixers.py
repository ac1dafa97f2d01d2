"""What can stand in a layer to mix its tokens: the package's own layers and those that a file from outside registers.

A mixer has a name, a letter for patterns such as "KKKM", and a factory. The same door for all:

    register_mixer("average", "V", lambda config, index: Average(config.hidden_size))
    KimiLinearConfig.tiny("KVKM")

What it makes is a torch module with

    forward(x, state=None, *, mask=None, cu_seqlens=None) -> (y, state)    many tokens; leaves the state given as it is
    step_(x, state, mask=None) -> (y, state)                               one token a sequence; may use the state up
    empty_state(batch_size, *, device, dtype) -> LayerState                before the first token

and, if it is cheaper, `without_state(x, *, cu_seqlens=None) -> y` for training, where nobody continues. x and y are
[B, T, hidden_size], [B, hidden_size] for a step. See docs/how-to/add-a-mixer.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from palimpsest.layers.gated_delta_product import GatedDeltaProduct
from palimpsest.layers.gdn2 import GatedDeltaNet2
from palimpsest.layers.kimi_delta_attention import KimiDeltaAttention
from palimpsest.layers.latent_attention import MultiHeadLatentAttention
from palimpsest.layers.layer_state import LayerState
from palimpsest.layers.linear_attention import GatedLinearAttention, ScalarDecay
from palimpsest.layers.memory_layer import MemoryLayer

Factory = Callable[[Any, int], nn.Module]  # (the KimiLinearConfig, the layer's place from 0) -> the layer


@dataclass(frozen=True)
class Mixer:
    """One kind of layer.

    Attributes:
        name: as in `KimiLinearConfig.layer_types`.
        letter: as in patterns.
        make: the factory.
        full_attention: listed among the full-attention layers of the official config.json.
        built_in: the package's own.
    """

    name: str
    letter: str
    make: Factory
    full_attention: bool = False
    built_in: bool = False


MIXERS: dict[str, Mixer] = {}  # by name


def register_mixer(name: str, letter: str, make: Factory, *, full_attention: bool = False) -> Mixer:
    """Make a layer known, from then on and in this process. Registering a name of your own again replaces it.

    Args:
        name: a word for `layer_types`.
        letter: one character for patterns.
        make: (config, index) -> layer; see this module's text for what a layer has.
        full_attention: whether the official config.json lists it among its full-attention layers.

    Raises:
        ValueError: the name or the letter is taken, or is none.

    >>> from palimpsest.layers.kimi_delta_attention import KimiDeltaAttention
    >>> mixer = register_mixer("narrow_kda", "N", lambda config, index: KimiDeltaAttention(config.hidden_size, 1, 8))
    >>> from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
    >>> KimiLinearForCausalLM(KimiLinearConfig.tiny("KN")).model.layers[1].self_attn.head_dim
    8
    >>> unregister_mixer("narrow_kda")
    """
    return _register(Mixer(name, letter, make, full_attention))


def unregister_mixer(name: str) -> None:
    """Forget a layer that was registered.

    Raises:
        ValueError: there is none of that name, or it is the package's own.
    """
    if name not in MIXERS or MIXERS[name].built_in:
        raise ValueError(f"{name!r} was not registered from outside; the mixers are {', '.join(MIXERS)}")
    del MIXERS[name]


def letters() -> dict[str, str]:
    """Letter -> name."""
    return {mixer.letter: mixer.name for mixer in MIXERS.values()}


def is_full_attention(name: str) -> bool:
    """Whether the official config.json lists layers of this name among the full-attention layers."""
    return name in MIXERS and MIXERS[name].full_attention


def make_mixer(config: Any, index: int) -> Any:
    """The mixer of layer `index`, as its factory makes it.

    Raises:
        TypeError: what the factory made lacks something that a layer needs.
    """
    mixer = MIXERS[config.layer_types[index]]
    layer = mixer.make(config, index)
    if not mixer.built_in:
        _check_layer(mixer.name, layer)
    return layer


def _register(mixer: Mixer) -> Mixer:
    name, letter = mixer.name, mixer.letter
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name is {name!r}; a mixer's name is one word, such as 'average'")
    if not isinstance(letter, str) or len(letter) != 1 or not letter.isalpha():
        raise ValueError(f"letter is {letter!r}; a mixer's letter is one letter, such as 'V'")
    if not callable(mixer.make):
        raise ValueError(f"make is {mixer.make!r}; it must be a function of the config and the layer's place")
    for other in MIXERS.values():
        if name == other.name and other.built_in:
            raise ValueError(f"the name {name!r} is the package's own; choose another")
        if letter == other.letter and name != other.name:
            free = "".join(c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in letters())
            raise ValueError(f"the letter {letter!r} is that of {other.name!r}; of the capitals these are free: {free}")
    MIXERS[name] = mixer
    return mixer


NEEDED = {  # method -> how it is called, and that in words
    "forward": ((0, None), {"mask": None, "cu_seqlens": None}, "(x, state=None, *, mask=None, cu_seqlens=None)"),
    "step_": ((0, 0, None), {}, "(x, state, mask=None)"),
    "empty_state": ((1,), {"device": "meta", "dtype": torch.float32}, "(batch_size, *, device, dtype)"),
}


def _check_layer(name: str, layer: Any) -> None:
    says = f"the mixer {name!r} makes a {type(layer).__name__}, which"
    if not isinstance(layer, nn.Module):
        raise TypeError(f"{says} is no torch.nn.Module")
    for method, (args, kwargs, words) in NEEDED.items():
        function = getattr(layer, method, None)
        if not callable(function) or (method == "forward" and type(layer).forward is nn.Module.forward):
            raise TypeError(f"{says} lacks {method}{words}")
        try:
            inspect.signature(function).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{says} has a {method} that cannot be called as {method}{words}: {error}") from error
    state: Any = layer.empty_state(1, device="meta", dtype=torch.float32)  # type: ignore[operator]
    if not isinstance(state, LayerState) or not is_dataclass(state):
        raise TypeError(
            f"{says} has an empty_state that gives a {type(state).__name__}; it must be a dataclass of tensors over "
            "palimpsest.layers.layer_state.LayerState"
        )
    wrong = [name for name, x in state.tensors().items() if not isinstance(x, torch.Tensor) or x.shape[:1] != (1,)]
    if wrong:
        raise TypeError(f"{says} has a state whose {wrong[0]!r} is no tensor with one row a sequence")


def _memory(layer: type[MemoryLayer], **options: Any) -> Factory:
    """The factory of a memory layer; options are what makes it what it is, whatever the config's say."""

    def make(config: Any, index: int) -> MemoryLayer:
        return layer(
            config.hidden_size,
            config.linear_num_heads,
            config.linear_head_dim,
            conv_size=config.short_conv_kernel_size,
            norm_eps=config.rms_norm_eps,
            options=replace(config.mixer_options, **options),
        )

    return make


def _latent(rotary: bool) -> Factory:
    def make(config: Any, index: int) -> MultiHeadLatentAttention:
        return MultiHeadLatentAttention(
            config.hidden_size,
            config.num_attention_heads,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            rope=config.rope_theta if rotary else None,
        )

    return make


for _mixer in (
    Mixer("kda", "K", _memory(KimiDeltaAttention)),
    Mixer("mla", "M", _latent(rotary=False), full_attention=True),
    Mixer("mla_rope", "R", _latent(rotary=True), full_attention=True),
    Mixer("gated_delta", "G", _memory(KimiDeltaAttention, decay="head")),
    Mixer("delta_rule", "D", _memory(KimiDeltaAttention, decay="none")),
    Mixer("gdn2", "E", _memory(GatedDeltaNet2)),
    Mixer("gated_linear_attention", "A", _memory(GatedLinearAttention)),
    Mixer("linear_attention", "L", _memory(GatedLinearAttention, decay="none")),
    Mixer("scalar_decay", "S", _memory(ScalarDecay, decay="head")),  # the memory of Mamba-2
    Mixer("gated_delta_product", "P", _memory(GatedDeltaProduct, decay="head")),
):
    _register(replace(_mixer, built_in=True))
