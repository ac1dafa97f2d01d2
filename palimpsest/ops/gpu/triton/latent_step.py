"""Latent attention of one or a few new tokens over a cache with room: the keys split, then merged.

Grid      query   (head, and one more that writes the new rows; tile of R; tile of sequences): queries against latents.
          split   (sequence, tile of BLOCK_M of the T H queries, split of the keys). A split takes its share of the length
                  that it reads on the device, so one grid serves every length.
          merge   (sequence x query).
Holds     split   BLOCK_M x R sums in fp32; a tile of rows is read once, as keys and as values.
Bound     by the rows' bytes: 2 (R + P) a token and sequence in half precision.
Answers   to ops/decode.py, `latent_step` and `latent_layer_step_`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from palimpsest.ops.gpu.triton.tiles import LOG2E


@triton.jit(do_not_specialize=["S", "SPLITS"])
def latent_split_kernel(
    q, rows, length, read, largest, total, S, SPLITS,
    T: tl.constexpr, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    m, r, p = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    in_M, in_R, in_P = m < T * H, r < R, p < P
    C: tl.constexpr = R + P
    held = tl.maximum(tl.minimum(tl.load(length + b), S), 0).to(tl.int32)
    until_M = held - T + 1 + m // H  # rows that a query may see
    share = tl.cdiv(tl.cdiv(held, BLOCK_S), SPLITS) * BLOCK_S
    start = split * share

    q_at = (b * T * H + m)[:, None] * C
    q_MR = tl.load(q + q_at + r[None, :], mask=in_M[:, None] & in_R[None, :], other=0.0)
    q_MP = tl.load(q + q_at + R + p[None, :], mask=in_M[:, None] & in_P[None, :], other=0.0)
    read_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    largest_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(start, tl.minimum(start + share, held), BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        in_S = s < held
        at = (b * S + s)[:, None] * C
        row_SR = tl.load(rows + at + r[None, :], mask=in_S[:, None] & in_R[None, :], other=0.0)
        scores_MS = tl.dot(q_MR, tl.trans(row_SR), input_precision=PRECISION)
        if P > 0:
            row_SP = tl.load(rows + at + R + p[None, :], mask=in_S[:, None] & in_P[None, :], other=0.0)
            scores_MS = tl.dot(q_MP, tl.trans(row_SP), scores_MS, input_precision=PRECISION)
        scores_MS = tl.where(s[None, :] < until_M[:, None], scores_MS * LOG2E, float("-inf"))
        new_M = tl.maximum(largest_M, tl.max(scores_MS, 1))
        safe_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        weights_MS = tl.exp2(scores_MS - safe_M[:, None])
        fade_M = tl.exp2(largest_M - safe_M)
        total_M = total_M * fade_M + tl.sum(weights_MS, 1)
        read_MR = read_MR * fade_M[:, None]
        read_MR = tl.dot(weights_MS.to(row_SR.dtype), row_SR, read_MR, input_precision=PRECISION)
        largest_M = new_M
    out = (b * T * H + m) * SPLITS + split
    tl.store(largest + out, largest_M, mask=in_M)
    tl.store(total + out, total_M, mask=in_M)
    tl.store(read + out[:, None] * R + r[None, :], read_MR, mask=in_M[:, None] & in_R[None, :])


@triton.jit(do_not_specialize=["SPLITS"])
def latent_merge_kernel(
    read, largest, total, out, SPLITS, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x, r = tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_R)
    largest_X = tl.load(largest + row * SPLITS + x, mask=x < SPLITS, other=float("-inf"))
    top = tl.max(largest_X, 0)
    total_X = tl.load(total + row * SPLITS + x, mask=x < SPLITS, other=0.0) * tl.exp2(largest_X - top)
    sum_R = tl.zeros((BLOCK_R,), tl.float32)
    for i in range(0, SPLITS):
        fade = tl.exp2(tl.load(largest + row * SPLITS + i) - top)
        sum_R += fade * tl.load(read + (row * SPLITS + i) * R + r, mask=r < R, other=0.0)
    tl.store(out + row * R + r, (sum_R / tl.sum(total_X, 0)).to(out.dtype.element_ty), mask=r < R)


@triton.jit(do_not_specialize=["B", "S"])
def latent_query_kernel(
    q, latent, norm, weights, rows, length, out, B, S, scale, eps,
    H: tl.constexpr, N: tl.constexpr, P: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE_R: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = R + P
    head, tile = tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_B = b < B
    p = tl.arange(0, BLOCK_P)
    if head < H:
        n, r = tl.arange(0, BLOCK_N), tile * BLOCK_R + tl.arange(0, BLOCK_R)
        q_at = (b * H + head)[:, None] * (N + P)
        q_MN = tl.load(q + q_at + n[None, :], mask=in_B[:, None] & (n < N)[None, :], other=0.0)
        w_at = (head * (N + V) + n)[:, None] * R + r[None, :]
        w_NR = tl.load(weights + w_at, mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)
        q_MR = tl.dot(q_MN, w_NR, input_precision=PRECISION) * scale
        out_at = (b * H + head)[:, None] * C
        tl.store(out + out_at + r[None, :], q_MR.to(out.dtype.element_ty), mask=in_B[:, None] & (r < R)[None, :])
        if tile == 0:
            in_MP = in_B[:, None] & (p < P)[None, :]
            q_MP = tl.load(q + q_at + N + p[None, :], mask=in_MP, other=0.0).to(tl.float32) * scale
            tl.store(out + out_at + R + p[None, :], q_MP.to(out.dtype.element_ty), mask=in_MP)
    elif tile == 0:
        r = tl.arange(0, WHOLE_R)
        in_MR, in_MP = in_B[:, None] & (r < R)[None, :], in_B[:, None] & (p < P)[None, :]
        held_M = tl.load(length + b, mask=in_B, other=0)
        to = (b.to(tl.int64) * S + tl.maximum(tl.minimum(held_M, S - 1), 0))[:, None] * C
        x_MR = tl.load(latent + b[:, None] * C + r[None, :], mask=in_MR, other=0.0).to(tl.float32)
        x_MR *= tl.rsqrt(tl.sum(x_MR * x_MR, 1) / R + eps)[:, None]
        x_MR *= tl.load(norm + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
        x_MP = tl.load(latent + b[:, None] * C + R + p[None, :], mask=in_MP, other=0.0)
        tl.store(rows + to + r[None, :], x_MR.to(rows.dtype.element_ty), mask=in_MR)
        tl.store(rows + to + R + p[None, :], x_MP, mask=in_MP)
        tl.debug_barrier()  # every thread has read the length before one writes it
        tl.store(length + b, held_M + 1, mask=in_B)


def latent_layer_step_(
    q: Tensor, latent: Tensor, norm: Tensor, weights: Tensor, rows: Tensor, length: Tensor, eps: float
) -> Tensor:
    """q [B, H (N + P)], latent [B, R + P], norm [R], weights [H, N + V, R], rows [B, S, R + P], length [B] int64, all
    contiguous; rows and length are edited in place -> [B, H V]."""
    (B, S, C), (H, X, R) = rows.shape, weights.shape
    P = C - R
    N = q.shape[1] // H - P
    V = X - N
    wide = q.dtype == torch.float32
    precision = "ieee" if wide else "tf32"
    absorbed = q.new_empty(B, 1, H, C)
    block_r = min(64 if wide else 128, max(16, triton.next_power_of_2(R)))
    latent_query_kernel[(H + 1, triton.cdiv(R, block_r), triton.cdiv(B, 16))](
        q, latent, norm, weights, rows, length, absorbed, B, S, (N + P) ** -0.5, eps, H=H, N=N, P=P, V=V, R=R,
        BLOCK_N=max(16, triton.next_power_of_2(N)), BLOCK_P=max(16, triton.next_power_of_2(max(P, 1))), BLOCK_R=block_r,
        WHOLE_R=triton.next_power_of_2(R), BLOCK_M=16, PRECISION=precision, num_warps=4,
    )  # fmt: skip
    read_HBR = merge(*split(absorbed, rows, length, R), q.dtype).view(B, H, R).transpose(0, 1)
    return torch.bmm(read_HBR, weights[:, N:].mT).transpose(0, 1).reshape(B, H * V)


def latent_step(q: Tensor, rows: Tensor, length: Tensor, value_dim: int, splits: int = 0) -> Tensor:
    """q [B, T, H, C], rows [B, S, C], contiguous; length [B] int64, T at least -> [B, T, H, R] in q's dtype."""
    B, T, H, _ = q.shape
    return merge(*split(q, rows, length, value_dim, splits), q.dtype).view(B, T, H, value_dim)


def merge(read: Tensor, largest: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    """What the splits of each query read together, [queries, R]."""
    *queries, splits, R = read.shape
    out = read.new_empty(math.prod(queries), R, dtype=dtype)
    latent_merge_kernel[(len(out),)](
        read, largest, total, out, splits, R=R, BLOCK_R=max(16, triton.next_power_of_2(R)),
        BLOCK_X=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip
    return out


def split(q: Tensor, rows: Tensor, length: Tensor, value_dim: int, splits: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """What each split of the keys reads, [B, T H, splits, R] fp32, its largest score and its sum of weights."""
    (B, T, H, C), S, R = q.shape, rows.shape[1], value_dim
    wide = q.dtype == torch.float32
    block_m, block_s = (16 if T * H <= 16 else 32), (16 if wide else 32)
    tiles = B * triton.cdiv(T * H, block_m)
    splits = splits or max(1, min(128, triton.cdiv(264, tiles), triton.cdiv(S, 2 * block_s)))
    largest, total = (q.new_empty(B, T * H, splits, dtype=torch.float32) for _ in range(2))
    read = q.new_empty(B, T * H, splits, R, dtype=torch.float32)
    block_r = max(16, triton.next_power_of_2(R))
    latent_split_kernel[(B, triton.cdiv(T * H, block_m), splits)](
        q, rows, length, read, largest, total, S, splits, T=T, H=H, R=R, P=C - R, BLOCK_M=block_m, BLOCK_S=block_s,
        BLOCK_R=block_r, BLOCK_P=max(16, triton.next_power_of_2(max(C - R, 1))),
        PRECISION="ieee" if wide else "tf32", num_warps=8 if block_m * block_r > 8192 else 4,
        num_stages=1 if wide else 2,
    )  # fmt: skip
    return read, largest, total
