"""Gradients of half precision inside a chunk, once the recurrences have left the memory before it (h), the gradient after
it (dS) and what scores.py makes of them. It goes back through the decayed rows, a block of 16 tokens at a time, the last first:

    dq_i = decay(0, i) h do_i + sum_j dP_ij k_j decay(j, i)      and alike for erase, k

A pair of tokens j < i gives the same number to the log-decay of each token of j + 1 .. i. It is added at i and taken away
at j, from the same rounded factors, so that d log_decay is a sum over all tokens from there on, exact to fp32. (In fp32 itself
that would show: gradient_by_levels.py.) Blocks of 16 meet at their borders, each behind the decay of those between; inside
one, tokens meet in one product (one_sided.py) or on the tree's lowest four levels (tiles.py).

A token's own term q_i . k_i carries no decay, so it never enters d log_decay, where it would cancel only up to rounding (a
relative error of 1.9 at log_decay = -5 in bf16). Letters as in intra_chunk.py; R counts the tokens of a block.
"""

import triton
import triton.language as tl

from palimpsest.ops.gpu.triton.one_sided import BLOCK, BLOCK_LEVELS, LOWEST, in_block, rounded, two_sides
from palimpsest.ops.gpu.triton.tiles import (
    LOG2E,
    crosses,
    factor,
    find_chunk,
    gate_rate,
    load_decay,
    product,
    sigmoid,
    softplus,
    spans,
    summed,
)  # fmt: skip


@triton.jit
def load_block(
    q, k, erase, g, A_log, dt_bias, norms, tile, start, count, block, head, H, HV, floor,
    K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr, FROM_BETA: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """q, k, erase, log_decay [16, BLOCK_K] of a block of tokens, as the recurrence sees them but for q's scale; beta [16]."""
    row, d = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    in_row, in_K = row < count, d < K
    in_tile = in_row[:, None] & in_K[None, :]
    key_at = ((start + row) * H + head // (HV // H))[:, None] * K + d[None, :]
    value_at = ((start + row) * HV + head)[:, None] * K + d[None, :]
    q_RK = tl.load(q + key_at, mask=in_tile, other=0.0).to(tl.float32)
    k_RK = tl.load(k + key_at, mask=in_tile, other=0.0).to(tl.float32)
    g_RK = load_decay(g, dt_bias, A_log, head, value_at, in_tile, d, in_K, K, floor, GATE)
    if GATE:
        q_RK *= tl.load(norms + tile * 2 * C + row)[:, None]
        k_RK *= tl.load(norms + tile * 2 * C + C + row)[:, None]
    beta_R = tl.full([BLOCK], 1.0, tl.float32)
    if FROM_BETA:
        beta_R = tl.load(erase + (start + row) * HV + head, mask=in_row, other=0.0).to(tl.float32)
        if GATE:
            beta_R = sigmoid(beta_R)
        e_RK = k_RK * beta_R[:, None]
    else:
        e_RK = tl.load(erase + value_at, mask=in_tile, other=0.0).to(tl.float32)
    return q_RK, k_RK, e_RK, g_RK, beta_R


@triton.jit
def readers_factor(g_RK, ERASE_BEFORE_DECAY: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """The decay since the block began, of q and of erase."""
    row, token = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    since_RK = factor(token <= row, g_RK, WIDE, PRECISION)
    since_e_RK = since_RK
    if ERASE_BEFORE_DECAY:
        since_e_RK = factor(token < row, g_RK, WIDE, PRECISION)
    return since_RK, since_e_RK


@triton.jit
def keys_factor(g_RK, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """The decay until the block ends."""
    return factor(tl.arange(0, BLOCK)[:, None] < tl.arange(0, BLOCK)[None, :], g_RK, WIDE, PRECISION)


@triton.jit
def load_scores(scores, tile, later, earlier, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """dP or dA of the later against the earlier block [16, 16], or its transpose."""
    r = tl.arange(0, BLOCK)
    if TRANSPOSED:
        at = (later * BLOCK + r)[None, :] * C + (earlier * BLOCK + r)[:, None]
    else:
        at = (later * BLOCK + r)[:, None] * C + (earlier * BLOCK + r)[None, :]
    return tl.load(scores + tile * C * C + at)


@triton.jit
def pairs(
    q_RK, e_RK, k_RK, f_RK, fe_RK, fk_RK, dP_RR, dA_RR, dPt_RR, dAt_RR, dq_RK, de_RK, dk_RK, reads_RK, erases_RK,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pairs of tokens of one block whose decay is f of the later times fk of the earlier, added to the gradients so far.

    reads and erases get what a pair adds at its later token, less what it adds at its earlier one: from the same rounded
    factors, so that it cancels to fp32 wherever both lie after the token asked about.
    """
    qf_RK, ef_RK, kf_RK = rounded(q_RK * f_RK, DTYPE), rounded(e_RK * fe_RK, DTYPE), rounded(k_RK * fk_RK, DTYPE)
    SAME: tl.constexpr = kf_RK.dtype
    q_part_RK = tl.dot(dP_RR.to(SAME), kf_RK, input_precision=PRECISION)
    e_part_RK = tl.dot(dA_RR.to(SAME), kf_RK, input_precision=PRECISION)
    k_part_RK = tl.dot(dPt_RR.to(SAME), qf_RK, input_precision=PRECISION)
    k_part_RK = tl.dot(dAt_RR.to(SAME), ef_RK, k_part_RK, input_precision=PRECISION)
    dq_RK += f_RK * q_part_RK
    de_RK += fe_RK * e_part_RK
    dk_RK += fk_RK * k_part_RK
    reads_RK += qf_RK.to(tl.float32) * q_part_RK - kf_RK.to(tl.float32) * k_part_RK
    erases_RK += ef_RK.to(tl.float32) * e_part_RK
    return dq_RK, de_RK, dk_RK, reads_RK, erases_RK


@triton.jit
def through_the_gate(dg_RK, x_RK, rate, floor, GATE: tl.constexpr):
    """d log_decay becomes the gradient of the logits x; and, summed by the caller, that of A_log."""
    if GATE == 1:
        dA_RK = dg_RK * -rate * softplus(x_RK)
        dx_RK = dg_RK * -rate * sigmoid(x_RK)
    else:
        y_RK = sigmoid(rate * x_RK)
        dx_RK = dg_RK * floor * rate * y_RK * (1 - y_RK)
        dA_RK = dx_RK * x_RK
    return dx_RK, dA_RK


@triton.jit(do_not_specialize=["T", "N"])
def gradient_kernel(
    q, k, erase, g, A_log, dt_bias, write, norms, D, d_out, d_write, memories, d_memories, v_new, dP, dA,
    dq_out, dk_out, d_erase_out, dg_sums, border_sums, dg_out, dv_out, dA_log_out, d_bias_out,
    cu_seqlens, chunk_offsets, T, N, H, HV, scale, floor,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    FROM_BETA: tl.constexpr, GATE: tl.constexpr, ERASE_BEFORE_DECAY: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = k.dtype.element_ty
    WIDE: tl.constexpr = tl.float32 == DTYPE
    BLOCKS: tl.constexpr = C // BLOCK
    chunk, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    tile = tl.program_id(0).to(tl.int64)
    n, start, count = find_chunk(chunk, cu_seqlens, chunk_offsets, T, N, C, PACKED)
    if count <= 0:
        return
    r, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    in_K = d < K
    later, earlier = r[:, None], r[None, :]

    # What decays get from far: from all tokens of later blocks; from h . dS, and below also from the rows of earlier blocks
    after_K, whole_K = tl.zeros([BLOCK_K], tl.float32), tl.zeros([BLOCK_K], tl.float32)
    for turn in tl.range(0, BLOCKS, num_stages=1):
        block = BLOCKS - 1 - turn
        row = block * BLOCK + r
        in_row = row < count
        q_RK, k_RK, e_RK, g_RK, beta_R = load_block(
            q, k, erase, g, A_log, dt_bias, norms, tile, start, count, block, head, H, HV, floor,
            K, BLOCK_K, C, FROM_BETA, GATE,
        )  # fmt: skip

        # What crosses the chunk's borders: h do, -h dw, dS v_new, and h . dS
        dq_RK, de_RK = tl.zeros([BLOCK, BLOCK_K], tl.float32), tl.zeros([BLOCK, BLOCK_K], tl.float32)
        border_RK = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        d_beta_R = tl.zeros([BLOCK], tl.float32)
        for first in tl.range(0, V, BLOCK_V, num_stages=1):
            v = first + tl.arange(0, BLOCK_V)
            in_V = v < V
            in_values = in_row[:, None] & in_V[None, :]
            values = ((start + row) * HV + head)[:, None] * V + v[None, :]
            memory_at = tile * K * V + v[:, None] * K + d[None, :]
            in_memory = in_V[:, None] & in_K[None, :]
            h_VK = tl.load(memories + memory_at, mask=in_memory, other=0.0)
            dS_VK = tl.load(d_memories + memory_at, mask=in_memory, other=0.0)
            do_RV = tl.load(d_out + values, mask=in_values, other=0.0)
            dw_RV = tl.load(d_write + values, mask=in_values, other=0.0)
            u_RV = tl.load(v_new + tile * C * V + row[:, None] * V + v[None, :], mask=in_V[None, :], other=0.0)
            dq_RK += product(do_RV, h_VK, DTYPE, PRECISION)
            de_RK -= product(dw_RV, h_VK, DTYPE, PRECISION)
            border_RK += product(u_RV, dS_VK, DTYPE, PRECISION)
            if turn == 0:
                whole_K += tl.sum(h_VK.to(tl.float32) * dS_VK.to(tl.float32), 0)
            if FROM_BETA:
                v_RV = tl.load(write + values, mask=in_values, other=0.0).to(tl.float32)
                d_beta_R += tl.sum(dw_RV.to(tl.float32) * v_RV, 1)
                tl.store(
                    dv_out + values,
                    (dw_RV.to(tl.float32) * beta_R[:, None]).to(dv_out.dtype.element_ty),
                    mask=in_values,
                )
        if turn == 0:
            whole_K *= tl.load(D + tile * K + d, mask=in_K, other=0.0)

        # Readers: blocks before this one, each behind the decay of those between
        between_K = tl.full([BLOCK_K], 1.0, tl.float32)
        far_q_RK, far_e_RK = tl.zeros([BLOCK, BLOCK_K], tl.float32), tl.zeros([BLOCK, BLOCK_K], tl.float32)
        for back in tl.range(0, block, num_stages=1):
            other = block - 1 - back
            _, ko_RK, _, go_RK, _ = load_block(
                q, k, erase, g, A_log, dt_bias, norms, tile, start, count, other, head, H, HV, floor,
                K, BLOCK_K, C, FROM_BETA, GATE,
            )  # fmt: skip
            ko_RK = (ko_RK * keys_factor(go_RK, WIDE, PRECISION)).to(DTYPE)
            dP_RR, dA_RR = load_scores(dP, tile, block, other, C, False), load_scores(dA, tile, block, other, C, False)
            far_q_RK += between_K[None, :] * tl.dot(dP_RR, ko_RK, input_precision=PRECISION)
            far_e_RK += between_K[None, :] * tl.dot(dA_RR, ko_RK, input_precision=PRECISION)
            between_K *= tl.exp2(tl.sum(go_RK, 0) * LOG2E)
        dq_RK = far_q_RK + between_K[None, :] * dq_RK
        de_RK = far_e_RK + between_K[None, :] * de_RK
        since_RK, since_e_RK = readers_factor(g_RK, ERASE_BEFORE_DECAY, WIDE, PRECISION)
        q_RK *= scale
        reads_RK = (q_RK * since_RK).to(DTYPE).to(tl.float32) * dq_RK
        erases_RK = (e_RK * since_e_RK).to(DTYPE).to(tl.float32) * de_RK
        dq_RK *= since_RK
        de_RK *= since_e_RK

        # Written rows: blocks after this one
        between_K = tl.full([BLOCK_K], 1.0, tl.float32)
        dk_RK = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        for ahead in tl.range(0, turn, num_stages=1):
            other = block + 1 + ahead
            qo_RK, _, eo_RK, go_RK, _ = load_block(
                q, k, erase, g, A_log, dt_bias, norms, tile, start, count, other, head, H, HV, floor,
                K, BLOCK_K, C, FROM_BETA, GATE,
            )  # fmt: skip
            so_RK, so_e_RK = readers_factor(go_RK, ERASE_BEFORE_DECAY, WIDE, PRECISION)
            part_RK = product(load_scores(dP, tile, other, block, C, True), qo_RK * scale * so_RK, DTYPE, PRECISION)
            part_RK += product(load_scores(dA, tile, other, block, C, True), eo_RK * so_e_RK, DTYPE, PRECISION)
            dk_RK += between_K[None, :] * part_RK
            between_K *= tl.exp2(tl.sum(go_RK, 0) * LOG2E)
        until_RK = keys_factor(g_RK, WIDE, PRECISION)
        written_RK = (k_RK * until_RK).to(DTYPE).to(tl.float32)
        border_RK *= between_K[None, :]
        reads_RK -= written_RK * dk_RK
        dk_RK = until_RK * (dk_RK + border_RK)
        border_RK *= written_RK

        # Tokens of this block
        dP_RR, dA_RR = load_scores(dP, tile, block, block, C, False), load_scores(dA, tile, block, block, C, False)
        dPt_RR, dAt_RR = load_scores(dP, tile, block, block, C, True), load_scores(dA, tile, block, block, C, True)
        own_R = tl.sum(tl.where(later == earlier, dP_RR.to(tl.float32), 0.0), 1)
        x_RK = summed(in_block(BLOCK, False, False), g_RK, WIDE, PRECISION)
        close = tl.min(tl.min(x_RK, 1), 0) >= LOWEST
        if close:
            later_RK, earlier_RK = two_sides(x_RK)
            later_e_RK = later_RK
            if ERASE_BEFORE_DECAY:
                later_e_RK, _ = two_sides(summed(in_block(BLOCK, True, False), g_RK, WIDE, PRECISION))
            dq_RK, de_RK, dk_RK, reads_RK, erases_RK = pairs(
                q_RK, e_RK, k_RK, later_RK, later_e_RK, earlier_RK,
                tl.where(later > earlier, dP_RR, 0.0), tl.where(later > earlier, dA_RR, 0.0),
                tl.where(later < earlier, dPt_RR, 0.0), tl.where(later < earlier, dAt_RR, 0.0),
                dq_RK, de_RK, dk_RK, reads_RK, erases_RK, DTYPE, PRECISION,
            )  # fmt: skip
        else:
            for level in tl.range(0, BLOCK_LEVELS, num_stages=1):
                f_RK = factor(spans(BLOCK, level, False, False), g_RK, WIDE, PRECISION)
                fe_RK = f_RK
                if ERASE_BEFORE_DECAY:
                    fe_RK = factor(spans(BLOCK, level, True, False), g_RK, WIDE, PRECISION)
                meet, meet_t = crosses(BLOCK, level, False), crosses(BLOCK, level, True)
                dq_RK, de_RK, dk_RK, reads_RK, erases_RK = pairs(
                    q_RK, e_RK, k_RK, f_RK, fe_RK, f_RK,
                    tl.where(meet, dP_RR, 0.0), tl.where(meet, dA_RR, 0.0),
                    tl.where(meet_t, dPt_RR, 0.0), tl.where(meet_t, dAt_RR, 0.0),
                    dq_RK, de_RK, dk_RK, reads_RK, erases_RK, DTYPE, PRECISION,
                )  # fmt: skip

        # d log_decay, but for what the next loop adds
        if ERASE_BEFORE_DECAY:
            dg_RK = summed(later <= earlier, reads_RK, WIDE, PRECISION) + summed(
                later < earlier, erases_RK, WIDE, PRECISION
            )
        else:
            dg_RK = summed(later <= earlier, reads_RK + erases_RK, WIDE, PRECISION)
        dg_RK += summed(later > earlier, border_RK, WIDE, PRECISION)
        value_at = ((start + row) * HV + head)[:, None] * K + d[None, :]
        in_tile = in_row[:, None] & in_K[None, :]
        tl.store(dg_sums + value_at, dg_RK + after_K[None, :], mask=in_tile)
        tl.store(border_sums + (tile * BLOCKS + block) * K + d, tl.sum(border_RK, 0), mask=in_K)
        after_K += tl.sum(reads_RK + erases_RK, 0)

        dq_RK += own_R[:, None] * k_RK
        dk_RK += own_R[:, None] * q_RK
        if FROM_BETA:
            d_beta_R += tl.sum(k_RK * de_RK, 1)
            dk_RK += beta_R[:, None] * de_RK
            if GATE:
                d_beta_R *= beta_R * (1 - beta_R)
            tl.store(d_erase_out + (start + row) * HV + head, d_beta_R.to(d_erase_out.dtype.element_ty), mask=in_row)
        else:
            tl.store(d_erase_out + value_at, de_RK.to(d_erase_out.dtype.element_ty), mask=in_tile)
        dq_RK *= scale
        if GATE:  # through the norms: what lies along the row itself goes
            q_norm, k_norm = tl.load(norms + tile * 2 * C + row), tl.load(norms + tile * 2 * C + C + row)
            key_at = ((start + row) * H + head // (HV // H))[:, None] * K + d[None, :]
            unit_RK = tl.load(q + key_at, mask=in_tile, other=0.0).to(tl.float32) * q_norm[:, None]
            dq_RK = q_norm[:, None] * (dq_RK - tl.sum(unit_RK * dq_RK, 1)[:, None] * unit_RK)
            dk_RK = k_norm[:, None] * (dk_RK - tl.sum(k_RK * dk_RK, 1)[:, None] * k_RK)
        tl.store(dq_out + value_at, dq_RK.to(dq_out.dtype.element_ty), mask=in_tile)
        tl.store(dk_out + value_at, dk_RK.to(dk_out.dtype.element_ty), mask=in_tile)

    tl.debug_barrier()  # both sums are read by other threads than wrote them
    dA_log, d_bias_K = 0.0, tl.zeros([BLOCK_K], tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=1):
        row = block * BLOCK + r
        value_at = ((start + row) * HV + head)[:, None] * K + d[None, :]
        in_tile = (row < count)[:, None] & in_K[None, :]
        dg_RK = tl.load(dg_sums + value_at, mask=in_tile, other=0.0) + whole_K[None, :]
        whole_K += tl.load(border_sums + (tile * BLOCKS + block) * K + d, mask=in_K, other=0.0)
        if GATE:
            x_RK = tl.load(g + value_at, mask=in_tile, other=0.0).to(tl.float32)
            x_RK += tl.load(dt_bias + head * K + d, mask=in_K, other=0.0).to(tl.float32)[None, :]
            dg_RK, dA_RK = through_the_gate(dg_RK, x_RK, gate_rate(A_log, head), floor, GATE)
            dA_log += tl.sum(tl.where(in_tile, dA_RK, 0.0))
            d_bias_K += tl.sum(tl.where(in_tile, dg_RK, 0.0), 0)
        tl.store(dg_out + value_at, dg_RK.to(dg_out.dtype.element_ty), mask=in_tile)
    if GATE:
        tl.store(dA_log_out + tile, dA_log)
        tl.store(d_bias_out + tile * K + d, d_bias_K, mask=in_K)
