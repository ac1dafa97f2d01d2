"""The way out of a memory: each head normalised and gated, one pass.

    y = x / sqrt(mean x^2 + eps) weight * act(gate)        act: sigmoid or silu

Grid      (block of heads of tokens).
Holds     BLOCK_R x K numbers in fp32.
Bound     by its bytes: x and gate in, y out.
Answers   to ops/prefill.py, `gated_norm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from palimpsest.ops.gpu.triton.tiles import sigmoid


@triton.jit(do_not_specialize=["R"])
def gated_norm_kernel(
    x, gate, weight, y, R, eps, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    r, c = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    inside = (r < R)[:, None] & (c < K)[None, :]
    at = r[:, None] * K + c[None, :]
    x_RK = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gate_RK = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    weight_K = tl.load(weight + c, mask=c < K, other=0.0).to(tl.float32)
    scale_R = tl.rsqrt(tl.sum(x_RK * x_RK, 1) / K + eps)
    open_RK = sigmoid(gate_RK)
    if SILU:
        open_RK = gate_RK * open_RK
    y_RK = x_RK * scale_R[:, None] * weight_K[None, :] * open_RK
    tl.store(y + at, y_RK.to(y.dtype.element_ty), mask=inside)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """x [..., H, K] and gate [..., H K], contiguous, weight [K] -> y like gate."""
    K, y = x.shape[-1], torch.empty_like(gate)
    rows, block_k = x.numel() // K, triton.next_power_of_2(K)
    block_r = max(1, 2048 // block_k)
    if rows:
        gated_norm_kernel[(triton.cdiv(rows, block_r),)](
            x, gate, weight, y, rows, eps, K=K, BLOCK_R=block_r, BLOCK_K=block_k, SILU=silu, num_warps=4
        )
    return y
