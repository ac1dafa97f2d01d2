"""The forward of a native memory layer on our kernels: the same numbers as its own, packed and padded batches included.

    training, prompts        short_conv, then kda_from_logits (the gate in the kernel) or gated_delta
    one token, no gradient   kda_step_ on the cache's own tensor
    padding, on any side     runs as its real tokens alone, so the state after it is the state after the last real token
    packed documents         each from an empty memory

The cache stays transformers': `conv_states` holds the last W columns (W - 1 matter), `recurrent_states` the memory.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest.integrations.transformers.families import Family, heads
from palimpsest.layers.padding import pack, unpack
from palimpsest.ops.gates import SigmoidDecay, SoftplusDecay, l2norm
from palimpsest.ops.short_conv import short_conv
from palimpsest.ops.variants import gated_delta, kda_from_logits, kda_step_


def make_forward(family: Family, backend: str):
    """The forward of `family`'s layer, to be set on its class."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        *,
        cache_params: Any = None,
        past_key_values: Any = None,
        cu_seq_lens_q: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        for given in (cache_params, past_key_values):  # the argument's names before transformers 5.24
            cache = cache if given is None else given
        _warn_of_rounded_rates(family, self)
        mask = _padding(attention_mask, hidden_states)
        if mask is not None:  # a row of pads alone keeps its state; its output means nothing
            x, borders = pack(hidden_states, mask)
            return unpack(_remember(family, self, x, cache, borders, backend), mask)
        if cu_seq_lens_q is not None:
            B, T = hidden_states.shape[:2]
            x = hidden_states.reshape(1, B * T, -1)
            return _remember(family, self, x, None, cu_seq_lens_q, backend).view(B, T, -1)
        return _remember(family, self, hidden_states, cache, None, backend)

    return forward


def _remember(family: Family, layer, x: Tensor, cache, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    columns, memory = _state(cache, layer.layer_idx)
    mixed, decay, beta, gate = family.logits(layer, x)
    H, HV, K, V = heads(layer)
    weight = layer.conv1d.weight.to(mixed.dtype)
    W = weight.shape[-1]
    columns = None if columns is None else columns[..., -W:]
    if memory is not None and torch.is_grad_enabled():
        memory = memory.clone()  # the cache's own is rewritten below, and a backward may still want this one
    step = mixed.shape[1] == 1 and memory is not None and cu_seqlens is None and not torch.is_grad_enabled()

    if step:
        assert columns is not None
        window = torch.cat((columns[..., 1:], mixed.mT.to(columns.dtype)), -1)
        columns.copy_(window)
        y = (window * weight[:, 0]).sum(-1)[:, None].to(mixed.dtype)
    else:
        before = None if columns is None else columns[..., 1:].to(mixed.dtype)
        y, after = short_conv(mixed, weight, state=before, cu_seqlens=cu_seqlens)
        if cache is not None:  # the oldest of the W columns is read by nobody
            cache.update_conv_state(F.pad(after, (1, 0)), layer.layer_idx, conv_kernel_size=W)
    if layer.conv1d.bias is not None:
        y = y + layer.conv1d.bias.to(y.dtype)
    y = F.silu(y) if layer.activation == "silu" else _activation(layer.activation)(y)

    q, k, v = y.split((H * K, H * K, HV * V), -1)
    q, k, v = q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V))
    log_decay = family.decay(layer)
    fused = isinstance(log_decay, SoftplusDecay | SigmoidDecay)
    doubled = 2.0 if getattr(layer, "allow_neg_eigval", False) else 1.0
    if step:
        assert memory is not None
        step_beta = doubled * beta[:, 0].float().sigmoid()
        rates = log_decay(decay)[:, 0]
        rates = rates if fused else rates[..., None].expand(-1, HV, K)
        output = kda_step_(l2norm(q[:, 0]), l2norm(k[:, 0]), v[:, 0], rates, step_beta, memory, backend=backend)[
            :, None
        ]
    else:
        rest: Any = {"state": memory, "cu_seqlens": cu_seqlens, "backend": backend}
        if fused:
            output, memory = kda_from_logits(q, k, v, decay, beta, gate=log_decay, beta_max=doubled, **rest)
        else:
            beta_BTH = doubled * beta.float().sigmoid()
            output, memory = gated_delta(l2norm(q), l2norm(k), v, log_decay(decay), beta_BTH, **rest)
    if cache is not None:
        cache.update_recurrent_state(memory, layer.layer_idx)

    norm, way_out = getattr(layer, family.norm), getattr(layer, family.way_out)
    return way_out(norm(output.reshape(-1, V), gate.reshape(-1, V)).view(*x.shape[:2], HV * V))


def _state(cache, index: int) -> tuple[Tensor | None, Tensor | None]:
    """The window [B, D, W] and the memory [B, HV, K, V] that a cache holds for a layer; None before the first token."""
    if cache is None or not cache.has_previous_state(index):
        return None, None
    layer = cache.layers[index]
    return layer.conv_states[0], layer.recurrent_states[0]


def _padding(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask as bool [B, T], or None where nothing is padded. Asked once a mask: all layers get the same tensor."""
    if mask is None or mask.ndim != 2:
        return None
    known = getattr(mask, "_palimpsest_padding", None)
    if known is None:
        real = mask[:, -x.shape[1] :].bool()
        known = (None if bool(real.all()) else real,)
        mask._palimpsest_padding = known  # pyright: ignore[reportAttributeAccessIssue]
    return known[0]


def _warn_of_rounded_rates(family: Family, layer) -> None:
    gate = getattr(layer, "forget_gate", layer)
    narrow = {gate.A_log.dtype, gate.dt_bias.dtype} & {torch.bfloat16, torch.float16}
    if narrow and not getattr(layer, "_palimpsest_warned", False):
        layer._palimpsest_warned = True
        warnings.warn(
            f"the decay rates of layer {layer.layer_idx} are {narrow.pop()}: the {family.model_type} model was built or cast "
            "before palimpsest's enable(), and what was rounded cannot be had back; call enable() first and load it again "
            "with from_pretrained(..., dtype=...)",
            stacklevel=3,
        )


def _activation(name: str):
    from transformers.activations import ACT2FN

    return ACT2FN[name]
