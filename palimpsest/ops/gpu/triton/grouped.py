"""Grouped products: rows sorted by group, each group times a matrix of its own; and their outer products.

Grid      product: (tiles of rows, of which no group shares one, blocks of columns); outer: (group, block, block).
Holds     a tile of the result in fp32 registers.
Bound     by the tensor cores, or, for few rows a group, by the matrices' bytes.
Answers   to experts.grouped_product and experts.grouped_outer in their form "loop".

The host does not know how many rows a group has. It starts as many programs as there can be tiles, ceil(M / BLOCK_M) + E;
each finds its group in `ends`, and those beyond the last tile leave at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["M", "E"])
def product_kernel(
    rows, matrices, ends, out, M, E, A, B, row_stride, stride_e, stride_b, stride_a,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group = tl.arange(0, BLOCK_E)
    end_E = tl.load(ends + group, mask=group < E, other=0)
    start_E = tl.load(ends + group - 1, mask=(group > 0) & (group < E), other=0)
    tiles_E = tl.where(group < E, (end_E - start_E + BLOCK_M - 1) // BLOCK_M, 0)
    before_E = tl.cumsum(tiles_E, 0)
    e = tl.sum((before_E <= tl.program_id(0)).to(tl.int32), 0)  # the first group whose tiles reach this one
    if e < E:
        mine = group == e
        start, end = tl.sum(tl.where(mine, start_E, 0), 0), tl.sum(tl.where(mine, end_E, 0), 0)
        tile = tl.program_id(0) - tl.sum(tl.where(mine, before_E - tiles_E, 0), 0)
        m = start + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
        in_M, in_B = (m >= 0) & (m < tl.minimum(end, M)), b < B  # whatever `ends` says
        matrix = matrices + e.to(tl.int64) * stride_e + b[None, :] * stride_b
        row = rows + m[:, None].to(tl.int64) * row_stride
        acc_MB = tl.zeros((BLOCK_M, BLOCK_B), tl.float32)
        for first in range(0, A, BLOCK_A):
            a = first + tl.arange(0, BLOCK_A)
            x_MA = tl.load(row + a[None, :], mask=in_M[:, None] & (a < A)[None, :], other=0.0)
            w_AB = tl.load(matrix + a[:, None] * stride_a, mask=(a < A)[:, None] & in_B[None, :], other=0.0)
            acc_MB += tl.dot(x_MA, w_AB, input_precision=PRECISION)
        at = m[:, None].to(tl.int64) * B + b[None, :]
        tl.store(out + at, acc_MB.to(out.dtype.element_ty), mask=in_M[:, None] & in_B[None, :])


@triton.jit(do_not_specialize=["M"])
def outer_kernel(
    left, right, ends, out, M, A, B, left_stride, right_stride,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0)
    end = tl.minimum(tl.load(ends + e), M)  # no row beyond them is read, whatever `ends` says
    start = tl.maximum(tl.load(ends + e - 1, mask=e > 0, other=0), 0)
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    b = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_A, in_B = a < A, b < B
    acc_AB = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for first in range(start, end, BLOCK_M):
        m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        in_M = m < end
        l_AM = tl.load(left + m[None, :] * left_stride + a[:, None], mask=in_A[:, None] & in_M[None, :], other=0.0)
        r_MB = tl.load(right + m[:, None] * right_stride + b[None, :], mask=in_M[:, None] & in_B[None, :], other=0.0)
        acc_AB += tl.dot(l_AM, r_MB, input_precision=PRECISION)
    at = (e.to(tl.int64) * A + a[:, None]) * B + b[None, :]
    tl.store(out + at, acc_AB.to(out.dtype.element_ty), mask=in_A[:, None] & in_B[None, :])


def product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows [M, A], matrices [E, B, A] of any strides, ends [E] int32 -> [M, B]; rows beyond the last end are void."""
    (M, A), (E, B, _) = rows.shape, matrices.shape
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = rows.new_empty(M, B)
    wide = rows.dtype == torch.float32
    block_m, block_b, block_a = (64, 64, 32) if wide else (128 if M >= 64 * E else 32, 128, 64)
    if M:
        product_kernel[(triton.cdiv(M, block_m) + E, triton.cdiv(B, block_b))](
            rows, matrices, ends, out, M, E, A, B, rows.stride(0), *matrices.stride(),
            BLOCK_E=max(16, triton.next_power_of_2(E)), BLOCK_M=block_m, BLOCK_A=block_a, BLOCK_B=block_b,
            PRECISION="ieee" if wide else "tf32", num_warps=4 if wide or block_m < 128 else 8, num_stages=2 if wide else 3,
        )  # fmt: skip
    return out


def outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left [M, A], right [M, B], ends [E] int32 -> [E, A, B] in the dtype of left."""
    (M, A), B, E = left.shape, right.shape[1], len(ends)
    left, right = (x if x.stride(1) == 1 else x.contiguous() for x in (left, right))
    out = left.new_empty(E, A, B)
    wide = left.dtype == torch.float32
    block = 64 if wide else 128
    outer_kernel[(E, triton.cdiv(A, block), triton.cdiv(B, block))](
        left, right, ends, out, M, A, B, left.stride(0), right.stride(0),
        BLOCK_M=32 if wide else 64, BLOCK_A=block, BLOCK_B=block,
        PRECISION="ieee" if wide else "tf32", num_warps=4 if wide else 8, num_stages=2 if wide else 3,
    )  # fmt: skip
    return out
