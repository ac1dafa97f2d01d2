"""The short convolution before q, k and v: each channel mixes its own last few tokens. Causal, depthwise, no bias.

    y_t = sum_w weight_w x_{t - W + 1 + w}

Its state is the last W - 1 inputs. No activation inside. D channels, W taps, B sequences, T tokens, N packed sequences.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from palimpsest.ops.arguments import fit
from palimpsest.ops.packing import check_cu_seqlens, watch_borders


def short_conv(
    x: Tensor, weight: Tensor, *, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve whole sequences.

    Args:
        x: [B, T, D].
        weight: [D, 1, W].
        state: the W - 1 inputs before the first token, oldest first, [B, D, W - 1] ([N, D, W - 1] packed); zeros if None.
        cu_seqlens: [N + 1] borders of packed sequences, with B = 1.

    Returns:
        y [B, T, D] and the state after the last token.

    Raises:
        ValueError: a shape, dtype, layout or device; on a CPU also borders that do not rise from 0 to T. A GPU, which is not
            waited for, raises at its next wait. TypeError: an argument is no tensor.

    >>> y, state = short_conv(torch.ones(1, 3, 1), torch.ones(1, 1, 4))
    >>> y.flatten().tolist(), state.shape
    ([1.0, 2.0, 3.0], torch.Size([1, 1, 3]))
    """
    sizes = fit("short_conv", (x, weight, state))
    B, T, D, W = (sizes[letter] for letter in "BTDW")
    N = B
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, B, T, x.device)
        N = len(cu_seqlens) - 1
    if state is None:
        state = x.new_zeros(N, D, W - 1)
    elif len(state) != N:
        raise ValueError(f"state has shape {tuple(state.shape)}; x and weight ask for {(N, D, W - 1)}")

    if T == 0:
        return x.clone(), state.clone()
    if cu_seqlens is None:
        padded_BDT = torch.cat((state, x.mT), -1)
        return F.conv1d(padded_BDT, weight, groups=D).mT, padded_BDT[..., T:]

    # Packed: tap w looks back W-1-w tokens; where that crosses the border it looks into the sequence's own state.
    borders = cu_seqlens.to(x.device).long()
    age, sequence = _places(borders, T)
    tokens = torch.arange(T, device=x.device)
    y = torch.zeros_like(x)
    for w in range(W):
        back = W - 1 - w
        inside = age >= back
        before = state[sequence, :, (age - back + W - 1).clamp(0, max(W - 2, 0))] if back else x[0]
        y = y + torch.where(inside[:, None], x[0, (tokens - back).clamp(min=0)], before) * weight[:, 0, w]
    return y, _last_inputs(x, state, borders)


def short_convs(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    states: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Up to three streams at once, each through its own convolution and SiLU: what stands before q, k and v.

    On a GPU one kernel reads and writes them as projections leave them; elsewhere `short_conv`, stream by stream.

    Args:
        xs: [B, T, D] each. weights: [D, 1, W] each; they may be wider than xs.
        states: as `short_conv`'s, one a stream. cu_seqlens: as `short_conv`'s.

    Returns:
        The streams after SiLU, and their states after the last token, both in the dtype of xs.

    Raises:
        ValueError, TypeError: as `short_conv`; not as many of each, or of other numbers of tokens or taps.

    >>> ys, states = short_convs([torch.ones(1, 3, 2)] * 3, [torch.ones(2, 1, 4)] * 3)
    >>> ys[0].shape, states[2].shape
    (torch.Size([1, 3, 2]), torch.Size([1, 2, 3]))
    """
    if not xs or len(weights) != len(xs) or (states is not None and len(states) != len(xs)):
        held = "no" if states is None else len(states)
        raise ValueError(f"there are {len(xs)} xs, {len(weights)} weights and {held} states; expected as many of each")
    sizes: dict[str, int] = {}
    for i, (x, weight) in enumerate(zip(xs, weights)):
        found = fit("short_convs", (x, weight, None if states is None else states[i]), **sizes)
        sizes = {letter: found[letter] for letter in "BTW"}
    B, T, W = sizes.values()
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, B, T, xs[0].device)
    sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
    for state in states or ():
        if len(state) != sequences:
            raise ValueError(
                f"a state has shape {tuple(state.shape)}; expected one row for each of {sequences} sequences"
            )
    if _has_kernel(xs):
        borders = None if cu_seqlens is None else cu_seqlens.to(xs[0].device).long()
        ages, rows = (None, None) if borders is None else (x.int() for x in _places(borders, T))
        streams = [x if x.is_contiguous() else x.contiguous() for x in xs]
        flat = [weight.flatten(1) for weight in weights]
        held = [] if states is None else [state.to(xs[0].dtype).contiguous() for state in states]
        ys = _ShortConvs.apply(len(xs), ages, rows, borders, *streams, *flat, *held)
        before: Sequence[Tensor | None] = [None] * len(xs) if states is None else held
        return list(ys), [_windows(x, state, W, borders) for x, state in zip(xs, before)]
    ys, after = [], []
    for i, (x, weight) in enumerate(zip(xs, weights)):
        state = None if states is None else states[i].to(x.dtype)
        y, state = short_conv(x, weight.to(x.dtype), state=state, cu_seqlens=cu_seqlens)
        ys.append(F.silu(y))
        after.append(state.contiguous())  # not a view: a state must not keep the whole sequence alive
    return ys, after


class _ShortConvs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count, ages, rows, borders, *tensors):
        xs, weights, states = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        ctx.save_for_backward(ages, rows, borders, *tensors)
        ctx.count = count
        return tuple(torch.ops.palimpsest_gpu.short_conv(list(xs), list(weights), list(states), ages, rows))

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):  # pyright: ignore[reportIncompatibleMethodOverride]
        (ages, rows, borders, *tensors), n = ctx.saved_tensors, ctx.count
        xs, weights, states = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        dxs, d_weights = torch.ops.palimpsest_gpu.short_conv_backward(xs, weights, states, ages, rows, list(dys))
        wanted = ctx.needs_input_grad[4 + 2 * n :]
        d_states = [
            _state_gradient(x, weight, state, dy, borders) if wants else None
            for x, weight, state, dy, wants in zip(xs, weights, states, dys, wanted)
        ]
        return None, None, None, None, *dxs, *d_weights, *d_states


def _state_gradient(x: Tensor, weight: Tensor, state: Tensor, dy: Tensor, borders: Tensor | None) -> Tensor:
    """The gradient of what stands before each sequence, by the few tokens that see it: its first W - 1."""
    (B, T, D), (N, _, seen) = x.shape, state.shape
    if borders is None:
        borders = torch.arange(N + 1, device=x.device) * T
    at = torch.arange(seen, device=x.device)
    inside = at < borders.diff()[:, None]
    index = (borders[:-1, None] + at).clamp(max=B * T - 1)
    x, dy = (torch.where(inside[..., None], t.reshape(B * T, D)[index], 0).mT.float() for t in (x, dy))
    with torch.enable_grad():
        before = state.detach().float().requires_grad_()
        y = F.silu(F.conv1d(torch.cat((before, x), -1), weight.float()[:, None], groups=D))
        return torch.autograd.grad(y, before, dy)[0].to(state.dtype)


def _has_kernel(xs: Sequence[Tensor]) -> bool:
    """A GPU's dtypes, one of them for all."""
    x = xs[0]
    if not x.is_cuda or x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not 1 <= len(xs) <= 3:
        return False
    return x.shape[1] > 0 and all(other.dtype == x.dtype for other in xs)


def _places(borders: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Of each of T packed tokens: its distance from the first of its sequence, and which sequence that is."""
    tokens = torch.arange(T, device=borders.device)
    watch_borders(borders, T)
    sequence = torch.bucketize(tokens, borders, right=True) - 1
    return tokens - borders[sequence], sequence


def _windows(x: Tensor, state: Tensor | None, W: int, borders: Tensor | None) -> Tensor:
    B, T, D = x.shape
    if borders is None and T >= W - 1:
        return x[:, T - W + 1 :].mT.contiguous()  # not a view: a state must not keep the whole sequence alive
    if state is None:
        state = x.new_zeros(B if borders is None else len(borders) - 1, D, W - 1)
    return torch.cat((state, x.mT), -1)[..., T:].contiguous() if borders is None else _last_inputs(x, state, borders)


def _last_inputs(x: Tensor, state: Tensor, borders: Tensor) -> Tensor:
    """The last W - 1 inputs of each packed sequence."""
    D, T, W = x.shape[2], x.shape[1], state.shape[-1] + 1
    index = borders.diff()[:, None] + torch.arange(-(W - 1), 0, device=x.device)
    from_x = x[0, (borders[:-1, None] + index).clamp(0, T - 1)].mT
    from_state = state.gather(2, (index + W - 1).clamp(0, max(W - 2, 0))[:, None].expand(-1, D, -1))
    return torch.where((index >= 0)[:, None], from_x, from_state).contiguous()  # from_x is transposed


def short_conv_step_(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """One token, x [B, D]; the state [B, D, W - 1] is moved on in place. Returns y [B, D]. No gradient."""
    fit("short_conv_step_", (x, weight, state))
    window = torch.cat((state, x[..., None]), -1)
    state.copy_(window[..., 1:])
    return (window * weight[:, 0]).sum(-1)
