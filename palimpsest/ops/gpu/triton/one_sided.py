"""When tokens of a block of 16 may meet in one matrix product: a sound switch, which reads the decays.

Between two tokens j < i of a block, decay(j, i) = exp(x_i - x_j), where x_i <= 0 sums the log-decays of a channel from the
block's second token to i. Where x_i >= LOWEST = -80 in every channel,

    later_i = exp(x_i + 40)   and   earlier_j = exp(-x_j - 40)   lie between e^-40 and e^40,

and their product is decay(j, i): a term of the sum over channels is (q later)(k earlier), and no bound on the gates is
assumed. What it is off by, for numbers in bf16 (relative rounding u = 2^-9) or fp16 (as tf32, u = 2^-11, with the exponents of
fp32):
    rounding the two factors     2 u, as of the factors of at most 1 that the tree of tiles.py has
    fp32 sums x_i and x_j        at most 15 |x| 2^-24 each, 1.5e-4 for both at |x| = 80, where u is 2e-3 and 4.9e-4;
                                 typically 2 |x| 2^-24, 2e-5
    numbers as two of bf16       the same number in both sums, so that only those between j and i count: 2^-17 |x_i - x_j|
    range                        |q|, |k| up to 1e20 stay finite times e^40 = 2.4e17; |q|, |k| below 2^-126 e^40 = 2.8e-21 may
                                 flush to zero, which is off by 2.8e-21 times the other factor
so the product is as good as its dtype, whatever x is above LOWEST. In fp32 the sums would show (u = 6e-8), and the tree is kept.

The test is of a row's own past, and x never rises from token to token (log_decay <= 0): i may use x_j of all j < i where its own
passes. A later token therefore changes no bit of an earlier row, and a chunk in which some row fails computes its blocks on the
tree beside.
"""

import triton
import triton.language as tl

from palimpsest.ops.gpu.triton.tiles import LOG2E

BLOCK = tl.constexpr(16)  # tokens; gates of at least -5 a token then always pass: 15 of them sum to -75
BLOCK_LEVELS = tl.constexpr(4)  # of the tree, inside a block
LOWEST = tl.constexpr(-80.0)


@triton.jit
def in_block(C: tl.constexpr, ERASE_BEFORE_DECAY: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[row, token], or its transpose: is this token's decay in the row's x?"""
    if TRANSPOSED:
        row, token = tl.arange(0, C)[None, :], tl.arange(0, C)[:, None]
    else:
        row, token = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if ERASE_BEFORE_DECAY:
        since = token < row
    else:
        since = token <= row
    return ((row // BLOCK) == (token // BLOCK)) & since & ((token % BLOCK) > 0)


@triton.jit
def two_sides(x):
    """exp(x - LOWEST / 2) and its reciprocal, finite whatever x is."""
    x = (tl.maximum(x, LOWEST) - 0.5 * LOWEST) * LOG2E
    return tl.exp2(x), tl.exp2(-x)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """An operand: in bf16 as it is; fp16 has too small exponents, and fp32 is rounded to the 11 bits that tf32 reads."""
    if tl.float16 == DTYPE:
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        x = x.to(DTYPE)
    return x
