"""flash-linear-attention's `fla.ops.kda` and `fla.ops.gdn2` over ours. Signatures as of its 0.6."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palimpsest.compat.fla.arguments import beta_of, check_options, kda_gate, state_in, state_layout, state_out
from palimpsest.ops.arguments import state_dtype
from palimpsest.ops.gates import l2norm
from palimpsest.ops.packing import borders
from palimpsest.ops.variants import gdn2, kda, kda_from_logits


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """KDA over whole sequences, in the kernel that takes the gate, the norm and beta's sigmoid whole where all are asked for.

    Args:
        q, k: [B, T, H, K]. v: [B, T, HV, V]. beta: [B, T, HV].
        g: [B, T, HV, K], natural log decay; gate logits with use_gate_in_kernel, and then `A_log` [HV] and `dt_bias`
            [HV * K] among the options. Without use_gate_in_kernel these two are ignored, as FLA ignores them.
        lower_bound: with use_gate_in_kernel, chooses the bounded gate; A_log may then be left out.
        return_intermediate_states: also return the memory before each chunk, [B, chunks, HV, K, V]; without gradients.
        state_v_first: states are [N, HV, V, K], in and out; `transpose_state_layout` is its older name.
        safe_gate, disable_recompute, cu_seqlens_cpu, use_graph, max_num_seqs, chunk_size: how FLA runs; they do nothing.

    Returns:
        (output [B, T, HV, V], final state [N, HV, K, V] or None), and the memories before the chunks if asked for.

    Raises:
        ValueError, TypeError, NotImplementedError: what cannot be honoured, by name.

    Source: flash-linear-attention 0.6, fla/ops/kda/chunk.py (its signature).

    >>> q = k = v = torch.randn(1, 7, 2, 8)
    >>> output, state = chunk_kda(q, k, v, -q.abs(), q[..., 0].sigmoid(), output_final_state=True, chunk_size=32)
    >>> output.shape, state.shape
    (torch.Size([1, 7, 2, 8]), torch.Size([1, 2, 8, 8]))
    """
    check_options("chunk_kda", {**options, "cp_context": cp_context}, "A_log", "dt_bias")
    gate = (options.get("A_log"), options.get("dt_bias"), lower_bound) if use_gate_in_kernel else None
    v_first = state_layout("chunk_kda", state_v_first, options)
    run = lambda q, k, v, g, beta, state, cu_seqlens: _kda(
        q, k, v, g, beta, scale, state, gate, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, cu_seqlens
    )  # fmt: skip
    state = state_in(initial_state, v_first, v, cu_seqlens)
    if not return_intermediate_states:
        output, final = run(q, k, v, g, beta, state, cu_seqlens)
        return output, state_out(final, v_first, output_final_state)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, beta)):
        raise ValueError("return_intermediate_states has no gradient; call it within torch.inference_mode()")
    output, final, before = _in_chunks(run, (q, k, v, g, beta), state, cu_seqlens, options.get("chunk_size", 64))
    return output, state_out(final, v_first, output_final_state), (before.mT if v_first else before).to(k.dtype)


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """As chunk_kda, in FLA's other order of arguments; one law, and ours has its gradient here too."""
    check_options("fused_recurrent_kda", options)
    gate = (A_log, dt_bias, lower_bound) if use_gate_in_kernel else None
    v_first = state_layout("fused_recurrent_kda", state_v_first, options)
    state = state_in(initial_state, v_first, v, cu_seqlens)
    output, final = _kda(
        q, k, v, g, beta, scale, state, gate, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, cu_seqlens
    )  # fmt: skip
    return output, state_out(final, v_first, output_final_state)


def naive_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """KDA token by token in plain PyTorch: the reference backend."""
    state = state_in(initial_state, False, v, None)
    output, final = kda(q, k, v, g, beta, state=state, scale=scale, backend="reference")
    return output, state_out(final, False, output_final_state)


def fused_kda_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The gate by itself: logits [..., HV, K] to log decays.

    >>> fused_kda_gate(torch.zeros(1, 1, 1), torch.zeros(1))
    tensor([[[-0.6931]]])
    """
    return kda_gate(g, A_log, dt_bias, lower_bound)(g).to(output_dtype)


def naive_kda_gate(
    g: Tensor, A_log: Tensor, dt_bias: Tensor | None = None, output_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The unbounded gate."""
    return fused_kda_gate(g, A_log, dt_bias, None, output_dtype)


def naive_kda_lowerbound_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The bounded gate."""
    return fused_kda_gate(g, A_log, dt_bias, lower_bound, output_dtype)


def chunk_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cp_context: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet 2: b [B, T, HV, K] gates erasing and w [B, T, HV, V] writing. The rest as chunk_kda.

    Source: flash-linear-attention 0.6, fla/ops/gdn2/chunk.py (its signature).
    """
    check_options("chunk_gdn2", {**options, "cp_context": cp_context}, "A_log", "dt_bias")
    if return_intermediate_states:
        raise NotImplementedError("chunk_gdn2 got return_intermediate_states=True; only chunk_kda returns them here")
    v_first = state_layout("chunk_gdn2", state_v_first, options)
    if use_gate_in_kernel:
        g = kda_gate(g, options.get("A_log"), options.get("dt_bias"), lower_bound)(g)
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    state = state_in(initial_state, v_first, v, cu_seqlens)
    output, final = gdn2(q, k, v, g, b, w, state=state, scale=scale, cu_seqlens=cu_seqlens)
    return output, state_out(final, v_first, output_final_state)


def fused_recurrent_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """As chunk_gdn2, in FLA's other order of arguments."""
    check_options("fused_recurrent_gdn2", options)
    return chunk_gdn2(
        q, k, v, g, b, w, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel, cu_seqlens,
        lower_bound=lower_bound, state_v_first=state_v_first, A_log=A_log, dt_bias=dt_bias, **options,
    )  # fmt: skip


def _kda(q, k, v, g, beta, scale, state, gate, norm, sigmoid, doubled, cu_seqlens):
    if doubled and not sigmoid:
        beta_of(beta, sigmoid, doubled)  # refuses
    if gate is not None and norm and sigmoid:  # all that a layer hands over: one kernel
        function = kda_gate(g, *gate)
        return kda_from_logits(
            q,
            k,
            v,
            g,
            beta,
            gate=function,
            beta_max=2.0 if doubled else 1.0,
            state=state,
            scale=scale,
            cu_seqlens=cu_seqlens,
        )
    g = g if gate is None else kda_gate(g, *gate)(g)
    q, k = (l2norm(q), l2norm(k)) if norm else (q, k)
    return kda(q, k, v, g, beta_of(beta, sigmoid, doubled), state=state, scale=scale, cu_seqlens=cu_seqlens)


def _in_chunks(run, tensors, state, cu_seqlens, chunk: int):
    """Chunk by chunk, keeping the memory before each: [B, chunks, ...], or [1, all chunks, ...] of packed sequences."""
    if cu_seqlens is None:
        v = tensors[2]
        if state is None:
            wide = state_dtype(v.dtype)
            state = v.new_zeros(v.shape[0], *v.shape[2:3], tensors[0].shape[-1], v.shape[-1], dtype=wide)
        outputs, before = [v[:, :0]], [state.new_zeros(v.shape[0], 0, *state.shape[1:])]
        for part in zip(*(x.split(chunk, 1) for x in tensors)) if v.shape[1] else ():
            before.append(state[:, None])
            output, state = run(*part, state, None)
            outputs.append(output)
        return torch.cat(outputs, 1), state, torch.cat(before, 1)
    ends = borders(cu_seqlens, tensors[0].shape[1])
    parts = [
        _in_chunks(run, tuple(x[:, a:b] for x in tensors), None if state is None else state[n : n + 1], None, chunk)
        for n, (a, b) in enumerate(zip(ends, ends[1:]))
    ]
    return tuple(torch.cat([part[i] for part in parts], dim) for i, dim in enumerate((1, 0, 1)))
