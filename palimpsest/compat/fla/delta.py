"""flash-linear-attention's delta rules with one decay a head, none, or a free transition. Signatures as of its 0.6."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from palimpsest.compat.fla.arguments import beta_of, check_options, expand_to, state_in, state_layout, state_out
from palimpsest.ops.arguments import state_dtype
from palimpsest.ops.gates import l2norm
from palimpsest.ops.variants import delta_rule, dplr, gated_delta, kda


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet. g is a natural log decay [B, T, HV], or logits with use_gate_in_kernel=True and A_log [HV].

    Args, returns and errors as chunk_kda. Source: flash-linear-attention 0.6, fla/ops/gated_delta_rule/chunk.py.

    >>> x = torch.randn(1, 7, 2, 8)
    >>> chunk_gated_delta_rule(x, x, x, -x[..., 0].abs(), x[..., 1].sigmoid())[0].shape
    torch.Size([1, 7, 2, 8])
    """
    honoured = check_options(
        "chunk_gated_delta_rule", {**options, "cp_context": cp_context}, "use_gate_in_kernel", "A_log", "dt_bias"
    )
    if honoured.pop("use_gate_in_kernel", False):
        g = _head_gate(g, honoured.get("A_log"), honoured.get("dt_bias"))
    beta = beta_of(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    q, k = (l2norm(q), l2norm(k)) if use_qk_l2norm_in_kernel else (q, k)
    v_first = state_layout("chunk_gated_delta_rule", state_v_first, options)
    state = state_in(initial_state, v_first, v, cu_seqlens)
    output, final = gated_delta(q, k, v, g, beta, state=state, scale=scale, cu_seqlens=cu_seqlens)
    return output, state_out(final, v_first, output_final_state)


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """As chunk_gated_delta_rule; gk [B, T, HV, K] is a decay a channel, which makes it KDA, and no beta is a beta of one.

    Raises:
        NotImplementedError: gv, a decay of the values, which our memory does not have.
    """
    check_options("fused_recurrent_gated_delta_rule", options)
    if gv is not None:
        raise NotImplementedError("gv decays the values of the memory, which is not offered here; pass g or gk")
    if use_gate_in_kernel:
        if g is None:
            raise ValueError("use_gate_in_kernel came without g, the logits of the gate")
        g = _head_gate(g, A_log, dt_bias)
    beta = beta_of(expand_to(beta, q, v), use_beta_sigmoid_in_kernel, allow_neg_eigval)
    q, k = (l2norm(q), l2norm(k)) if use_qk_l2norm_in_kernel else (q, k)
    v_first = state_layout("fused_recurrent_gated_delta_rule", state_v_first, options)
    rest: Any = {"state": state_in(initial_state, v_first, v, cu_seqlens), "scale": scale, "cu_seqlens": cu_seqlens}
    if gk is not None:
        output, final = kda(q, k, v, gk if g is None else gk + g[..., None], beta, **rest)
    elif g is not None:
        output, final = gated_delta(q, k, v, g, beta, **rest)
    else:
        output, final = delta_rule(q, k, v, beta, **rest)
    return output, state_out(final, v_first, output_final_state)


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """DeltaNet, in float32 too. Source: flash-linear-attention 0.6, fla/ops/delta_rule/chunk.py (its signature)."""
    check_options("chunk_delta_rule", options)
    if beta.ndim != 3:
        raise NotImplementedError(
            f"beta has shape {tuple(beta.shape)}; one strength a head, [B, T, HV], is offered here"
        )
    q, k = (l2norm(q), l2norm(k)) if use_qk_l2norm_in_kernel else (q, k)
    state = state_in(initial_state, False, v, cu_seqlens)
    output, final = delta_rule(q, k, v, beta, state=state, scale=scale, cu_seqlens=cu_seqlens)
    return output, state_out(final, False, output_final_state)


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As chunk_delta_rule; no beta is a beta of one."""
    return chunk_delta_rule(
        q, k, v, expand_to(beta, q, v), scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    )


def chunk_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaProduct: each token decays once, then takes n steps of the delta rule, then reads.

    Args:
        q: [B, T, H, K]. g: [B, T, H] or None. k, v, beta: n times as many tokens, the n of a token side by side.
        num_householder: n.

    It is the delta rule on n T tokens: the first of each n decays, the last reads. Source: arXiv:2502.10297, and
    flash-linear-attention 0.6, fla/ops/gated_delta_product/chunk.py (its signature).
    """
    check_options("chunk_gated_delta_product", {"cp_context": cp_context})
    n, (B, T) = num_householder, q.shape[:2]
    if n < 1 or k.shape[1] != n * T or beta.shape[:2] != (B, n * T) or v.shape[:2] != (B, n * T):
        raise ValueError(
            f"k, v and beta have {k.shape[1]}, {v.shape[1]} and {beta.shape[1]} tokens; with num_householder={n} they must "
            f"have {n * T}, {n} for each of the {T} of q"
        )
    q, k = (l2norm(q), l2norm(k)) if use_qk_l2norm_in_kernel else (q, k)
    reads = F.pad(q[:, :, None], (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)  # the last of each n
    borders = None if cu_seqlens is None else cu_seqlens * n
    rest: Any = {"state": state_in(initial_state, False, v, borders), "scale": scale, "cu_seqlens": borders}
    if g is None:
        output, final = delta_rule(reads, k, v, beta, **rest)
    else:
        decays = F.pad(g[:, :, None], (0, 0, 0, n - 1)).flatten(1, 2)  # the first of each n
        output, final = gated_delta(reads, k, v, decays, beta, **rest)
    return output[:, n - 1 :: n], state_out(final, False, output_final_state)


def chunk_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    cp_context: Any = None,
    lower_bound: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Diagonal plus low rank: S <- Diag(exp gk) S + b (a^T S) + k v^T. lower_bound is a promise that ours does not need.

    Source: flash-linear-attention 0.6, fla/ops/generalized_delta_rule/dplr/chunk.py (its signature).
    """
    check_options("chunk_dplr_delta_rule", {**options, "cp_context": cp_context})
    state = state_in(initial_state, False, v, cu_seqlens)
    output, final = dplr(q, k, v, a, b, gk, state=state, scale=scale, cu_seqlens=cu_seqlens)
    return output, state_out(final, False, output_final_state)


def fused_recurrent_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As chunk_dplr_delta_rule."""
    if reverse:
        raise NotImplementedError(
            "reverse=True reads sequences from their ends, which is not offered here; flip the tensors"
        )
    return chunk_dplr_delta_rule(q, k, v, a, b, gk, scale, initial_state, output_final_state, cu_seqlens)


def _head_gate(logits: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    if A_log is None:
        raise ValueError("use_gate_in_kernel came without A_log; pass it, or gate g yourself")
    wide = logits.to(state_dtype(logits.dtype))
    return -A_log.to(wide.dtype).exp() * F.softplus(wide if dt_bias is None else wide + dt_bias.to(wide.dtype))
