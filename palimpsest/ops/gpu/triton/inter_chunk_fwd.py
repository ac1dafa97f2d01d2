"""The recurrence over the chunks: the memory goes from chunk to chunk, and is read on the way.

    v_new' = write - E S          o = Q S + (P M) v_new'          S <- Diag(D) S + (M^T K)^T v_new'

Grid      (sequence x value head, block of value channels): value channels never meet.
Holds     S transposed, [BLOCK_V, K] in fp32 registers, so that it is the first operand of every product and never
          passes through shared memory. Letters as in intra_chunk.py.
Writes    the output, the last memory, and for the backward the memory before each chunk.
"""

import triton
import triton.language as tl

from palimpsest.ops.gpu.triton.tiles import find_sequence, sigmoid


@triton.jit(do_not_specialize=["T"])
def inter_chunk_fwd_kernel(
    E, Q, W, P, D, write, beta, state, out, state_out, memories,
    cu_seqlens, chunk_offsets, T, HV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    FROM_BETA: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, SAVE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = E.dtype.element_ty
    n, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    start, tokens, chunk = find_sequence(n, cu_seqlens, chunk_offsets, T, C, PACKED)
    c, d = tl.arange(0, C), tl.arange(0, BLOCK_K)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_K, in_V = d < K, v < V
    state_at = tl.program_id(0).to(tl.int64) * K * V + d[None, :] * V + v[:, None]
    in_state = in_K[None, :] & in_V[:, None]
    tile = chunk.to(tl.int64) * HV + head
    rows = tile * C * K + c[:, None] * K + d[None, :]
    square = tile * C * C + c[:, None] * C + c[None, :]
    values = (start + c)[None, :] * HV * V + head * V + v[:, None]

    S_VK = tl.load(state + state_at, mask=in_state, other=0.0)
    for step in tl.range(0, tl.cdiv(tokens, C), num_stages=STAGES):
        in_C = step * C + c < tokens
        in_values = in_C[None, :] & in_V[:, None]
        E_CK = tl.load(E + rows, mask=in_K[None, :], other=0.0)
        W_CK = tl.load(W + rows, mask=in_K[None, :], other=0.0)
        D_K = tl.load(D + tile * K + d, mask=in_K, other=0.0)
        w_VC = tl.load(write + values, mask=in_values, other=0.0).to(tl.float32)
        if FROM_BETA:
            beta_C = tl.load(beta + (start + step * C + c) * HV + head, mask=in_C, other=0.0).to(tl.float32)
            if GATE:
                beta_C = sigmoid(beta_C)
            w_VC *= beta_C[None, :]
        S_low_VK = S_VK.to(DTYPE)
        if SAVE:
            tl.store(memories + tile * K * V + v[:, None] * K + d[None, :], S_low_VK, mask=in_state)

        v_new_VC = (w_VC - tl.dot(S_low_VK, tl.trans(E_CK), input_precision=PRECISION)).to(DTYPE)
        if not SAVE:
            Q_CK = tl.load(Q + rows, mask=in_K[None, :], other=0.0)
            P_CC = tl.load(P + square)
            o_VC = tl.dot(S_low_VK, tl.trans(Q_CK), input_precision=PRECISION)
            o_VC = tl.dot(v_new_VC, P_CC, o_VC, input_precision=PRECISION)
            tl.store(out + values, o_VC.to(out.dtype.element_ty), mask=in_values)
        S_VK = tl.dot(v_new_VC, W_CK, S_VK * D_K[None, :], input_precision=PRECISION)

        tile += HV
        rows += HV * C * K
        square += HV * C * C
        values += C * HV * V
    if not SAVE:
        tl.store(state_out + state_at, S_VK, mask=in_state)
