"""The delta memory, one or a few tokens, in place: the decode step.

Grid      (sequence x value head, block of value channels).
Holds     a K x BLOCK_V slab of the memory in fp32 registers over all tokens of the call. Each entry is read once and
          written once, or once per token where the memories in between are wanted (speculative decoding).
Bound     by the memory's 8 K V bytes per head.
Answers   to reference.delta_memory; the five lines that compute are its lines.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from palimpsest.ops.arguments import check
from palimpsest.ops.gpu.triton.configs import config
from palimpsest.ops.gpu.triton.tiles import LOG2E


@triton.jit(do_not_specialize=["T"])
def step_kernel(
    q, k, v, g, beta, state, out, states, T, H, HV, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, EACH: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sequence, head = row // HV, row % HV
    c = tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_K, in_V = c < K, d < V
    slab, in_slab = row * K * V + c[:, None] * V + d[None, :], in_K[:, None] & in_V[None, :]

    S_KV = tl.load(state + slab, mask=in_slab, other=0.0)
    for t in range(0, 1 if ONE else T):
        token = sequence * T + t
        key_at = (token * H + head // (HV // H)) * K + c
        value_at = token * HV + head
        q_K = tl.load(q + key_at, mask=in_K, other=0.0).to(tl.float32) * scale
        k_K = tl.load(k + key_at, mask=in_K, other=0.0).to(tl.float32)
        g_K = tl.load(g + value_at * K + c, mask=in_K, other=0.0).to(tl.float32)
        v_V = tl.load(v + value_at * V + d, mask=in_V, other=0.0).to(tl.float32)
        beta_t = tl.load(beta + value_at).to(tl.float32)

        S_KV = tl.exp2(g_K * LOG2E)[:, None] * S_KV
        held_V = tl.sum(k_K[:, None] * S_KV, 0)
        v_new_V = beta_t * (v_V - held_V)
        S_KV += k_K[:, None] * v_new_V[None, :]
        o_V = tl.sum(q_K[:, None] * S_KV, 0)

        tl.store(out + value_at * V + d, o_V.to(out.dtype.element_ty), mask=in_V)
        if EACH:
            tl.store(states + (token * HV + head) * K * V + c[:, None] * V + d[None, :], S_KV, mask=in_slab)
    tl.store(state + slab, S_KV, mask=in_slab)


def step_(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, scale: float) -> Tensor:
    """Advance `state` by one token, in place, and return what the token reads. No gradient.

    Args:
        q, k: [B, H, K]. v: [B, HV, V]. log_decay: [B, HV, K]. beta: [B, HV].
        state: [B, HV, K, V], fp32, contiguous.

    Returns:
        [B, HV, V] in v's dtype.
    """
    tokens = (x[:, None] for x in (q, k, v, log_decay, beta))
    return _advance_(*tokens, state, scale, each=False)[0][:, 0]


def steps_(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, scale: float, each: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Advance `state` by a few tokens, in place: what speculative decoding verifies at once.

    Args:
        q, k: [B, T, H, K]. v: [B, T, HV, V]. log_decay: [B, T, HV, K]. beta: [B, T, HV]. T: 2 to 8 pay off.
        state: [B, HV, K, V], fp32, contiguous.
        each: also return the memory after every token, [B, T, HV, K, V], to go back to the last accepted one.

    Returns:
        The outputs [B, T, HV, V] and those memories, or None.
    """
    check("gpu_steps", (q, k, v, log_decay, beta, state))
    return _advance_(q, k, v, log_decay, beta, state, scale, each)


def _advance_(q, k, v, log_decay, beta, state, scale, each):
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, log_decay, beta))
    out = torch.empty_like(v)
    states = state.new_empty(B, T, HV, K, V) if each else None
    settings = config("step", K > 128)
    block_v = min(settings.pop("block_v"), max(16, triton.next_power_of_2(V)))
    if B:
        step_kernel[(B * HV, triton.cdiv(V, block_v))](
            q, k, v, g, beta, state, out, states, T, H, HV, scale,
            K=K, V=V, BLOCK_K=max(16, triton.next_power_of_2(K)), BLOCK_V=block_v, EACH=each, ONE=T == 1, **settings,
        )  # fmt: skip
    if not state.is_inference():
        increment_version(state)  # autograd sees that a tensor which it has kept was edited
    return out, states
