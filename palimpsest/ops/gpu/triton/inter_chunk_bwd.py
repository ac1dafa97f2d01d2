"""The recurrence back: the gradient of the memory goes from chunk to chunk, against time.

    dw = (P M)^T do + W dS          dS <- Diag(D) dS + Q^T do - E^T dw

Grid and letters as in inter_chunk_fwd.py; dS is the gradient of the memory after a chunk, and W = M^T K.
Writes    dw, the gradient of `write`; dS for each chunk; the gradient of the first memory.
"""

import triton
import triton.language as tl

from palimpsest.ops.gpu.triton.tiles import find_sequence


@triton.jit(do_not_specialize=["T"])
def inter_chunk_bwd_kernel(
    E, Q, W, P, D, d_out, d_state_out, d_write, d_memories, d_state,
    cu_seqlens, chunk_offsets, T, HV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = E.dtype.element_ty
    n, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    start, tokens, chunk = find_sequence(n, cu_seqlens, chunk_offsets, T, C, PACKED)
    chunks = tl.cdiv(tokens, C)
    c, d = tl.arange(0, C), tl.arange(0, BLOCK_K)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_K, in_V = d < K, v < V
    state_at = tl.program_id(0).to(tl.int64) * K * V + d[None, :] * V + v[:, None]
    in_state = in_K[None, :] & in_V[:, None]
    tile = (chunk + chunks - 1).to(tl.int64) * HV + head
    rows = tile * C * K + c[:, None] * K + d[None, :]
    square = tile * C * C + c[:, None] * C + c[None, :]
    values = (start + (chunks - 1) * C + c)[None, :] * HV * V + head * V + v[:, None]

    dS_VK = tl.load(d_state_out + state_at, mask=in_state, other=0.0)
    for step in tl.range(0, chunks, num_stages=STAGES):
        in_values = ((chunks - 1 - step) * C + c < tokens)[None, :] & in_V[:, None]
        W_CK = tl.load(W + rows, mask=in_K[None, :], other=0.0)
        P_CC = tl.load(P + square)
        E_CK = tl.load(E + rows, mask=in_K[None, :], other=0.0)
        Q_CK = tl.load(Q + rows, mask=in_K[None, :], other=0.0)
        D_K = tl.load(D + tile * K + d, mask=in_K, other=0.0)
        do_VC = tl.load(d_out + values, mask=in_values, other=0.0)
        dS_low_VK = dS_VK.to(DTYPE)
        tl.store(d_memories + tile * K * V + v[:, None] * K + d[None, :], dS_low_VK, mask=in_state)

        dw_VC = tl.dot(do_VC, tl.trans(P_CC), input_precision=PRECISION)
        dw_VC = tl.dot(dS_low_VK, tl.trans(W_CK), dw_VC, input_precision=PRECISION)
        dw_low_VC = dw_VC.to(DTYPE)
        tl.store(d_write + values, dw_low_VC, mask=in_values)
        dS_VK = tl.dot(do_VC, Q_CK, dS_VK * D_K[None, :], input_precision=PRECISION)
        dS_VK -= tl.dot(dw_low_VC, E_CK, input_precision=PRECISION)

        tile -= HV
        rows -= HV * C * K
        square -= HV * C * C
        values -= C * HV * V
    tl.store(d_state + state_at, dS_VK, mask=in_state)
