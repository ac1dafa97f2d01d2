"""Tile mathematics shared by the kernels: where a chunk lies, what a row's decay sums, gates and norms.

Inside a chunk tokens meet on a binary tree. At level s (1, 2, 4, ... tokens) the later half of each run of 2s tokens
reads the earlier half; a row carries the decays between itself and the border of the halves. `spans` is that as a
0/1 matrix: (spans @ log_decay)[i] is the exponent of row i. It sums numbers of one sign, so nothing cancels, no
exponent exceeds 0, and its transpose carries gradients back to the decays.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def find_chunk(chunk, cu_seqlens, chunk_offsets, T, N, C: tl.constexpr, PACKED: tl.constexpr):
    """The sequence, first token (int64) and number of tokens (<= 0: nothing to do) of a chunk."""
    if PACKED:
        n, after = 0, N
        while after - n > 1:
            middle = (n + after) // 2
            inside = tl.load(chunk_offsets + middle) <= chunk
            n = tl.where(inside, middle, n)
            after = tl.where(inside, after, middle)
        start = tl.load(cu_seqlens + n).to(tl.int64) + (chunk - tl.load(chunk_offsets + n)) * C
        count = tl.load(cu_seqlens + n + 1).to(tl.int64) - start
    else:
        chunks = tl.cdiv(T, C)
        n = chunk // chunks
        start = n.to(tl.int64) * T + (chunk % chunks) * C
        count = (n + 1).to(tl.int64) * T - start
    return n, start, tl.minimum(count, C)


@triton.jit
def find_sequence(n, cu_seqlens, chunk_offsets, T, C: tl.constexpr, PACKED: tl.constexpr):
    """The first token (int64), number of tokens and first chunk of a sequence."""
    if PACKED:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        tokens = (tl.load(cu_seqlens + n + 1).to(tl.int64) - start).to(tl.int32)
        chunk = tl.load(chunk_offsets + n)
    else:
        start = n.to(tl.int64) * T
        tokens = T
        chunk = n * tl.cdiv(T, C)
    return start, tokens, chunk


@triton.jit
def spans(C: tl.constexpr, level, ERASE_BEFORE_DECAY: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[row, token], or its transpose: is this token's decay in this row's factor at level s = 2^level?

    Rows of a later half: from the border up to the row, itself included (unless ERASE_BEFORE_DECAY). Rows of an earlier half:
    the tokens after the row up to the border.
    """
    if TRANSPOSED:
        row, token = tl.arange(0, C)[None, :], tl.arange(0, C)[:, None]
    else:
        row, token = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if ERASE_BEFORE_DECAY:
        since = token < row
    else:
        since = token <= row
    later_half = ((row >> level) & 1) == 1
    return ((row >> level) == (token >> level)) & ((later_half & since) | ((later_half == 0) & (token > row)))


@triton.jit
def crosses(C: tl.constexpr, level, TRANSPOSED: tl.constexpr):
    """[later token, earlier token], or its transpose: do they meet at this level?"""
    if TRANSPOSED:
        i, j = tl.arange(0, C)[None, :], tl.arange(0, C)[:, None]
    else:
        i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (((i >> level) ^ (j >> level)) == 1) & (i > j)


@triton.jit
def product(a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DTYPE), b.to(DTYPE), input_precision=PRECISION)


@triton.jit
def summed(spans, g, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """spans @ g to fp32 accuracy. WIDE: the operands are fp32; otherwise g goes through the tensor cores as the sum
    of two bf16 numbers, 17 bits, and 0/1 is exact."""
    if WIDE:
        return tl.dot(spans.to(tl.float32), g, input_precision=PRECISION)
    mask = spans.to(tl.bfloat16)
    high = g.to(tl.bfloat16)
    return tl.dot(mask, (g - high.to(tl.float32)).to(tl.bfloat16), tl.dot(mask, high))


@triton.jit
def factor(spans, g, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    return tl.exp2(summed(spans, g, WIDE, PRECISION) * LOG2E)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp2(-x * LOG2E))


@triton.jit
def softplus(x):
    u = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.maximum(x, 0.0) + tl.where(u < 1e-4, u - 0.5 * u * u, tl.log(1 + u))


@triton.jit
def gate_rate(A_log, head):
    return tl.exp2(tl.load(A_log + head).to(tl.float32) * LOG2E)


@triton.jit
def activated(x, rate, floor, GATE: tl.constexpr):
    """log_decay from logits + dt_bias; see ops/gates.py."""
    if GATE == 1:
        return -rate * softplus(x)
    return floor * sigmoid(rate * x)


@triton.jit
def load_decay(g, dt_bias, A_log, head, at, in_tile, d, in_K, K, floor, GATE: tl.constexpr):
    """log_decay [C, K], 0 outside the tile. Clamped where exp() is 0 anyway, so that -inf makes no NaN."""
    x = tl.load(g + at, mask=in_tile, other=0.0).to(tl.float32)
    if GATE:
        x += tl.load(dt_bias + head * K + d, mask=in_K, other=0.0).to(tl.float32)[None, :]
        x = tl.where(in_tile, activated(x, gate_rate(A_log, head), floor, GATE), 0.0)
    return tl.maximum(x, -1e5)
