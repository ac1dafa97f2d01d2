"""flash-linear-attention's KDA signatures over ours, for code that is written against them.

    from palimpsest.compat.fla import chunk_kda

What cannot be honoured is refused by name, never ignored: these functions take no **kwargs. Differences that remain:
the final state is always computed (and dropped unless asked for), and runs on any device that `palimpsest.kda` does.
Signatures as of flash-linear-attention 0.6.
"""

from torch import Tensor

from palimpsest.ops.gates import SigmoidDecay, SoftplusDecay, l2norm
from palimpsest.ops.variants import kda


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
    cu_seqlens: Tensor | None = None,
    *,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """KDA over whole sequences. Layout [B, T, H, K]; g is a natural log decay, or gate logits with use_gate_in_kernel.

    Args as flash-linear-attention's. lower_bound chooses the bounded gate; safe_gate alone is a promise about the
    data that our kernels do not need. With state_v_first the state is [N, H, V, K] on the way in and out.

    Returns:
        (output [B, T, HV, V], final state [N, HV, K, V] or None).

    Raises:
        ValueError: A_log without use_gate_in_kernel, or a gate without A_log.
    """
    if use_gate_in_kernel and (A_log is None or dt_bias is None):
        raise ValueError("use_gate_in_kernel came without A_log or dt_bias; pass both, or gate g yourself")
    if not use_gate_in_kernel and (A_log is not None or dt_bias is not None or lower_bound is not None):
        raise ValueError("A_log, dt_bias or lower_bound came without use_gate_in_kernel=True and would be ignored")
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval came without use_beta_sigmoid_in_kernel; double beta yourself")
    if use_gate_in_kernel:
        assert A_log is not None
        assert dt_bias is not None
        gate = SoftplusDecay(A_log, dt_bias) if lower_bound is None else SigmoidDecay(A_log, dt_bias, lower_bound)
        g = gate(g)
    if use_beta_sigmoid_in_kernel:
        beta = beta.float().sigmoid() * (2.0 if allow_neg_eigval else 1.0)
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    if initial_state is not None and state_v_first:
        initial_state = initial_state.mT
    output, state = kda(q, k, v, g, beta, state=initial_state, scale=scale, cu_seqlens=cu_seqlens)
    state = state.mT if state_v_first else state
    return output, state if output_final_state else None


fused_recurrent_kda = chunk_kda  # one law: ours picks the form by the problem, and every form has its gradient
