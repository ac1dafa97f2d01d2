"""One token through a KDA layer between its projections: convolutions, SiLU, unit length, gates, the memory, the way out.

    q, k, v   silu(sum_w weight_w window_w), q and k then at unit length; the windows move on
    memory    S <- (I - beta k k^T) Diag(alpha) S + beta k v^T,  o = S^T q
    y         o / sqrt(mean o^2 + eps) norm gate(g), head by head

Grid      (sequence x head).
Holds     the K x K memory in fp32 registers: read once, written once.
Bound     by the memory's 8 K^2 bytes a head; for a few heads by one multiprocessor's share of the bandwidth.
Answers   to ops/decode.py, `memory_layer_step_`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from palimpsest.ops.gpu.triton.tiles import LOG2E, activated, gate_rate, sigmoid


@triton.jit
def convolved(x, weight, window, token, channel, in_K, D: tl.constexpr, W: tl.constexpr):
    """silu of the convolution for one token and some channels, fp32."""
    at = (token * D + channel) * (W - 1)
    x_K = tl.load(x + token * D + channel, mask=in_K, other=0.0).to(tl.float32)
    y_K = x_K * tl.load(weight + channel * W + W - 1, mask=in_K, other=0.0).to(tl.float32)
    for w in tl.static_range(W - 1):
        before_K = tl.load(window + at + w, mask=in_K, other=0.0).to(tl.float32)
        y_K += before_K * tl.load(weight + channel * W + w, mask=in_K, other=0.0).to(tl.float32)
    return y_K * sigmoid(y_K)


@triton.jit
def moved_on(x, window, token, channel, in_K, D: tl.constexpr, W: tl.constexpr):
    """The window one token later."""
    at = (token * D + channel) * (W - 1)
    x_K = tl.load(x + token * D + channel, mask=in_K, other=0.0)
    for w in tl.static_range(W - 2):
        next_K = tl.load(window + at + w + 1, mask=in_K, other=0.0)
        tl.debug_barrier()  # a channel may be held by several threads: all have read before one writes
        tl.store(window + at + w, next_K, mask=in_K)
    tl.debug_barrier()
    tl.store(window + at + W - 2, x_K.to(window.dtype.element_ty), mask=in_K)


@triton.jit
def memory_layer_step_kernel(
    q, k, v, q_weight, k_weight, v_weight, q_window, k_window, v_window, decay, A_log, dt_bias, beta, gate, norm, state,
    out, scale, floor, beta_max, eps,
    H: tl.constexpr, K: tl.constexpr, W: tl.constexpr, BLOCK_K: tl.constexpr, GATE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, head = row // H, row % H
    D: tl.constexpr = H * K
    c, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K)
    in_K = c < K
    channel = head * K + c
    slab, in_slab = row * K * K + c[:, None] * K + d[None, :], (c < K)[:, None] & (d < K)[None, :]

    S_KV = tl.load(state + slab, mask=in_slab, other=0.0)
    q_K = convolved(q, q_weight, q_window, token, channel, in_K, D, W)
    k_K = convolved(k, k_weight, k_window, token, channel, in_K, D, W)
    v_V = convolved(v, v_weight, v_window, token, channel, in_K, D, W)
    q_K *= scale * tl.rsqrt(tl.sum(q_K * q_K, 0) + 1e-6)
    k_K *= tl.rsqrt(tl.sum(k_K * k_K, 0) + 1e-6)
    logit_K = tl.load(decay + token * D + channel, mask=in_K, other=0.0).to(tl.float32)
    logit_K += tl.load(dt_bias + channel, mask=in_K, other=0.0).to(tl.float32)
    g_K = tl.where(in_K, activated(logit_K, gate_rate(A_log, head), floor, GATE), 0.0)
    strength = beta_max * sigmoid(tl.load(beta + row).to(tl.float32))

    S_KV = tl.exp2(g_K * LOG2E)[:, None] * S_KV
    fresh_V = strength * (v_V - tl.sum(k_K[:, None] * S_KV, 0))
    S_KV += k_K[:, None] * fresh_V[None, :]
    o_V = tl.sum(q_K[:, None] * S_KV, 0)
    tl.store(state + slab, S_KV, mask=in_slab)

    o_V *= tl.rsqrt(tl.sum(o_V * o_V, 0) / K + eps)
    o_V *= tl.load(norm + d, mask=d < K, other=0.0).to(tl.float32)
    gate_V = tl.load(gate + token * D + head * K + d, mask=d < K, other=0.0).to(tl.float32)
    o_V *= sigmoid(gate_V) * gate_V if SILU else sigmoid(gate_V)
    tl.store(out + token * D + head * K + d, o_V.to(out.dtype.element_ty), mask=d < K)

    tl.debug_barrier()
    moved_on(q, q_window, token, channel, in_K, D, W)
    moved_on(k, k_window, token, channel, in_K, D, W)
    moved_on(v, v_window, token, channel, in_K, D, W)


def memory_layer_step_(
    q: Tensor, k: Tensor, v: Tensor, weights: list[Tensor], windows: list[Tensor], decay: Tensor, A_log: Tensor,
    dt_bias: Tensor, beta: Tensor, gate: Tensor, norm: Tensor, state: Tensor, eps: float, beta_max: float, kind: int,
    floor: float, silu: bool,
) -> Tensor:  # fmt: skip
    """q, k, v, decay, gate [B, D]; weights [D, 1, W] and windows [B, D, W - 1] of q, k and v; beta [B, H]; norm [K]; state
    [B, H, K, K] fp32; all contiguous. kind: 1 softplus, 2 sigmoid. -> [B, D] in q's dtype."""
    B, H, K, _ = state.shape
    out = torch.empty_like(q)
    memory_layer_step_kernel[(B * H,)](
        q, k, v, *weights, *windows, decay, A_log, dt_bias, beta, gate, norm, state, out, K**-0.5, floor, beta_max, eps,
        H=H, K=K, W=weights[0].shape[-1], BLOCK_K=max(16, triton.next_power_of_2(K)), GATE=kind, SILU=silu,
        num_warps=8 if K > 64 else 4,
    )  # fmt: skip
    return out
