"""Everything of a chunk that does not need the memory: decayed rows, and the triangular system solved.

    A_ij = sum_c erase_ic k_jc decay_c(j, i), j < i        M = (I + A)^-1
    P_ij = sum_c q_ic k_jc decay_c(j, i), j <= i

Grid      (chunk x value head): all chunks at once.
Writes    per chunk  E = erase decay(0, i), Q = q decay(0, i) [C, K];  W = M^T (k decay(i, C)) [C, K];  the transpose of P M
          [C, C];  D = decay(0, C) [K];  for the backward also M^T [C, C] and, with a gate, the norms' reciprocals.
          With these the recurrence over the chunks (inter_chunk_fwd.py) is two matrix products deep.
Transposed, A and M are computed as A^T and M^T: a product that is transposed before the next product is slow, and wrong
          in some Triton releases.
Three passes over the key channels, a block of them at a time, so that nothing waits in registers: tokens of one block of 16
          (one_sided.py says when that is one product); tokens of different blocks, and the decayed rows; W.
Answers   to ops/chunked.py, where `merge` is one level of the tree.
"""

import triton
import triton.language as tl

from palimpsest.ops.gpu.triton.one_sided import BLOCK, BLOCK_LEVELS, LOWEST, in_block, rounded, two_sides
from palimpsest.ops.gpu.triton.tiles import (
    crosses,
    factor,
    find_chunk,
    load_decay,
    product,
    sigmoid,
    spans,
    summed,
)  # fmt: skip


@triton.jit
def load_rows(
    q, k, erase, g, A_log, dt_bias, q_norm, k_norm, key_at, value_at, in_C, d, head, scale, floor,
    K: tl.constexpr, FROM_BETA: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """q, k, erase (k itself where erase = beta k: beta comes later) and log_decay of a block of key channels, [C, BLOCK_K]."""
    in_K = d < K
    in_tile = in_C[:, None] & in_K[None, :]
    q_CK = tl.load(q + key_at, mask=in_tile, other=0.0).to(tl.float32)
    k_CK = tl.load(k + key_at, mask=in_tile, other=0.0).to(tl.float32)
    if GATE:
        q_CK *= q_norm[:, None]
        k_CK *= k_norm[:, None]
    q_CK *= scale
    e_CK = k_CK
    if not FROM_BETA:
        e_CK = tl.load(erase + value_at, mask=in_tile, other=0.0).to(tl.float32)
    g_CK = load_decay(g, dt_bias, A_log, head, value_at, in_tile, d, in_K, K, floor, GATE)
    return q_CK, k_CK, e_CK, g_CK


@triton.jit
def inverse_of_blocks(A_CC, C: tl.constexpr, BLOCK: tl.constexpr):
    """(I + A)^-1 of each block on the diagonal, transposed as A is: forward substitution, row by row, in fp32."""
    BLOCKS: tl.constexpr = C // BLOCK
    a, b = tl.arange(0, BLOCKS)[:, None, None, None], tl.arange(0, BLOCKS)[None, None, :, None]
    r, s = tl.arange(0, BLOCK)[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    A_BJI = tl.sum(tl.where(a == b, tl.reshape(A_CC, [BLOCKS, BLOCK, BLOCKS, BLOCK]), 0.0), 2)
    M_BIJ = tl.where(r == s, 1.0, tl.zeros([BLOCKS, BLOCK, BLOCK], tl.float32))
    for i in tl.range(1, BLOCK, num_stages=1):
        A_BJ = tl.sum(tl.where(s == i, A_BJI, 0.0), 2)
        row = tl.sum(A_BJ[:, :, None] * M_BIJ, 1)
        M_BIJ = tl.where(r == i, M_BIJ - row[:, None, :], M_BIJ)
    M_BJI = tl.permute(M_BIJ, (0, 2, 1))
    whole = tl.where(a == b, M_BJI[:, :, None, :], tl.zeros([BLOCKS, BLOCK, BLOCKS, BLOCK], tl.float32))
    return tl.reshape(whole, [C, C])


@triton.jit(do_not_specialize=["T", "N"])
def intra_chunk_kernel(
    q, k, erase, g, A_log, dt_bias, E_out, Q_out, W_out, P_out, D_out, M_out, norms_out,
    cu_seqlens, chunk_offsets, T, N, H, HV, scale, floor,
    K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, FROM_BETA: tl.constexpr,
    GATE: tl.constexpr, ERASE_BEFORE_DECAY: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    M_PRECISION: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = k.dtype.element_ty
    WIDE: tl.constexpr = tl.float32 == DTYPE
    chunk, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    tile = tl.program_id(0).to(tl.int64)
    n, start, count = find_chunk(chunk, cu_seqlens, chunk_offsets, T, N, C, PACKED)
    if count <= 0:
        return
    c = tl.arange(0, C)
    in_C = c < count
    key_row = ((start + c) * H + head // (HV // H))[:, None] * K
    value_row = ((start + c) * HV + head)[:, None] * K
    i, j = c[None, :], c[:, None]  # transposed: reader i is the column, written token j the row

    beta_C = tl.full([C], 1.0, tl.float32)
    if FROM_BETA:
        beta_C = tl.load(erase + (start + c) * HV + head, mask=in_C, other=0.0).to(tl.float32)
        if GATE:
            beta_C = sigmoid(beta_C)
    q_norm, k_norm = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    if GATE:
        for key in tl.range(0, K, BLOCK_K, num_stages=1):
            d = key + tl.arange(0, BLOCK_K)
            in_tile = in_C[:, None] & (d < K)[None, :]
            q_CK = tl.load(q + key_row + d[None, :], mask=in_tile, other=0.0).to(tl.float32)
            k_CK = tl.load(k + key_row + d[None, :], mask=in_tile, other=0.0).to(tl.float32)
            q_norm += tl.sum(q_CK * q_CK, 1)
            k_norm += tl.sum(k_CK * k_CK, 1)
        q_norm, k_norm = tl.rsqrt(q_norm + 1e-6), tl.rsqrt(k_norm + 1e-6)
        if SAVE:
            tl.store(norms_out + tile * 2 * C + c, q_norm)
            tl.store(norms_out + tile * 2 * C + C + c, k_norm)

    # 1. Tokens of one block of 16, and each token with itself
    P_CC, A_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    own_C, lowest_C = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    near = ((i // BLOCK) == (j // BLOCK)) & (j < i)
    for key in tl.range(0, K, BLOCK_K, num_stages=1):
        d = key + tl.arange(0, BLOCK_K)
        q_CK, k_CK, e_CK, g_CK = load_rows(
            q, k, erase, g, A_log, dt_bias, q_norm, k_norm, key_row + d[None, :], value_row + d[None, :], in_C, d, head,
            scale, floor, K, FROM_BETA, GATE,
        )  # fmt: skip
        own_C += tl.sum(q_CK * k_CK, 1)
        x_CK = summed(in_block(C, False, False), g_CK, WIDE, PRECISION)
        lowest_C = tl.minimum(lowest_C, tl.min(x_CK, 1))
        later_CK, earlier_CK = two_sides(x_CK)
        later_e_CK = later_CK
        if ERASE_BEFORE_DECAY:
            later_e_CK, _ = two_sides(summed(in_block(C, True, False), g_CK, WIDE, PRECISION))
        kf_CK = rounded(k_CK * earlier_CK, DTYPE)
        P_CC = tl.dot(kf_CK, tl.trans(rounded(q_CK * later_CK, DTYPE)), P_CC, input_precision=PRECISION)
        A_CC = tl.dot(kf_CK, tl.trans(rounded(e_CK * later_e_CK, DTYPE)), A_CC, input_precision=PRECISION)
    apart_C = lowest_C < LOWEST  # a row's own past decides, so that a later token changes no earlier bit
    trusted = near & (apart_C == 0)[None, :]
    P_CC, A_CC = tl.where(trusted, P_CC, 0.0), tl.where(trusted, A_CC, 0.0)
    if tl.max(apart_C.to(tl.int32), 0) > 0:
        for level in tl.range(0, BLOCK_LEVELS, num_stages=1):
            meet = crosses(C, level, True) & apart_C[None, :]
            for key in tl.range(0, K, BLOCK_K, num_stages=1):
                d = key + tl.arange(0, BLOCK_K)
                q_CK, k_CK, e_CK, g_CK = load_rows(
                    q, k, erase, g, A_log, dt_bias, q_norm, k_norm, key_row + d[None, :], value_row + d[None, :], in_C, d,
                    head, scale, floor, K, FROM_BETA, GATE,
                )  # fmt: skip
                f_CK = factor(spans(C, level, False, False), g_CK, WIDE, PRECISION)
                fe_CK = f_CK
                if ERASE_BEFORE_DECAY:
                    fe_CK = factor(spans(C, level, True, False), g_CK, WIDE, PRECISION)
                kf_CK = (k_CK * f_CK).to(DTYPE)
                P_CC += tl.where(meet, product(kf_CK, tl.trans((q_CK * f_CK).to(DTYPE)), DTYPE, PRECISION), 0.0)
                A_CC += tl.where(meet, product(kf_CK, tl.trans((e_CK * fe_CK).to(DTYPE)), DTYPE, PRECISION), 0.0)
    P_CC += tl.where(i == j, own_C[:, None], 0.0)

    # 2. Tokens of different blocks: those of an earlier block have the decay up to its end, later ones that since then
    rows = tile * C * K + c[:, None] * K
    for key in tl.range(0, K, BLOCK_K, num_stages=1):
        d = key + tl.arange(0, BLOCK_K)
        in_K = d < K
        q_CK, k_CK, e_CK, g_CK = load_rows(
            q, k, erase, g, A_log, dt_bias, q_norm, k_norm, key_row + d[None, :], value_row + d[None, :], in_C, d, head,
            scale, floor, K, FROM_BETA, GATE,
        )  # fmt: skip
        before_CK = factor(i <= j, g_CK, WIDE, PRECISION)  # here row j of the product, token i of the sum
        before_e_CK = before_CK
        if ERASE_BEFORE_DECAY:
            before_e_CK = factor(i < j, g_CK, WIDE, PRECISION)
        tl.store(Q_out + rows + d[None, :], (q_CK * before_CK).to(DTYPE), mask=in_K[None, :])
        E_CK = e_CK * before_e_CK
        if FROM_BETA:
            E_CK *= beta_C[:, None]
        tl.store(E_out + rows + d[None, :], E_CK.to(DTYPE), mask=in_K[None, :])
        tl.store(D_out + tile * K + d, tl.exp(tl.sum(g_CK, 0)), mask=in_K)
        if C > BLOCK:
            kf_CK = k_CK * factor(((i // BLOCK) == (j // BLOCK)) & (i > j), g_CK, WIDE, PRECISION)
            for border in tl.static_range(BLOCK, C, BLOCK):
                since = (j >= border) & (i >= border)
                f_CK = tl.where((c >= border)[:, None], factor(since & (i <= j), g_CK, WIDE, PRECISION), 0.0)
                fe_CK = f_CK
                if ERASE_BEFORE_DECAY:
                    fe_CK = tl.where((c >= border)[:, None], factor(since & (i < j), g_CK, WIDE, PRECISION), 0.0)
                of_block = (c // BLOCK == border // BLOCK - 1)[:, None]
                kb_CK = tl.where(of_block, kf_CK, 0.0).to(DTYPE)
                P_CC = tl.dot(kb_CK, tl.trans((q_CK * f_CK).to(DTYPE)), P_CC, input_precision=PRECISION)
                A_CC = tl.dot(kb_CK, tl.trans((e_CK * fe_CK).to(DTYPE)), A_CC, input_precision=PRECISION)
    A_CC *= beta_C[None, :]

    M_CC = inverse_of_blocks(A_CC, C, BLOCK)
    for level in tl.range(BLOCK_LEVELS, LEVELS, num_stages=1):
        MA_CC = tl.dot(M_CC, tl.where(crosses(C, level, True), A_CC, 0.0), input_precision=M_PRECISION)
        M_CC -= tl.dot(MA_CC, M_CC, input_precision=M_PRECISION)
    square = tile * C * C + c[:, None] * C + c[None, :]
    tl.store(P_out + square, product(M_CC, P_CC, DTYPE, PRECISION).to(DTYPE))
    if SAVE:
        tl.store(M_out + square, M_CC.to(DTYPE))

    # 3. Rows that are written
    for key in tl.range(0, K, BLOCK_K, num_stages=1):
        d = key + tl.arange(0, BLOCK_K)
        in_K = d < K
        in_tile = in_C[:, None] & in_K[None, :]
        k_CK = tl.load(k + key_row + d[None, :], mask=in_tile, other=0.0).to(tl.float32)
        if GATE:
            k_CK *= k_norm[:, None]
        g_CK = load_decay(g, dt_bias, A_log, head, value_row + d[None, :], in_tile, d, in_K, K, floor, GATE)
        after_CK = factor(i > j, g_CK, WIDE, PRECISION)
        tl.store(
            W_out + rows + d[None, :], product(M_CC, k_CK * after_CK, DTYPE, PRECISION).to(DTYPE), mask=in_K[None, :]
        )
