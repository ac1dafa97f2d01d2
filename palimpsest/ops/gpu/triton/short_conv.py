"""Short convolutions and SiLU, up to three of them at once, in the layout that projections give.

    u_t = sum_w weight_w x_{t - W + 1 + w};    y = silu(u)        tokens before a sequence's first come from its state

Grid      (block of channels, block of tokens, stream x batch row).
Holds     for four taps, as released, a window of tokens in registers while a program walks down its channels: nothing is
          read twice. For other widths, and the gradient beside a state, a tile of tokens by channels.
Bound     by bytes: x in, y out; backward x and dy in, dx out, and in tiles du out and in, too.
Answers   to short_conv.law. Packed: `ages` [T] is each token's distance from the first of its sequence, `rows` [T] its
          sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_D = 32, 128  # forward: 0.14 ms for 3 x 32,768 x 768 bf16 on an H100, of a floor of 0.10
BACK_T, BACK_D = 64, 32  # backward in two passes: 0.83 ms there, and 1.00 with the forward's tile; its floor is 0.25
WALK_T, WALK_D = (
    128,
    256,
)  # in one walk: tokens that a program walks over, channels that walk side by side; 0.20 ms backward


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


@triton.jit
def _row(pointer, stride, at, inside, d, in_D):
    return tl.load(pointer + at * stride + d, mask=in_D & inside, other=0.0).to(tl.float32)


@triton.jit
def _age(ages, t, T, PACKED: tl.constexpr):
    """The distance of token t from the first of its sequence."""
    if PACKED:
        return tl.load(ages + tl.minimum(t, T - 1))  # addresses nothing: with states, `forward` keeps to tiles
    return t


@triton.jit
def _before(x_D, back: tl.constexpr, age, state, row, D, d, in_D, STATE: tl.constexpr):
    """The input `back` tokens ago, x if it is of this sequence, and what its state holds if not."""
    held_D = tl.zeros_like(x_D)
    if STATE:  # noqa: SIM102  # a choice at compile time, then one at run time
        if age < back:
            held_D = tl.load(state + (row * D + d) * 3 + (age - back + 3), mask=in_D, other=0.0).to(tl.float32)
    return tl.where(age >= back, x_D, held_D)


@triton.jit
def _forth(
    x_D, x1, x2, x3, w0, w1, w2, w3, ages, rows, state, batch, t, T, y, at, D, d, in_D,
    STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One token on: its y, and the window before the next."""
    age, row = _age(ages, t, T, PACKED), batch
    if STATE and PACKED:
        row = tl.load(rows + tl.minimum(t, T - 1)).to(tl.int64)
    x1 = _before(x1, 1, age, state, row, D, d, in_D, STATE)
    x2 = _before(x2, 2, age, state, row, D, d, in_D, STATE)
    x3 = _before(x3, 3, age, state, row, D, d, in_D, STATE)
    u_D = w3 * x_D + w2 * x1 + w1 * x2 + w0 * x3
    tl.store(y + at * D + d, (u_D * tl.sigmoid(u_D)).to(y.dtype.element_ty), mask=in_D & (t < T))
    return x_D, x1, x2


@triton.jit(do_not_specialize=["T"])
def walk_forward_kernel(
    x0, x1, x2, weight0, weight1, weight2, state0, state1, state2, y0, y1, y2, ages, rows, T, D0, D1, D2,
    stride0, stride1, stride2,
    STATE: tl.constexpr, PACKED: tl.constexpr, WALK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`forward_kernel` for four taps: each program walks over WALK_T tokens with a window in registers."""
    stream, batch = tl.program_id(2) % 3, (tl.program_id(2) // 3).to(tl.int64)
    x, weight, state, y, D, x_stride = x0, weight0, state0, y0, D0, stride0
    if stream == 1:
        x, weight, state, y, D, x_stride = x1, weight1, state1, y1, D1, stride1
    if stream == 2:
        x, weight, state, y, D, x_stride = x2, weight2, state2, y2, D2, stride2
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = d < D
    w0 = tl.load(weight + d * 4, mask=in_D, other=0.0).to(tl.float32)
    w1 = tl.load(weight + d * 4 + 1, mask=in_D, other=0.0).to(tl.float32)
    w2 = tl.load(weight + d * 4 + 2, mask=in_D, other=0.0).to(tl.float32)
    w3 = tl.load(weight + d * 4 + 3, mask=in_D, other=0.0).to(tl.float32)
    first, base = tl.program_id(1) * WALK_T, batch * T
    a1 = _row(x, x_stride, base + first - 1, first >= 1, d, in_D)
    a2 = _row(x, x_stride, base + first - 2, first >= 2, d, in_D)
    a3 = _row(x, x_stride, base + first - 3, first >= 3, d, in_D)
    for step in range(0, WALK_T, 4):
        t = first + step
        xa = _row(x, x_stride, base + t, t < T, d, in_D)
        xb = _row(x, x_stride, base + t + 1, t + 1 < T, d, in_D)
        xc = _row(x, x_stride, base + t + 2, t + 2 < T, d, in_D)
        xd = _row(x, x_stride, base + t + 3, t + 3 < T, d, in_D)
        a1, a2, a3 = _forth(
            xa, a1, a2, a3, w0, w1, w2, w3, ages, rows, state, batch, t, T, y, base + t, D, d, in_D, STATE, PACKED
        )
        a1, a2, a3 = _forth(
            xb,
            a1,
            a2,
            a3,
            w0,
            w1,
            w2,
            w3,
            ages,
            rows,
            state,
            batch,
            t + 1,
            T,
            y,
            base + t + 1,
            D,
            d,
            in_D,
            STATE,
            PACKED,
        )
        a1, a2, a3 = _forth(
            xc,
            a1,
            a2,
            a3,
            w0,
            w1,
            w2,
            w3,
            ages,
            rows,
            state,
            batch,
            t + 2,
            T,
            y,
            base + t + 2,
            D,
            d,
            in_D,
            STATE,
            PACKED,
        )
        a1, a2, a3 = _forth(
            xd,
            a1,
            a2,
            a3,
            w0,
            w1,
            w2,
            w3,
            ages,
            rows,
            state,
            batch,
            t + 3,
            T,
            y,
            base + t + 3,
            D,
            d,
            in_D,
            STATE,
            PACKED,
        )


@triton.jit
def _walk(
    x_D, dy_D, x1, x2, x3, g1, g2, g3, s0, s1, s2, s3, w0, w1, w2, w3, age, own, dx, at, stored, d, in_D
):  # fmt: skip
    """One token on: its du, what it gives the three tokens before it, and dx of the third of these, which is complete.

    x1, x2, x3: inputs 1 to 3 tokens ago. g1, g2, g3: dx of those tokens so far. s0 to s3: the weights' gradients.
    """
    x1_D, x2_D, x3_D = (
        tl.where(age >= 1, x1, 0.0),
        tl.where(age >= 2, x2, 0.0),
        tl.where(age >= 3, x3, 0.0),
    )
    u_D = w3 * x_D + w2 * x1_D + w1 * x2_D + w0 * x3_D
    share_D = tl.sigmoid(u_D)
    du_D = dy_D * share_D * (1.0 + u_D * (1.0 - share_D))
    g1, g2, g3 = (
        g1 + tl.where(age >= 1, w2 * du_D, 0.0),
        g2 + tl.where(age >= 2, w1 * du_D, 0.0),
        g3 + tl.where(age >= 3, w0 * du_D, 0.0),
    )
    tl.store(dx + at, g3.to(dx.dtype.element_ty), mask=in_D & stored)
    mine_D = tl.where(own, du_D, 0.0)
    s3 += mine_D * x_D
    s2 += mine_D * x1_D
    s1 += mine_D * x2_D
    s0 += mine_D * x3_D
    return x_D, x1, x2, w3 * du_D, g1, g2, s0, s1, s2, s3


@triton.jit(do_not_specialize=["T"])
def walk_kernel(
    x0, x1, x2, weight0, weight1, weight2, dy0, dy1, dy2, dx0, dx1, dx2, parts, ages, T, D0, D1, D2,
    x_stride0, x_stride1, x_stride2, dy_stride0, dy_stride1, dy_stride2, WIDEST,
    PACKED: tl.constexpr, WALK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The whole gradient for four taps and no state: each program walks over WALK_T tokens with a window in registers, and
    over three more, whose du reaches back. parts [stream, B, walk, D, 4]: its share of the weights' gradients."""
    stream, batch = tl.program_id(2) % 3, (tl.program_id(2) // 3).to(tl.int64)
    x, weight, dy, dx, D, x_stride, dy_stride = x0, weight0, dy0, dx0, D0, x_stride0, dy_stride0
    if stream == 1:
        x, weight, dy, dx, D, x_stride, dy_stride = x1, weight1, dy1, dx1, D1, x_stride1, dy_stride1
    if stream == 2:
        x, weight, dy, dx, D, x_stride, dy_stride = x2, weight2, dy2, dx2, D2, x_stride2, dy_stride2
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = d < D
    w0 = tl.load(weight + d * 4, mask=in_D, other=0.0).to(tl.float32)
    w1 = tl.load(weight + d * 4 + 1, mask=in_D, other=0.0).to(tl.float32)
    w2 = tl.load(weight + d * 4 + 2, mask=in_D, other=0.0).to(tl.float32)
    w3 = tl.load(weight + d * 4 + 3, mask=in_D, other=0.0).to(tl.float32)
    first, base = tl.program_id(1) * WALK_T, batch * T
    a1 = _row(x, x_stride, base + first - 1, first >= 1, d, in_D)
    a2 = _row(x, x_stride, base + first - 2, first >= 2, d, in_D)
    a3 = _row(x, x_stride, base + first - 3, first >= 3, d, in_D)
    zero = tl.zeros((BLOCK_D,), tl.float32)
    g1, g2, g3, s0, s1, s2, s3 = zero, zero, zero, zero, zero, zero, zero
    last = first + WALK_T
    for step in range(0, WALK_T + 4, 4):
        t = first + step
        xa, ya = _row(x, x_stride, base + t, t < T, d, in_D), _row(dy, dy_stride, base + t, t < T, d, in_D)
        xb, yb = (
            _row(x, x_stride, base + t + 1, t + 1 < T, d, in_D),
            _row(dy, dy_stride, base + t + 1, t + 1 < T, d, in_D),
        )
        xc, yc = (
            _row(x, x_stride, base + t + 2, t + 2 < T, d, in_D),
            _row(dy, dy_stride, base + t + 2, t + 2 < T, d, in_D),
        )
        xd, yd = (
            _row(x, x_stride, base + t + 3, t + 3 < T, d, in_D),
            _row(dy, dy_stride, base + t + 3, t + 3 < T, d, in_D),
        )
        a1, a2, a3, g1, g2, g3, s0, s1, s2, s3 = _walk(
            xa, ya, a1, a2, a3, g1, g2, g3, s0, s1, s2, s3, w0, w1, w2, w3, _age(ages, t, T, PACKED), t < last,
            dx, (base + t - 3) * D + d, (step >= 4) & (t - 3 < T), d, in_D,
        )  # fmt: skip
        a1, a2, a3, g1, g2, g3, s0, s1, s2, s3 = _walk(
            xb, yb, a1, a2, a3, g1, g2, g3, s0, s1, s2, s3, w0, w1, w2, w3, _age(ages, t + 1, T, PACKED), t < last,
            dx, (base + t - 2) * D + d, (step >= 4) & (t - 2 < T), d, in_D,
        )  # fmt: skip
        a1, a2, a3, g1, g2, g3, s0, s1, s2, s3 = _walk(
            xc, yc, a1, a2, a3, g1, g2, g3, s0, s1, s2, s3, w0, w1, w2, w3, _age(ages, t + 2, T, PACKED), t < last,
            dx, (base + t - 1) * D + d, (step >= 4) & (t - 1 < T), d, in_D,
        )  # fmt: skip
        a1, a2, a3, g1, g2, g3, s0, s1, s2, s3 = _walk(
            xd, yd, a1, a2, a3, g1, g2, g3, s0, s1, s2, s3, w0, w1, w2, w3, _age(ages, t + 3, T, PACKED), t < last,
            dx, (base + t) * D + d, (t < last) & (t < T), d, in_D,
        )  # fmt: skip
    part = (((stream * (tl.num_programs(2) // 3) + batch) * tl.num_programs(1) + tl.program_id(1)) * WIDEST + d) * 4
    tl.store(parts + part, s0, mask=in_D)
    tl.store(parts + part + 1, s1, mask=in_D)
    tl.store(parts + part + 2, s2, mask=in_D)
    tl.store(parts + part + 3, s3, mask=in_D)


def forward(
    xs: list[Tensor], weights: list[Tensor], states: list[Tensor], ages: Tensor | None, rows: Tensor | None
) -> list[Tensor]:
    """One to three streams x [B, T, D] with weights [D, W] -> y like x. states: [N, D, W - 1] each, or none of them."""
    B, T, _ = xs[0].shape
    W = weights[0].shape[-1]
    ys = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    pick = lambda tensors: [tensors[min(i, len(tensors) - 1)] for i in range(3)]
    widths = [x.shape[2] for x in xs] + [0] * (3 - len(xs))  # a stream that is not there has no channels
    if B * T and W == 4 and not (states and ages is not None):  # tiles clamp the rows that address states
        walk_forward_kernel[(triton.cdiv(max(widths), WALK_D), triton.cdiv(T, WALK_T), 3 * B)](
            *pick(xs), *pick(weights), *pick(states or xs), *pick(ys), ages, rows, T, *widths, *pick([x.stride(1) for x in xs]),
            STATE=bool(states), PACKED=ages is not None, WALK_T=WALK_T, BLOCK_D=WALK_D, num_warps=4,
        )  # fmt: skip
    elif B * T:
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
    if weights[0].shape[1] == 4 and not states and B * T:
        return _walked(xs, weights, ages, dys)
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


def _walked(
    xs: list[Tensor], weights: list[Tensor], ages: Tensor | None, dys: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """`backward` in one launch and one sum."""
    B, T, _ = xs[0].shape
    dxs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]
    pick = lambda tensors: [tensors[min(i, len(tensors) - 1)] for i in range(3)]
    widths = [x.shape[2] for x in xs] + [0] * (3 - len(xs))  # a stream that is not there has no channels
    walks, widest = triton.cdiv(T, WALK_T), max(widths)
    parts = xs[0].new_empty(3, B * walks, widest, 4, dtype=torch.float32)
    walk_kernel[(triton.cdiv(widest, WALK_D), walks, 3 * B)](
        *pick(xs), *pick(weights), *pick(dys), *pick(dxs), parts, ages, T, *widths,
        *pick([x.stride(1) for x in xs]), *pick([dy.stride(1) for dy in dys]), widest,
        PACKED=ages is not None, WALK_T=WALK_T, BLOCK_D=WALK_D, num_warps=4,
    )  # fmt: skip
    sums = parts[: len(xs)].sum(1)
    return dxs, [part[: len(w)].to(w.dtype).contiguous() for part, w in zip(sums, weights)]
