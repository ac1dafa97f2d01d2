"""Projections of a few rows: several weights in one launch, each read once.

    y_i = x_i W_i^T        x_i [N, D], W_i [O_i, D], all in one dtype

Grid      (tiles of BLOCK_N outputs, those of all weights end to end).
Holds     BLOCK_N x BLOCK_M sums in fp32: the outputs stand in the rows, where tensor cores want 16 and more, and the
          few tokens in the columns.
Bound     by the weights' bytes.
Answers   to F.linear.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 6  # weights a launch


@triton.jit
def weight_rows_times_tokens(
    w, x, n, in_N, at_M, in_M, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_M] = w[n] x[at_M]^T; w [., D] and x [., D]."""
    acc_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    w_at, x_at = n.to(tl.int64)[:, None] * D, at_M.to(tl.int64)[None, :] * D
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        w_ND = tl.load(w + w_at + d[None, :], mask=in_N[:, None] & (d < D)[None, :], other=0.0)
        x_DM = tl.load(x + x_at + d[:, None], mask=(d < D)[:, None] & in_M[None, :], other=0.0)
        if PRECISION == "ieee":  # a sum of short sums errs less than a long one
            acc_NM += tl.dot(w_ND, x_DM, input_precision=PRECISION)
        else:
            acc_NM = tl.dot(w_ND, x_DM, acc_NM, input_precision=PRECISION)
    return acc_NM


@triton.jit(do_not_specialize=["N"])
def project_kernel(
    x0, x1, x2, x3, x4, x5, w0, w1, w2, w3, w4, w5, y0, y1, y2, y3, y4, y5, N,
    O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr, O3: tl.constexpr, O4: tl.constexpr, O5: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    S1: tl.constexpr = (O0 + BLOCK_N - 1) // BLOCK_N
    S2: tl.constexpr = S1 + (O1 + BLOCK_N - 1) // BLOCK_N
    S3: tl.constexpr = S2 + (O2 + BLOCK_N - 1) // BLOCK_N
    S4: tl.constexpr = S3 + (O3 + BLOCK_N - 1) // BLOCK_N
    S5: tl.constexpr = S4 + (O4 + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    x, w, y = x0, w0, y0
    if tile >= S1:
        x, w, y = x1, w1, y1
    if tile >= S2:
        x, w, y = x2, w2, y2
    if tile >= S3:
        x, w, y = x3, w3, y3
    if tile >= S4:
        x, w, y = x4, w4, y4
    if tile >= S5:
        x, w, y = x5, w5, y5
    x, w = tl.multiple_of(x, 16), tl.multiple_of(w, 16)
    first = (
        tl.where(tile >= S1, S1, 0) + tl.where(tile >= S2, S2 - S1, 0) + tl.where(tile >= S3, S3 - S2, 0)
        + tl.where(tile >= S4, S4 - S3, 0) + tl.where(tile >= S5, S5 - S4, 0)
    )  # fmt: skip
    outputs = (
        O0 + tl.where(tile >= S1, O1 - O0, 0) + tl.where(tile >= S2, O2 - O1, 0) + tl.where(tile >= S3, O3 - O2, 0)
        + tl.where(tile >= S4, O4 - O3, 0) + tl.where(tile >= S5, O5 - O4, 0)
    )  # fmt: skip
    n = (tile - first) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_N, in_M = n < outputs, m < N
    y_NM = weight_rows_times_tokens(w, x, n, in_N, m, in_M, D, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION)
    tl.store(y + m[None, :] * outputs + n[:, None], y_NM.to(y.dtype.element_ty), mask=in_N[:, None] & in_M[None, :])


def project(xs: list[Tensor], weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """xs [N, D] each, weights [O_i, D], contiguous, 16-byte aligned -> [N, O_i] in dtype."""
    N, D = xs[0].shape
    outputs = [x.new_empty(N, len(w), dtype=dtype) for x, w in zip(xs, weights)]
    settings = launch(sum(map(len, weights)), D, N, weights[0].dtype)
    block_n = settings["BLOCK_N"]
    grid = (sum(triton.cdiv(len(w), block_n) for w in weights), triton.cdiv(N, settings["BLOCK_M"]))
    fill = lambda values, absent: [*values, *[absent] * (MOST - len(values))]
    sizes = fill([len(w) for w in weights], 0)
    project_kernel[grid](
        *fill(xs, xs[0]), *fill(weights, weights[0]), *fill(outputs, outputs[0]), N,
        **{f"O{i}": size for i, size in enumerate(sizes)}, D=D, **settings,
    )  # fmt: skip
    return outputs


def launch(outputs: int, D: int, N: int, dtype: torch.dtype) -> dict:
    """Tiles small enough that every multiprocessor has some, and no smaller."""
    wide = dtype == torch.float32
    block_n = 64 if outputs >= 8192 else 32 if outputs >= 2048 else 16
    return dict(
        BLOCK_N=block_n, BLOCK_M=min(64, max(16, triton.next_power_of_2(N))),
        BLOCK_D=min(64 if wide else 128, max(16, triton.next_power_of_2(D))),
        PRECISION="ieee" if wide else "tf32", num_warps=4, num_stages=2 if wide else 5 if block_n < 64 and D > 256 else 4,
    )  # fmt: skip
