"""flash-linear-attention's memories that never erase: gated and plain linear attention. Signatures as of its 0.6."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palimpsest.compat.fla.arguments import check_options, state_in, state_layout, state_out
from palimpsest.ops.arguments import state_dtype
from palimpsest.ops.variants import gated_linear_attention, linear_attention


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention with natural log decays g [B, T, H, K]. Args and returns as chunk_kda.

    Source: flash-linear-attention 0.6, fla/ops/gla/chunk.py (its signature).
    """
    check_options("chunk_gla", options)
    v_first = state_layout("chunk_gla", state_v_first, options)
    state = state_in(initial_state, v_first, v, cu_seqlens)
    output, final = gated_linear_attention(q, k, v, g, state=state, scale=scale, cu_seqlens=cu_seqlens)
    return output, state_out(final, v_first, output_final_state)


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """As chunk_gla; no gk is no decay.

    Raises:
        NotImplementedError: gv, a decay of the values, or reverse.
    """
    check_options("fused_recurrent_gla", options)
    if gv is not None:
        raise NotImplementedError("gv decays the values of the memory, which is not offered here; pass gk")
    _forward_only(reverse)
    if gk is None:
        gk = v.new_zeros(1, 1, 1, 1).expand(*v.shape[:3], q.shape[-1])
    return chunk_gla(
        q, k, v, gk, scale, initial_state, output_final_state, state_v_first, cu_seqlens,
        **{name: value for name, value in options.items() if name == "transpose_state_layout"},
    )  # fmt: skip


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Linear attention of q and k as they come; with normalize, over the running sum of weights.

    Args:
        initial_state: [N, H, K, V]; with normalize also (that, the sum of keys [N, 1, H, K]).

    Returns:
        (output, state): the state as given, a pair with normalize; in it None where output_final_state is False.

    Source: flash-linear-attention 0.6, fla/ops/linear_attn/chunk.py (its signature).
    """
    factor = float(k.shape[-1] ** -0.5 if scale is None else scale)
    memory, weights = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    memory = state_in(memory, False, v, cu_seqlens)
    same = lambda x: x
    if not normalize:
        output, final = linear_attention(
            q, k, v, feature_map=same, normalise=False, state=memory, scale=factor, cu_seqlens=cu_seqlens
        )
        return output, state_out(final, False, output_final_state)
    state = None
    if memory is not None or weights is not None:
        N = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        wide = state_dtype(v.dtype)
        K, V = q.shape[-1], v.shape[-1]
        memory = v.new_zeros(N, v.shape[2], K, V, dtype=wide) if memory is None else memory
        weights = v.new_zeros(N, 1, v.shape[2], K) if weights is None else weights
        state = torch.cat((memory, weights[:, 0, :, :, None].to(wide)), -1)
    output, final = linear_attention(q, k, v, feature_map=same, state=state, scale=factor, cu_seqlens=cu_seqlens)
    sums = final[..., -1][:, None].to(k.dtype)
    return output, (state_out(final[..., :-1].contiguous(), False, output_final_state), sums)


def fused_chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """As chunk_linear_attn: FLA has it as another kernel of the same function."""
    return chunk_linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens)


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """As chunk_linear_attn, not normalised unless asked."""
    _forward_only(reverse)
    return chunk_linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens)


def _forward_only(reverse: bool) -> None:
    if reverse:
        raise NotImplementedError(
            "reverse=True reads sequences from their ends, which is not offered here; flip the tensors"
        )
