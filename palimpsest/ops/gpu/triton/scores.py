"""What the gradients inside a chunk need of the value channels, once the recurrences have left the memory before it (h).

    v_new = M (write - E h)         dP_ij = do_i . v_new_j, j <= i         dA_ij = -dw_i . v_new_j, j < i

Grid      (chunk x value head): all chunks at once. Letters as in intra_chunk.py.
"""

import triton
import triton.language as tl

from palimpsest.ops.gpu.triton.tiles import find_chunk, product, sigmoid


@triton.jit(do_not_specialize=["T", "N"])
def scores_kernel(
    E, M, write, beta, d_out, d_write, memories, v_new_out, dP_out, dA_out,
    cu_seqlens, chunk_offsets, T, N, HV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    FROM_BETA: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = E.dtype.element_ty
    chunk, head = tl.program_id(0) // HV, tl.program_id(0) % HV
    tile = tl.program_id(0).to(tl.int64)
    n, start, count = find_chunk(chunk, cu_seqlens, chunk_offsets, T, N, C, PACKED)
    if count <= 0:
        return
    c, d = tl.arange(0, C), tl.arange(0, BLOCK_K)
    in_C, in_K = c < count, d < K
    E_CK = tl.load(E + tile * C * K + c[:, None] * K + d[None, :], mask=in_K[None, :], other=0.0)
    M_CC = tl.trans(tl.load(M + tile * C * C + c[:, None] * C + c[None, :]))  # stored transposed

    dP_CC = tl.zeros([C, C], tl.float32)
    dA_CC = tl.zeros([C, C], tl.float32)
    for first in tl.range(0, V, BLOCK_V, num_stages=1):
        v = first + tl.arange(0, BLOCK_V)
        in_V = v < V
        in_values = in_C[:, None] & in_V[None, :]
        values = ((start + c) * HV + head)[:, None] * V + v[None, :]
        h_VK = tl.load(
            memories + tile * K * V + v[:, None] * K + d[None, :], mask=in_V[:, None] & in_K[None, :], other=0.0
        )
        w_CV = tl.load(write + values, mask=in_values, other=0.0).to(tl.float32)
        if FROM_BETA:
            beta_C = tl.load(beta + (start + c) * HV + head, mask=in_C, other=0.0).to(tl.float32)
            if GATE:
                beta_C = sigmoid(beta_C)
            w_CV *= beta_C[:, None]
        do_CV = tl.load(d_out + values, mask=in_values, other=0.0)
        dw_CV = tl.load(d_write + values, mask=in_values, other=0.0)
        v_new_CV = product(M_CC, w_CV - product(E_CK, tl.trans(h_VK), DTYPE, PRECISION), DTYPE, PRECISION).to(DTYPE)
        tl.store(v_new_out + tile * C * V + c[:, None] * V + v[None, :], v_new_CV, mask=in_V[None, :])
        dP_CC += product(do_CV, tl.trans(v_new_CV), DTYPE, PRECISION)
        dA_CC -= product(dw_CV, tl.trans(v_new_CV), DTYPE, PRECISION)
    square = tile * C * C + c[:, None] * C + c[None, :]
    tl.store(dP_out + square, tl.where(c[:, None] >= c[None, :], dP_CC, 0.0).to(DTYPE))
    tl.store(dA_out + square, tl.where(c[:, None] > c[None, :], dA_CC, 0.0).to(DTYPE))
