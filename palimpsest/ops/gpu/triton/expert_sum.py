"""What a token's experts gave, gathered from their rows and added up, one pass.

    y_n = sum_j rows[back_nj]

Grid      (token, block of channels).
Bound     by its bytes: each row in once, y out.
Answers   to ops/prefill.py, `expert_sum`. The sum runs over j in order: a run is the same to the bit.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK_D = 512


@triton.jit(do_not_specialize=["M"])
def expert_sum_kernel(rows, back, y, M, k: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    for j in tl.static_range(k):
        row = tl.minimum(tl.maximum(tl.load(back + n * k + j), 0), M - 1)  # no place addresses what is not there
        sum_D += tl.load(rows + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y + n * D + d, sum_D.to(y.dtype.element_ty), mask=d < D)


def expert_sum(rows: Tensor, back: Tensor) -> Tensor:
    """rows [M, D], back [N, k] int64, contiguous -> y [N, D]."""
    (M, D), (N, k) = rows.shape, back.shape
    y = rows.new_empty(N, D)
    if y.numel():
        expert_sum_kernel[(N, triton.cdiv(D, BLOCK_D))](rows, back, y, M, k=k, D=D, BLOCK_D=BLOCK_D, num_warps=2)
    return y
