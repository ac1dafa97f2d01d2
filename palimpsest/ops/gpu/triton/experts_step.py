"""A mixture of experts for a few tokens: only the chosen experts' weights are read, each once.

    h_p = silu(gate_e x_n) * up_e x_n        part_p = weight_p down_e h_p        pair p = (token n, its expert e)

Grid      (pair, and one more for the expert that all share; tile of output channels). Of the pairs that share an expert
          the first works for all, 16 tokens at a time, and the others have nothing to do.
Holds     BLOCK_N x 16 sums in fp32, twice where gate and up go together.
Bound     by the bytes of the experts chosen.
Answers   to ops/decode.py, `experts`. The parts are added by whoever takes them (add_norm.py): in one order, so that a
          run is the same to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from palimpsest.ops.gpu.triton.projections import weight_rows_times_tokens
from palimpsest.ops.gpu.triton.tiles import sigmoid


@triton.jit(do_not_specialize=["N"])
def route_kernel(
    logits, bias, experts, weights, N, scaling, E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr, BIASED: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """The K best of the sigmoid scores plus bias, and their weights. One program a token."""
    n = tl.program_id(0)
    e, i = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    in_E = e < E
    scores_E = sigmoid(tl.load(logits + n * E + e, mask=in_E, other=0.0))
    biased_E = scores_E + tl.load(bias + e, mask=in_E, other=0.0)
    weigh_E = scores_E
    if BIASED:
        weigh_E = biased_E
    left_E = tl.where(in_E & (biased_E == biased_E), biased_E, float("-inf"))
    experts_K, weights_K = tl.zeros((BLOCK_K,), tl.int64), tl.zeros((BLOCK_K,), tl.float32)
    for j in tl.static_range(K):
        best = tl.argmax(left_E, 0)
        best = tl.minimum(best, E - 1)  # where nothing is a number, still an expert
        experts_K = tl.where(i == j, best.to(tl.int64), experts_K)
        weights_K = tl.where(i == j, tl.sum(tl.where(e == best, weigh_E, 0.0), 0), weights_K)
        left_E = tl.where(e == best, float("-inf"), left_E)
    if RENORMALIZE:
        weights_K = weights_K / (tl.sum(weights_K, 0) + 1e-20)
    tl.store(experts + n * K + i, experts_K, mask=i < K)
    tl.store(weights + n * K + i, weights_K * scaling, mask=i < K)


@triton.jit
def pairs_of_expert(experts, pair, PAIRS, E, BLOCK_P: tl.constexpr):
    """The expert of a pair, what its result is multiplied by (1, or NaN where there is no such expert), how many pairs it has
    before this one and in all, and each pair's rank among them."""
    p = tl.arange(0, BLOCK_P)
    expert = tl.load(experts + pair)
    same_P = (p < PAIRS) & (tl.load(experts + p, mask=p < PAIRS, other=-1) == expert)
    rank_P = tl.where(same_P, tl.cumsum(same_P.to(tl.int32), 0) - 1, -1)
    before, count = tl.sum((same_P & (p < pair)).to(tl.int32), 0), tl.sum(same_P.to(tl.int32), 0)
    known = tl.minimum(tl.maximum(expert, 0), E - 1)
    return known, tl.where(known == expert, 1.0, float("nan")), before, count, rank_P


@triton.jit
def ranked(rank_P, first, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr):
    """The pairs whose ranks are first .. first + BLOCK_M - 1."""
    m, p = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_P)
    return tl.sum(tl.where(rank_P[:, None] == (first + m)[None, :], p[:, None], 0), 0)


@triton.jit
def up_tile(
    gate, up, x, h, n, in_N, at_M, to_M, in_M, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h[to_M, n] = silu(gate[n] x[at_M]) * up[n] x[at_M]."""
    gate_NM, up_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32), tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    w_at, x_at = n.to(tl.int64)[:, None] * D, at_M.to(tl.int64)[None, :] * D
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_ND = in_N[:, None] & (d < D)[None, :]
        x_DM = tl.load(x + x_at + d[:, None], mask=(d < D)[:, None] & in_M[None, :], other=0.0)
        gate_ND = tl.load(gate + w_at + d[None, :], mask=in_ND, other=0.0)
        up_ND = tl.load(up + w_at + d[None, :], mask=in_ND, other=0.0)
        if PRECISION == "ieee":  # a sum of short sums errs less than a long one
            gate_NM += tl.dot(gate_ND, x_DM, input_precision=PRECISION)
            up_NM += tl.dot(up_ND, x_DM, input_precision=PRECISION)
        else:
            gate_NM = tl.dot(gate_ND, x_DM, gate_NM, input_precision=PRECISION)
            up_NM = tl.dot(up_ND, x_DM, up_NM, input_precision=PRECISION)
    h_NM = gate_NM * sigmoid(gate_NM) * up_NM
    tl.store(
        h + to_M.to(tl.int64)[None, :] * WIDTH + n[:, None], h_NM.to(h.dtype.element_ty),
        mask=in_N[:, None] & in_M[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "PAIRS"])
def experts_up_kernel(
    x, experts, gate, up, shared_gate, shared_up, h, shared_h, N, PAIRS, E,
    K: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    n, m = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    if slot < PAIRS:
        expert, _, before, count, rank_P = pairs_of_expert(experts, slot, PAIRS, E, BLOCK_P)
        if before == 0:
            matrix = expert * WIDTH * D
            for first in range(0, count, BLOCK_M):
                pair_M = ranked(rank_P, first, BLOCK_P, BLOCK_M)
                up_tile(
                    gate + matrix, up + matrix, x, h, n, n < WIDTH, pair_M // K, pair_M, first + m < count,
                    D, WIDTH, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
                )  # fmt: skip
    elif SHARED:
        for first in range(0, N, BLOCK_M):
            up_tile(
                shared_gate, shared_up, x, shared_h, n, n < SHARED, first + m, first + m, first + m < N,
                D, SHARED, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["N", "PAIRS"])
def experts_down_kernel(
    h, shared_h, experts, weights, down, shared_down, parts, N, PAIRS, E,
    K: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = K + 1 if SHARED else K
    slot = tl.program_id(0)
    n, m = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    if slot < PAIRS:
        expert, real, before, count, rank_P = pairs_of_expert(experts, slot, PAIRS, E, BLOCK_P)
        if before == 0:
            matrix = expert * D * WIDTH
            for first in range(0, count, BLOCK_M):
                in_M = first + m < count
                pair_M = ranked(rank_P, first, BLOCK_P, BLOCK_M)
                y_NM = weight_rows_times_tokens(
                    down + matrix, h, n, n < D, pair_M, in_M, WIDTH, BLOCK_N, BLOCK_M, BLOCK_W, PRECISION
                )
                y_NM *= real * tl.load(weights + pair_M, mask=in_M, other=0.0)[None, :]
                to_M = (pair_M // K * PARTS + pair_M % K).to(tl.int64)
                tl.store(parts + to_M[None, :] * D + n[:, None], y_NM, mask=(n < D)[:, None] & in_M[None, :])
    elif SHARED:
        for first in range(0, N, BLOCK_M):
            in_M = first + m < N
            y_NM = weight_rows_times_tokens(
                shared_down, shared_h, n, n < D, first + m, in_M, SHARED, BLOCK_N, BLOCK_M, BLOCK_S, PRECISION
            )
            to_M = ((first + m) * PARTS + K).to(tl.int64)
            tl.store(parts + to_M[None, :] * D + n[:, None], y_NM, mask=(n < D)[:, None] & in_M[None, :])


def route(
    logits: Tensor, bias: Tensor, k: int, scaling: float, renormalize: bool, biased: bool
) -> tuple[Tensor, Tensor]:
    """logits [N, E] and bias [E], fp32, contiguous -> experts [N, k] int64 and weights [N, k] fp32."""
    N, E = logits.shape
    experts, weights = logits.new_empty(N, k, dtype=torch.int64), logits.new_empty(N, k)
    route_kernel[(N,)](
        logits, bias, experts, weights, N, scaling, E=E, K=k, BLOCK_E=triton.next_power_of_2(E),
        BLOCK_K=triton.next_power_of_2(k), BIASED=biased, RENORMALIZE=renormalize, num_warps=1 if E <= 64 else 4,
    )  # fmt: skip
    return experts, weights


def experts_step(
    x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, shared: list[Tensor]
) -> Tensor:
    """x [N, D], experts and weights [N, k], gate and up [E, W, D], down [E, D, W], shared: the same three of the MLP that
    all tokens go through, without E, or none -> parts [N, k + 1 or k, D] fp32, whose sum is the layer's output."""
    (N, D), k, (E, W, _) = x.shape, experts.shape[1], gate.shape
    s_gate, s_up, s_down = shared or (gate, up, down)
    S = len(s_gate) if shared else 0
    h, shared_h = x.new_empty(N * k, W), x.new_empty(N, max(S, 1))
    parts = x.new_empty(N, k + bool(shared), D, dtype=torch.float32)
    wide = x.dtype == torch.float32
    common = dict(
        K=k, D=D, WIDTH=W, SHARED=S, BLOCK_P=triton.next_power_of_2(N * k), BLOCK_M=16,
        PRECISION="ieee" if wide else "tf32",
    )  # fmt: skip
    slots = N * k + bool(shared)
    up_at, down_at = tile(slots, max(W, S), D, wide, 2), tile(slots, D, W, wide, 1)
    experts_up_kernel[(slots, triton.cdiv(max(W, S), up_at["BLOCK_N"]))](
        x, experts, gate, up, s_gate, s_up, h, shared_h, N, N * k, E,
        **common, BLOCK_D=up_at.pop("block"), **up_at,
    )  # fmt: skip
    block = down_at.pop("block")
    experts_down_kernel[(slots, triton.cdiv(D, down_at["BLOCK_N"]))](
        h, shared_h, experts, weights, down, s_down, parts, N, N * k, E,
        **common, BLOCK_W=block, BLOCK_S=min(block, triton.next_power_of_2(max(S, 16))), **down_at,
    )  # fmt: skip
    return parts


def tile(slots: int, outputs: int, inputs: int, wide: bool, matrices: int) -> dict:
    """Rows of weights a program and channels at once: small enough that some hundred programs share the work."""
    block_n = 64 if slots * outputs >= 64 * 512 else 32 if slots * outputs >= 32 * 512 else 16
    block = min(64 if wide else 128, max(16, triton.next_power_of_2(inputs)))
    return dict(BLOCK_N=block_n, block=block, num_warps=4, num_stages=2 if wide else 4 if matrices == 1 else 3)
