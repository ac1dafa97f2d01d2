"""Short convolutions and SiLU, up to three of them at once, in the layout that projections give.

    u_t = sum_w weight_w x_{t - W + 1 + w};    y = silu(u)        tokens before a sequence's first come from its state

Grid      (block of channels, block of tokens, stream x batch row).
Holds     a tile of tokens by channels; neighbouring taps read the same lines again, from L1.
Bound     by bytes: x in, y out; backward x and dy in, du out, du in, dx out.
Answers   to short_conv.law. Packed: `ages` [T] is each token's distance from the first of its sequence, `rows` [T] its
          sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_D = 32, 128  # forward: 0.14 ms for 3 x 32,768 x 768 bf16 on an H100, of a floor of 0.10
BACK_T, BACK_D = 64, 32  # backward: 0.83 ms there, and 1.00 with the forward's tile; its floor is 0.25


@triton.jit
def _tap(
    x, state, at_T, age_T, in_T, row_T, back: tl.constexpr, d, in_D, x_stride, D, W: tl.constexpr, STATE: tl.constexpr
):
    """x, `back` tokens ago, for a tile of tokens; what the state holds where that is before the sequence."""
    inside = in_T & (age_T >= back)
    value = tl.load(x + (at_T - back)[:, None] * x_stride + d[None, :], mask=inside[:, None] & in_D[None, :], other=0.0)
    value = value.to(tl.float32)
    if STATE and back > 0:
        where = (row_T[:, None] * D + d[None, :]) * (W - 1) + (age_T - back + W - 1)[:, None]
        held = tl.load(state + where, mask=(in_T & (age_T < back))[:, None] & in_D[None, :], other=0.0)
        value += held.to(tl.float32)
    return value


@triton.jit
def _convolved(x, state, weight, at_T, age_T, in_T, row_T, d, in_D, x_stride, D, W: tl.constexpr, STATE: tl.constexpr):
    u_TD = _tap(x, state, at_T, age_T, in_T, row_T, 0, d, in_D, x_stride, D, W, STATE)
    u_TD = u_TD * tl.load(weight + d * W + W - 1, mask=in_D, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(1, W):
        w_D = tl.load(weight + d * W + W - 1 - back, mask=in_D, other=0.0).to(tl.float32)
        u_TD += _tap(x, state, at_T, age_T, in_T, row_T, back, d, in_D, x_stride, D, W, STATE) * w_D[None, :]
    return u_TD


@triton.jit
def _place(ages, rows, held, t, batch, at_T, in_T, PACKED: tl.constexpr):
    """Of each token: its distance from the first of its sequence, and the row of states that is its sequence's.

    Whatever `ages` and `rows` say, no token is older than the first, and no row is beyond the `held` ones."""
    if PACKED:
        age_T = tl.minimum(tl.maximum(tl.load(ages + at_T, mask=in_T, other=0), 0), t)
        row_T = tl.minimum(tl.maximum(tl.load(rows + at_T, mask=in_T, other=0), 0), held - 1)
        return age_T, row_T.to(tl.int64)
    return t, tl.zeros_like(t).to(tl.int64) + batch


@triton.jit(do_not_specialize=["T", "held"])  # a width divisible by 16 makes masks, and so loads, 16 bytes wide
def forward_kernel(
    x0, x1, x2, weight0, weight1, weight2, state0, state1, state2, y0, y1, y2, ages, rows, held, T, D0, D1, D2,
    stride0, stride1, stride2,
    W: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    stream, batch = tl.program_id(2) % 3, (tl.program_id(2) // 3).to(tl.int64)
    x, weight, state, y, D, x_stride = x0, weight0, state0, y0, D0, stride0
    if stream == 1:
        x, weight, state, y, D, x_stride = x1, weight1, state1, y1, D1, stride1
    if stream == 2:
        x, weight, state, y, D, x_stride = x2, weight2, state2, y2, D2, stride2
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_T, in_D = t < T, d < D
    at_T = batch * T + t
    age_T, row_T = _place(ages, rows, held, t, batch, at_T, in_T, PACKED)
    u_TD = _convolved(x, state, weight, at_T, age_T, in_T, row_T, d, in_D, x_stride, D, W, STATE)
    y_TD = u_TD * tl.sigmoid(u_TD)
    tl.store(y + at_T[:, None] * D + d[None, :], y_TD.to(y.dtype.element_ty), mask=in_T[:, None] & in_D[None, :])


@triton.jit(do_not_specialize=["T", "held"])
def activation_backward_kernel(
    x, weight, state, dy, du, d_weight, ages, rows, held, T, D, x_stride, dy_stride,
    W: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """du = dy silu'(u), and this tile's share of the weights' gradient."""
    batch = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_T, in_D = t < T, d < D
    at_T = batch * T + t
    age_T, row_T = _place(ages, rows, held, t, batch, at_T, in_T, PACKED)
    u_TD = _convolved(x, state, weight, at_T, age_T, in_T, row_T, d, in_D, x_stride, D, W, STATE)
    share = tl.sigmoid(u_TD)
    in_tile = in_T[:, None] & in_D[None, :]
    dy_TD = tl.load(dy + at_T[:, None] * dy_stride + d[None, :], mask=in_tile, other=0.0).to(tl.float32)
    du_TD = dy_TD * share * (1.0 + u_TD * (1.0 - share))
    tl.store(du + at_T[:, None] * D + d[None, :], du_TD.to(du.dtype.element_ty), mask=in_tile)
    part = ((batch * tl.num_programs(1) + tl.program_id(1)) * W).to(tl.int64) * D + d
    for back in tl.static_range(0, W):
        tap_TD = _tap(x, state, at_T, age_T, in_T, row_T, back, d, in_D, x_stride, D, W, STATE)
        tl.store(d_weight + part + (W - 1 - back) * D, tl.sum(du_TD * tap_TD, 0), mask=in_D)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    du, weight, dx, ages, rows, T, D,
    W: tl.constexpr, PACKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx_t = sum_a weight_{W - 1 - a} du_{t + a} over the tokens of its sequence that look back on it."""
    batch = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = d < D
    own_T = batch * T + t
    dx_TD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for ahead in tl.static_range(0, W):
        in_T = t + ahead < T
        age_T, _ = _place(ages, rows, 1, t + ahead, batch, own_T + ahead, in_T, PACKED)
        seen = (in_T & (age_T >= ahead))[:, None] & in_D[None, :]
        du_TD = tl.load(du + (own_T + ahead)[:, None] * D + d[None, :], mask=seen, other=0.0).to(tl.float32)
        dx_TD += du_TD * tl.load(weight + d * W + W - 1 - ahead, mask=in_D, other=0.0).to(tl.float32)[None, :]
    in_tile = (t < T)[:, None] & in_D[None, :]
    tl.store(dx + own_T[:, None] * D + d[None, :], dx_TD.to(dx.dtype.element_ty), mask=in_tile)


def forward(
    xs: list[Tensor], weights: list[Tensor], states: list[Tensor], ages: Tensor | None, rows: Tensor | None
) -> list[Tensor]:
    """One to three streams x [B, T, D] with weights [D, W] -> y like x. states: [N, D, W - 1] each, or none of them."""
    B, T, _ = xs[0].shape
    W = weights[0].shape[-1]
    ys = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    pick = lambda tensors: [tensors[min(i, len(tensors) - 1)] for i in range(3)]
    widths = [x.shape[2] for x in xs] + [0] * (3 - len(xs))  # a stream that is not there has no channels
    if B * T:
        forward_kernel[(triton.cdiv(max(widths), BLOCK_D), triton.cdiv(T, BLOCK_T), 3 * B)](
            *pick(xs), *pick(weights), *pick(states or xs), *pick(ys), ages, rows, len(states[0]) if states else 1, T, *widths,
            *pick([x.stride(1) for x in xs]),
            W=W, STATE=bool(states), PACKED=ages is not None, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, num_warps=4,
        )  # fmt: skip
    return ys


def backward(
    xs: list[Tensor],
    weights: list[Tensor],
    states: list[Tensor],
    ages: Tensor | None,
    rows: Tensor | None,
    dys: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of xs and weights; sums over tokens have one order, so the same inputs give the same bits."""
    B, T, _ = xs[0].shape
    dxs, d_weights = [], []
    for i, (x, weight, dy) in enumerate(zip(xs, weights, dys)):
        D, W = weight.shape
        dx, du = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
        parts = x.new_empty(B, triton.cdiv(T, BACK_T), W, D, dtype=torch.float32)
        if B * T:
            grid = triton.cdiv(D, BACK_D), triton.cdiv(T, BACK_T), B
            shape = dict(W=W, PACKED=ages is not None, BLOCK_T=BACK_T, BLOCK_D=BACK_D, num_warps=4)
            activation_backward_kernel[grid](
                x, weight, states[i] if states else x, dy, du, parts, ages, rows, len(states[i]) if states else 1, T, D,
                x.stride(1), dy.stride(1),
                STATE=bool(states), **shape,
            )  # fmt: skip
            backward_kernel[grid](du, weight, dx, ages, rows, T, D, **shape)
        dxs.append(dx)
        d_weights.append(parts.sum((0, 1)).mT.to(weight.dtype).contiguous())  # as the operator promises
    return dxs, d_weights
