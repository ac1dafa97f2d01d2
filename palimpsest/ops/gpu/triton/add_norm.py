"""The residual stream takes up what a layer adds, and is normalised for the next: one pass.

    x' = x + sum_j parts_j        y = x' / sqrt(mean x'^2 + eps) weight

Grid      (row).
Holds     a row in fp32.
Bound     by its bytes, and for a few rows by the launch.
Answers   to F.rms_norm of the sum.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_norm_kernel(
    x, parts, weight, sums, y, eps, J: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_D = d < D
    x_D = tl.load(x + row * D + d, mask=in_D, other=0.0).to(tl.float32)
    added_D = tl.zeros((BLOCK_D,), tl.float32)
    for j in tl.static_range(J):
        added_D += tl.load(parts + (row * J + j) * D + d, mask=in_D, other=0.0).to(tl.float32)
    sum_D = (x_D + added_D).to(sums.dtype.element_ty)
    tl.store(sums + row * D + d, sum_D, mask=in_D)
    x_D = sum_D.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_D * x_D, 0) / D + eps)
    weight_D = tl.load(weight + d, mask=in_D, other=0.0).to(tl.float32)
    tl.store(y + row * D + d, (x_D * scale * weight_D).to(y.dtype.element_ty), mask=in_D)


def add_norm(x: Tensor, parts: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [N, D], parts [N, J, D], weight [D], contiguous -> x' and y in x's dtype."""
    N, J, D = parts.shape
    sums, y = x.new_empty(N, D), x.new_empty(N, D)
    block = triton.next_power_of_2(D)
    add_norm_kernel[(N,)](x, parts, weight, sums, y, eps, J=J, D=D, BLOCK_D=block, num_warps=8 if block > 1024 else 4)
    return sums, y
