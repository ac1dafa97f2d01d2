"""Gradients inside a chunk as in gradient.py, but all pairs of tokens meet on the tree, level by level: for fp32, and for the
calls that delta_memory.py names.

    every exponent is spans @ log_decay, so d log_decay = spans^T (row . gradient of the row)

which adds up what lies between two tokens and never takes anything away again, as fp32's errors of 1e-7 ask.
"""

import triton
import triton.language as tl

from palimpsest.ops.gpu.triton.tiles import (
    crosses,
    factor,
    find_chunk,
    gate_rate,
    load_decay,
    product,
    sigmoid,
    softplus,
    spans,
)  # fmt: skip


@triton.jit
def beta_gradients(
    write, erase, d_write, dv_out, start, head, c, in_C, HV,
    V: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """beta; dw . v, the part of its gradient that comes from `write`; and dv = beta dw, stored."""
    beta_C = tl.load(erase + (start + c) * HV + head, mask=in_C, other=0.0).to(tl.float32)
    if GATE:
        beta_C = sigmoid(beta_C)
    d_beta_C = tl.zeros([C], tl.float32)
    for first in tl.range(0, V, BLOCK_V, num_stages=1):
        v = first + tl.arange(0, BLOCK_V)
        values = ((start + c) * HV + head)[:, None] * V + v[None, :]
        in_values = in_C[:, None] & (v < V)[None, :]
        dw_CV = tl.load(d_write + values, mask=in_values, other=0.0).to(tl.float32)
        v_CV = tl.load(write + values, mask=in_values, other=0.0).to(tl.float32)
        d_beta_C += tl.sum(dw_CV * v_CV, 1)
        tl.store(dv_out + values, (dw_CV * beta_C[:, None]).to(dv_out.dtype.element_ty), mask=in_values)
    return beta_C, d_beta_C


@triton.jit
def across_the_border(
    d_out, d_write, memories, d_memories, v_new, tile, start, head, c, d, in_C, in_K, HV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the rows get from the memory before the chunk and leave to the one after it, without decays:
    h do, -h dw, dS v_new, and h . dS."""
    dq_CK = tl.zeros([C, BLOCK_K], tl.float32)
    de_CK = tl.zeros([C, BLOCK_K], tl.float32)
    dk_CK = tl.zeros([C, BLOCK_K], tl.float32)
    dD_K = tl.zeros([BLOCK_K], tl.float32)
    for first in tl.range(0, V, BLOCK_V, num_stages=1):
        v = first + tl.arange(0, BLOCK_V)
        in_V = v < V
        values = ((start + c) * HV + head)[:, None] * V + v[None, :]
        in_values = in_C[:, None] & in_V[None, :]
        memory_at = tile * K * V + v[:, None] * K + d[None, :]
        in_memory = in_V[:, None] & in_K[None, :]
        h_VK = tl.load(memories + memory_at, mask=in_memory, other=0.0)
        dS_VK = tl.load(d_memories + memory_at, mask=in_memory, other=0.0)
        do_CV = tl.load(d_out + values, mask=in_values, other=0.0)
        dw_CV = tl.load(d_write + values, mask=in_values, other=0.0)
        u_CV = tl.load(v_new + tile * C * V + c[:, None] * V + v[None, :], mask=in_V[None, :], other=0.0)
        dq_CK += product(do_CV, h_VK, DTYPE, PRECISION)
        de_CK -= product(dw_CV, h_VK, DTYPE, PRECISION)
        dk_CK += product(u_CV, dS_VK, DTYPE, PRECISION)
        dD_K += tl.sum(h_VK.to(tl.float32) * dS_VK.to(tl.float32), 0)
    return dq_CK, de_CK, dk_CK, dD_K


@triton.jit
def decay_the_border(
    q_CK, e_CK, k_CK, g_CK, dq_CK, de_CK, dk_CK, dD_K, later, earlier,
    ERASE_BEFORE_DECAY: tl.constexpr, WIDE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The above with decay(0, i), decay(i, C) and decay(0, C), and what d log_decay gets of them."""
    before_CK = factor(later >= earlier, g_CK, WIDE, PRECISION)
    before_e_CK = before_CK
    if ERASE_BEFORE_DECAY:
        before_e_CK = factor(later > earlier, g_CK, WIDE, PRECISION)
    after_CK = factor(later < earlier, g_CK, WIDE, PRECISION)
    dq_CK *= before_CK
    de_CK *= before_e_CK
    dk_CK *= after_CK
    # the transposes of the three sums above: token as row, row as column
    if ERASE_BEFORE_DECAY:
        dg_CK = tl.dot((later <= earlier).to(SUM), (q_CK * dq_CK).to(SUM), input_precision=PRECISION)
        dg_CK = tl.dot((later < earlier).to(SUM), (e_CK * de_CK).to(SUM), dg_CK, input_precision=PRECISION)
    else:
        dg_CK = tl.dot((later <= earlier).to(SUM), (q_CK * dq_CK + e_CK * de_CK).to(SUM), input_precision=PRECISION)
    dg_CK = tl.dot((later > earlier).to(SUM), (k_CK * dk_CK).to(SUM), dg_CK, input_precision=PRECISION)
    dg_CK += (tl.exp(tl.sum(g_CK, 0)) * dD_K)[None, :]
    return dq_CK, de_CK, dk_CK, dg_CK


@triton.jit
def inside_the_chunk(
    q_CK, e_CK, k_CK, g_CK, dP_CC, dA_CC, dPt_CC, dAt_CC, dq_CK, de_CK, dk_CK, dg_CK,
    C: tl.constexpr, LEVELS: tl.constexpr, ERASE_BEFORE_DECAY: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pairs of tokens of one chunk, level by level of the tree, added to the gradients so far."""
    for level in tl.range(0, LEVELS, num_stages=1):
        meet, meet_t = crosses(C, level, False), crosses(C, level, True)
        f_CK = factor(spans(C, level, False, False), g_CK, WIDE, PRECISION)
        fe_CK = f_CK
        if ERASE_BEFORE_DECAY:
            fe_CK = factor(spans(C, level, True, False), g_CK, WIDE, PRECISION)
        kf_CK, qf_CK, ef_CK = k_CK * f_CK, q_CK * f_CK, e_CK * fe_CK
        kf_low_CK = kf_CK.to(DTYPE)
        q_part_CK = product(tl.where(meet, dP_CC, 0.0), kf_low_CK, DTYPE, PRECISION)
        e_part_CK = product(tl.where(meet, dA_CC, 0.0), kf_low_CK, DTYPE, PRECISION)
        k_part_CK = product(tl.where(meet_t, dPt_CC, 0.0), qf_CK, DTYPE, PRECISION)
        k_part_CK += product(tl.where(meet_t, dAt_CC, 0.0), ef_CK, DTYPE, PRECISION)
        dq_CK += f_CK * q_part_CK
        de_CK += fe_CK * e_part_CK
        dk_CK += f_CK * k_part_CK
        sums = spans(C, level, False, True)
        if ERASE_BEFORE_DECAY:
            row_CK = qf_CK * q_part_CK + kf_CK * k_part_CK
            dg_CK = tl.dot(sums.to(SUM), row_CK.to(SUM), dg_CK, input_precision=PRECISION)
            sums = spans(C, level, True, True)
            dg_CK = tl.dot(sums.to(SUM), (ef_CK * e_part_CK).to(SUM), dg_CK, input_precision=PRECISION)
        else:
            row_CK = qf_CK * q_part_CK + ef_CK * e_part_CK + kf_CK * k_part_CK
            dg_CK = tl.dot(sums.to(SUM), row_CK.to(SUM), dg_CK, input_precision=PRECISION)
    return dq_CK, de_CK, dk_CK, dg_CK


@triton.jit
def through_the_gate(
    dg_CK, dA_log, g, dt_bias, A_log, d_bias_out, value_at, in_tile, d, in_K, head, tile, floor,
    K: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """d log_decay becomes the gradient of the logits; those of A_log and dt_bias beside it."""
    rate = gate_rate(A_log, head)
    x_CK = tl.load(g + value_at, mask=in_tile, other=0.0).to(tl.float32)
    x_CK += tl.load(dt_bias + head * K + d, mask=in_K, other=0.0).to(tl.float32)[None, :]
    if GATE == 1:
        dA_log += tl.sum(tl.where(in_tile, dg_CK * -rate * softplus(x_CK), 0.0))
        dg_CK *= -rate * sigmoid(x_CK)
    else:
        y_CK = sigmoid(rate * x_CK)
        dg_CK *= floor * rate * y_CK * (1 - y_CK)
        dA_log += tl.sum(tl.where(in_tile, dg_CK * x_CK, 0.0))
    dg_CK = tl.where(in_tile, dg_CK, 0.0)
    tl.store(d_bias_out + tile * K + d, tl.sum(dg_CK, 0), mask=in_K)
    return dg_CK, dA_log


@triton.jit
def through_the_norms(
    q, k, dq_out, dk_out, q_norm, k_norm, q_along_C, k_along_C, start, head, c, in_C, H, HV,
    K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Through the L2 norms: what lies along the row itself goes, and that needs all key channels first."""
    for key in tl.range(0, K, BLOCK_K, num_stages=1):
        d = key + tl.arange(0, BLOCK_K)
        in_tile = in_C[:, None] & (d < K)[None, :]
        key_at = ((start + c) * H + head // (HV // H))[:, None] * K + d[None, :]
        value_at = ((start + c) * HV + head)[:, None] * K + d[None, :]
        q_CK = tl.load(q + key_at, mask=in_tile, other=0.0).to(tl.float32) * q_norm[:, None]
        k_CK = tl.load(k + key_at, mask=in_tile, other=0.0).to(tl.float32) * k_norm[:, None]
        dq_CK = tl.load(dq_out + value_at, mask=in_tile, other=0.0).to(tl.float32)
        dk_CK = tl.load(dk_out + value_at, mask=in_tile, other=0.0).to(tl.float32)
        dq_CK = q_norm[:, None] * (dq_CK - q_along_C[:, None] * q_CK)
        dk_CK = k_norm[:, None] * (dk_CK - k_along_C[:, None] * k_CK)
        tl.store(dq_out + value_at, dq_CK.to(dq_out.dtype.element_ty), mask=in_tile)
        tl.store(dk_out + value_at, dk_CK.to(dk_out.dtype.element_ty), mask=in_tile)


@triton.jit(do_not_specialize=["T", "N"])
def gradient_by_levels_kernel(
    q, k, erase, g, A_log, dt_bias, write, norms, d_out, d_write, memories, d_memories, v_new, dP, dA,
    dq_out, dk_out, d_erase_out, dg_out, dv_out, dA_log_out, d_bias_out,
    cu_seqlens, chunk_offsets, T, N, H, HV, scale, floor,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, FROM_BETA: tl.constexpr, GATE: tl.constexpr, ERASE_BEFORE_DECAY: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = k.dtype.element_ty
    WIDE: tl.constexpr = tl.float32 == DTYPE
    SUM: tl.constexpr = (
        tl.bfloat16 if tl.bfloat16 == DTYPE and not WIDE else tl.float32
    )  # of the operands of sums over tokens
    chunk, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    tile = tl.program_id(0).to(tl.int64)
    n, start, count = find_chunk(chunk, cu_seqlens, chunk_offsets, T, N, C, PACKED)
    if count <= 0:
        return
    c = tl.arange(0, C)
    in_C = c < count
    later, earlier = c[:, None], c[None, :]
    square = tile * C * C + later * C + earlier
    dP_CC = tl.load(dP + square)
    dA_CC = tl.load(dA + square)
    dPt_CC, dAt_CC = tl.trans(dP_CC), tl.trans(dA_CC)
    own_C = tl.sum(tl.where(later == earlier, dP_CC.to(tl.float32), 0.0), 1)

    beta_C = tl.full([C], 1.0, tl.float32)
    d_beta_C = tl.zeros([C], tl.float32)
    if FROM_BETA:
        beta_C, d_beta_C = beta_gradients(write, erase, d_write, dv_out, start, head, c, in_C, HV, V, BLOCK_V, C, GATE)

    q_along_C = tl.zeros([C], tl.float32)
    k_along_C = tl.zeros([C], tl.float32)
    if GATE:
        q_norm = tl.load(norms + tile * 2 * C + c)
        k_norm = tl.load(norms + tile * 2 * C + C + c)
    dA_log = 0.0
    for key in tl.range(0, K, BLOCK_K, num_stages=1):
        d = key + tl.arange(0, BLOCK_K)
        in_K = d < K
        in_tile = in_C[:, None] & in_K[None, :]
        key_at = ((start + c) * H + head // (HV // H))[:, None] * K + d[None, :]
        value_at = ((start + c) * HV + head)[:, None] * K + d[None, :]
        q_CK = tl.load(q + key_at, mask=in_tile, other=0.0).to(tl.float32)
        k_CK = tl.load(k + key_at, mask=in_tile, other=0.0).to(tl.float32)
        g_CK = load_decay(g, dt_bias, A_log, head, value_at, in_tile, d, in_K, K, floor, GATE)
        if GATE:
            q_CK *= q_norm[:, None]
            k_CK *= k_norm[:, None]
        q_CK *= scale
        if FROM_BETA:
            e_CK = k_CK * beta_C[:, None]
        else:
            e_CK = tl.load(erase + value_at, mask=in_tile, other=0.0).to(tl.float32)

        dq_CK, de_CK, dk_CK, dD_K = across_the_border(
            d_out, d_write, memories, d_memories, v_new, tile, start, head, c, d, in_C, in_K, HV,
            K, V, BLOCK_K, BLOCK_V, C, DTYPE, PRECISION,
        )  # fmt: skip
        dq_CK, de_CK, dk_CK, dg_CK = decay_the_border(
            q_CK, e_CK, k_CK, g_CK, dq_CK, de_CK, dk_CK, dD_K, later, earlier, ERASE_BEFORE_DECAY, WIDE, SUM, PRECISION
        )
        dq_CK, de_CK, dk_CK, dg_CK = inside_the_chunk(
            q_CK, e_CK, k_CK, g_CK, dP_CC, dA_CC, dPt_CC, dAt_CC, dq_CK, de_CK, dk_CK, dg_CK,
            C, LEVELS, ERASE_BEFORE_DECAY, DTYPE, WIDE, SUM, PRECISION,
        )  # fmt: skip
        dq_CK += own_C[:, None] * k_CK
        dk_CK += own_C[:, None] * q_CK
        if FROM_BETA:
            d_beta_C += tl.sum(k_CK * de_CK, 1)
            dk_CK += beta_C[:, None] * de_CK
        else:
            tl.store(d_erase_out + value_at, de_CK.to(d_erase_out.dtype.element_ty), mask=in_tile)
        dq_CK *= scale
        if GATE:
            dg_CK, dA_log = through_the_gate(
                dg_CK, dA_log, g, dt_bias, A_log, d_bias_out, value_at, in_tile, d, in_K, head, tile, floor, K, GATE
            )
            q_along_C += tl.sum(q_CK * dq_CK, 1) / (scale * 1.0)
            k_along_C += tl.sum(k_CK * dk_CK, 1)
        tl.store(dq_out + value_at, dq_CK.to(dq_out.dtype.element_ty), mask=in_tile)
        tl.store(dk_out + value_at, dk_CK.to(dk_out.dtype.element_ty), mask=in_tile)
        tl.store(dg_out + value_at, dg_CK.to(dg_out.dtype.element_ty), mask=in_tile)

    if FROM_BETA:
        if GATE:
            d_beta_C *= beta_C * (1 - beta_C)
        tl.store(d_erase_out + (start + c) * HV + head, d_beta_C.to(d_erase_out.dtype.element_ty), mask=in_C)
    if GATE:
        tl.store(dA_log_out + tile, dA_log)
        through_the_norms(
            q, k, dq_out, dk_out, q_norm, k_norm, q_along_C, k_along_C, start, head, c, in_C, H, HV, K, BLOCK_K
        )
