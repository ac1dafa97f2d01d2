"""What FLA's arguments mean to us: hints about speed do nothing, what changes a result is honoured, the rest is refused."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from palimpsest.ops.arguments import state_dtype
from palimpsest.ops.gates import SigmoidDecay, SoftplusDecay

HINTS = frozenset(  # how FLA should run, not what it should compute
    "chunk_size chunk_indices cu_seqlens_cpu disable_recompute max_num_seqs safe_gate use_graph".split()
)


def check_options(function: str, options: dict[str, Any], *honoured: str) -> dict[str, Any]:
    """The options that a function honours besides its named arguments; hints are dropped, anything else is refused.

    Raises:
        TypeError: an option that no version of FLA's function has.
        NotImplementedError: a context-parallel call, or the heads-first layout that FLA removed.

    >>> check_options("chunk_kda", {"chunk_size": 32, "A_log": 1}, "A_log")
    {'A_log': 1}
    """
    for name, value in options.items():
        if name in HINTS or name in honoured or name in ("transpose_state_layout", "output_attentions"):
            continue
        if name == "cp_context":
            if value is not None:
                raise NotImplementedError(
                    f"{function} got cp_context; context parallelism is not offered here, pass whole sequences"
                )
        elif name == "head_first":
            if value:
                raise NotImplementedError(f"{function} got head_first=True; pass tensors as [B, T, H, ...]")
        else:
            raise TypeError(f"{function} got {name}, which flash-linear-attention 0.6 does not have either")
    return {name: options[name] for name in honoured if name in options}


def state_layout(function: str, state_v_first: bool, options: dict[str, Any]) -> bool:
    """Whether states are [N, H, V, K], by either of the argument's names."""
    older = options.get("transpose_state_layout")
    if older is None:
        return state_v_first
    if state_v_first:
        raise ValueError(f"{function} got both state_v_first and its older name transpose_state_layout; pass the first")
    return bool(older)


def state_in(state: Tensor | None, v_first: bool, values: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """A state in our layout and dtype: [N, HV, K, V], fp32 (fp64 for fp64 values)."""
    if state is None:
        return None
    sequences = values.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if state.shape[0] != sequences:
        raise ValueError(f"initial_state has {state.shape[0]} rows; there are {sequences} sequences")
    state = state.mT if v_first else state
    return state.to(state_dtype(values.dtype)).contiguous()


def state_out(state: Tensor, v_first: bool, wanted: bool) -> Tensor | None:
    """The final state in the caller's layout, or None."""
    if not wanted:
        return None
    return state.mT.contiguous() if v_first else state


def kda_gate(logits: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None):
    """The gate of KDA and GDN-2 with what is left out filled in: no bias is zero, no A_log is a rate of one.

    Raises:
        ValueError: neither A_log nor lower_bound, so that no gate is named.
    """
    HV, K = logits.shape[-2:]
    wide = state_dtype(logits.dtype)
    if A_log is None and lower_bound is None:
        raise ValueError("use_gate_in_kernel came without A_log and without lower_bound; pass one, or gate g yourself")
    A_log = logits.new_zeros(HV, dtype=wide) if A_log is None else A_log
    dt_bias = logits.new_zeros(HV * K, dtype=wide) if dt_bias is None else dt_bias
    return SoftplusDecay(A_log, dt_bias) if lower_bound is None else SigmoidDecay(A_log, dt_bias, lower_bound)


def beta_of(beta: Tensor, use_beta_sigmoid_in_kernel: bool, allow_neg_eigval: bool) -> Tensor:
    """beta itself, or its sigmoid in fp32, doubled where eigenvalues may be negative."""
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval came without use_beta_sigmoid_in_kernel; double beta yourself")
    if not use_beta_sigmoid_in_kernel:
        return beta
    return beta.to(state_dtype(beta.dtype)).sigmoid() * (2.0 if allow_neg_eigval else 1.0)


def expand_to(beta: Tensor | None, q: Tensor, v: Tensor) -> Tensor:
    """beta, or ones for every value head where there is none."""
    return q.new_ones(v.shape[:3]) if beta is None else beta
