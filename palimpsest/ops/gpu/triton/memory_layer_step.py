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
def taps_of(x, window, token, channel, in_K, D: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """The last W inputs of some channels, [channel, tap], the token's own last."""
    w = tl.arange(0, BLOCK_W)[None, :]
    at = ((token * D + channel) * (W - 1))[:, None] + w
    before_KW = tl.load(window + at, mask=in_K[:, None] & (w < W - 1), other=0.0)
    x_K = tl.load(x + token * D + channel, mask=in_K, other=0.0)
    return tl.where(w == W - 1, x_K[:, None].to(before_KW.dtype), before_KW)


@triton.jit
def convolved(taps_KW, weight, channel, in_K, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """silu of the convolution, fp32."""
    w = tl.arange(0, BLOCK_W)[None, :]
    weight_KW = tl.load(weight + channel[:, None] * W + w, mask=in_K[:, None] & (w < W), other=0.0)
    y_K = tl.sum(taps_KW.to(tl.float32) * weight_KW.to(tl.float32), 1)
    return y_K * sigmoid(y_K)


@triton.jit
def move_on(taps_KW, window, token, channel, in_K, D: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """The window one token later."""
    w = tl.arange(0, BLOCK_W)[None, :]
    at = ((token * D + channel) * (W - 1))[:, None] + w - 1
    tl.store(window + at, taps_KW, mask=in_K[:, None] & (w > 0) & (w < W))


@triton.jit
def memory_layer_step_kernel(
    q, k, v, q_weight, k_weight, v_weight, q_window, k_window, v_window, decay, A_log, dt_bias, beta, gate, norm, state,
    out, scale, floor, beta_max, eps,
    H: tl.constexpr, K: tl.constexpr, W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, GATE: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, head = row // H, row % H
    D: tl.constexpr = H * K
    c, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K)
    in_K = c < K
    channel = head * K + c
    slab, in_slab = c[:, None] * K + d[None, :], (c < K)[:, None] & (d < K)[None, :]
    state += row * K * K  # a whole number of bytes further: 64-bit offsets of every entry would fill the registers

    S_KV = tl.load(state + slab, mask=in_slab, other=0.0)
    q_taps = taps_of(q, q_window, token, channel, in_K, D, W, BLOCK_W)
    k_taps = taps_of(k, k_window, token, channel, in_K, D, W, BLOCK_W)
    v_taps = taps_of(v, v_window, token, channel, in_K, D, W, BLOCK_W)
    gate_V = tl.load(gate + token * D + channel, mask=in_K, other=0.0).to(tl.float32)
    q_K = convolved(q_taps, q_weight, channel, in_K, W, BLOCK_W)
    k_K = convolved(k_taps, k_weight, channel, in_K, W, BLOCK_W)
    v_V = convolved(v_taps, v_weight, channel, in_K, W, BLOCK_W)
    tl.debug_barrier()  # a channel may be held by several threads: all have read before one writes
    move_on(q_taps, q_window, token, channel, in_K, D, W, BLOCK_W)
    move_on(k_taps, k_window, token, channel, in_K, D, W, BLOCK_W)
    move_on(v_taps, v_window, token, channel, in_K, D, W, BLOCK_W)
    q_K *= scale * tl.rsqrt(tl.sum(q_K * q_K, 0) + 1e-6)
    k_K *= tl.rsqrt(tl.sum(k_K * k_K, 0) + 1e-6)
    logit_K = tl.load(decay + token * D + channel, mask=in_K, other=0.0).to(tl.float32)
    logit_K += tl.load(dt_bias + channel, mask=in_K, other=0.0).to(tl.float32)
    g_K = tl.where(in_K, activated(logit_K, gate_rate(A_log, head), floor, GATE), 0.0)
    strength = beta_max * sigmoid(tl.load(beta + row).to(tl.float32))

    S_KV = tl.exp2(g_K * LOG2E)[:, None] * S_KV
    held_V, read_V = tl.sum(k_K[:, None] * S_KV, 0), tl.sum(q_K[:, None] * S_KV, 0)
    v_new_V = strength * (v_V - held_V)
    o_V = read_V + tl.sum(q_K * k_K, 0) * v_new_V  # what S + k v_new^T would give, without a second pass
    tl.store(state + slab, S_KV + k_K[:, None] * v_new_V[None, :], mask=in_slab)

    o_V *= tl.rsqrt(tl.sum(o_V * o_V, 0) / K + eps)
    o_V *= tl.load(norm + d, mask=d < K, other=0.0).to(tl.float32)
    o_V *= sigmoid(gate_V) * gate_V if SILU else sigmoid(gate_V)
    tl.store(out + token * D + head * K + d, o_V.to(out.dtype.element_ty), mask=d < K)


def memory_layer_step_(
    q: Tensor, k: Tensor, v: Tensor, weights: list[Tensor], windows: list[Tensor], decay: Tensor, A_log: Tensor,
    dt_bias: Tensor, beta: Tensor, gate: Tensor, norm: Tensor, state: Tensor, eps: float, beta_max: float, kind: int,
    floor: float, silu: bool,
) -> Tensor:  # fmt: skip
    """q, k, v, decay, gate [B, D]; weights [D, 1, W] and windows [B, D, W - 1] of q, k and v; beta [B, H]; norm [K]; state
    [B, H, K, K] fp32; all contiguous. kind: 1 softplus, 2 sigmoid. -> [B, D] in q's dtype."""
    B, H, K, _ = state.shape
    W = weights[0].shape[-1]
    out = torch.empty_like(q)
    memory_layer_step_kernel[(B * H,)](
        q, k, v, *weights, *windows, decay, A_log, dt_bias, beta, gate, norm, state, out, K**-0.5, floor, beta_max, eps,
        H=H, K=K, W=W, BLOCK_W=triton.next_power_of_2(W), BLOCK_K=max(16, triton.next_power_of_2(K)), GATE=kind, SILU=silu,
        num_warps=8 if K > 64 else 4,
    )  # fmt: skip
    return out
