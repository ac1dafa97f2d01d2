"""As intra_chunk.py, which has fewer operations, but all pairs of tokens meet on the tree, level by level: for fp32, whose errors
of 1e-7 ask for it, and for the calls that delta_memory.py names.

    A_ij = sum_c erase_ic k_jc decay_c(j, i), j < i        M = (I + A)^-1
    P_ij = sum_c q_ic k_jc decay_c(j, i), j <= i

Grid      (chunk x value head): all chunks at once.
Writes    per chunk  E = erase decay(0, i), Q = q decay(0, i) [C, K];  W = M^T (k decay(i, C)) [C, K];  the transpose of P M
          [C, C];  D = decay(0, C) [K];  for the backward also M^T [C, C] and, with a gate, the norms' reciprocals.
          With these the recurrence over the chunks (inter_chunk_fwd.py) is two matrix products deep.
Transposed, A and M are computed as A^T and M^T: a product that is transposed before the next product is slow, and wrong
          in some Triton releases.
Answers   to ops/chunked.py, where `merge` is one level of the loop below.
"""

import triton
import triton.language as tl

from palimpsest.ops.gpu.triton.tiles import crosses, factor, find_chunk, load_decay, product, sigmoid, spans


@triton.jit(do_not_specialize=["T", "N"])
def intra_chunk_by_levels_kernel(
    q, k, erase, g, A_log, dt_bias, E_out, Q_out, W_out, P_out, D_out, M_out, norms_out,
    cu_seqlens, chunk_offsets, T, N, H, HV, scale, floor,
    K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, FROM_BETA: tl.constexpr,
    GATE: tl.constexpr, ERASE_BEFORE_DECAY: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = k.dtype.element_ty
    WIDE: tl.constexpr = tl.float32 == DTYPE
    chunk, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    tile = tl.program_id(0).to(tl.int64)
    n, start, count = find_chunk(chunk, cu_seqlens, chunk_offsets, T, N, C, PACKED)
    if count <= 0:
        return
    c, d = tl.arange(0, C), tl.arange(0, BLOCK_K)
    in_C, in_K = c < count, d < K
    in_tile = in_C[:, None] & in_K[None, :]
    key_at = ((start + c) * H + head // (HV // H))[:, None] * K + d[None, :]
    value_at = ((start + c) * HV + head)[:, None] * K + d[None, :]

    q_CK = tl.load(q + key_at, mask=in_tile, other=0.0).to(tl.float32)
    k_CK = tl.load(k + key_at, mask=in_tile, other=0.0).to(tl.float32)
    g_CK = load_decay(g, dt_bias, A_log, head, value_at, in_tile, d, in_K, K, floor, GATE)
    if GATE:
        q_norm, k_norm = tl.rsqrt(tl.sum(q_CK * q_CK, 1) + 1e-6), tl.rsqrt(tl.sum(k_CK * k_CK, 1) + 1e-6)
        q_CK *= q_norm[:, None]
        k_CK *= k_norm[:, None]
        if SAVE:
            tl.store(norms_out + tile * 2 * C + c, q_norm)
            tl.store(norms_out + tile * 2 * C + C + c, k_norm)
    q_CK *= scale
    if FROM_BETA:
        beta_C = tl.load(erase + (start + c) * HV + head, mask=in_C, other=0.0).to(tl.float32)
        if GATE:
            beta_C = sigmoid(beta_C)
        e_CK = k_CK * beta_C[:, None]
    else:
        e_CK = tl.load(erase + value_at, mask=in_tile, other=0.0).to(tl.float32)

    i, j = c[None, :], c[:, None]  # transposed: reader i is the column, written token j the row
    P_CC = tl.where(i == j, tl.sum(q_CK * k_CK, 1)[:, None], 0.0)
    M_CC = tl.where(i == j, 1.0, 0.0)
    for level in tl.range(0, LEVELS, num_stages=1):
        f_CK = factor(spans(C, level, False, False), g_CK, WIDE, PRECISION)
        fe_CK = f_CK
        if ERASE_BEFORE_DECAY:
            fe_CK = factor(spans(C, level, True, False), g_CK, WIDE, PRECISION)
        meet = crosses(C, level, True)
        kf_CK = (k_CK * f_CK).to(DTYPE)
        P_CC += tl.where(meet, product(kf_CK, tl.trans((q_CK * f_CK).to(DTYPE)), DTYPE, PRECISION), 0.0)
        A_CC = tl.where(meet, product(kf_CK, tl.trans((e_CK * fe_CK).to(DTYPE)), DTYPE, PRECISION), 0.0)
        MA_CC = tl.dot(M_CC, A_CC, input_precision="tf32x3")  # errors of M grow where keys repeat
        M_CC -= tl.dot(MA_CC, M_CC, input_precision="tf32x3")

    since = j >= i  # here row j of the product, token i of the sum
    before_CK = factor(since, g_CK, WIDE, PRECISION)
    before_e_CK = before_CK
    if ERASE_BEFORE_DECAY:
        before_e_CK = factor(j > i, g_CK, WIDE, PRECISION)
    after_CK = factor(j < i, g_CK, WIDE, PRECISION)
    out = tile * C * K + c[:, None] * K + d[None, :]
    square = tile * C * C + c[:, None] * C + c[None, :]
    tl.store(E_out + out, (e_CK * before_e_CK).to(DTYPE), mask=in_K[None, :])
    tl.store(Q_out + out, (q_CK * before_CK).to(DTYPE), mask=in_K[None, :])
    tl.store(W_out + out, product(M_CC, k_CK * after_CK, DTYPE, PRECISION).to(DTYPE), mask=in_K[None, :])
    tl.store(P_out + square, product(M_CC, P_CC, DTYPE, PRECISION).to(DTYPE))
    tl.store(D_out + tile * K + d, tl.exp(tl.sum(g_CK, 0)), mask=in_K)
    if SAVE:
        tl.store(M_out + square, M_CC.to(DTYPE))
