"""The short convolution before q, k and v: each channel mixes its own last few tokens. Causal, depthwise, no bias.

    y_t = sum_w weight_w x_{t - W + 1 + w}

Its state is the last W - 1 inputs. No activation inside. D channels, W taps, B sequences, T tokens, N packed sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest.ops.packing import check_cu_seqlens


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

    >>> y, state = short_conv(torch.ones(1, 3, 1), torch.ones(1, 1, 4))
    >>> y.flatten().tolist(), state.shape
    ([1.0, 2.0, 3.0], torch.Size([1, 1, 3]))
    """
    B, T, D = x.shape
    W = weight.shape[-1]
    if tuple(weight.shape) != (D, 1, W):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; x of shape {tuple(x.shape)} asks for ({D}, 1, taps)")
    N = B
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, B, T)
        N = len(cu_seqlens) - 1
    state = x.new_zeros(N, D, W - 1) if state is None else state
    if tuple(state.shape) != (N, D, W - 1):
        raise ValueError(f"state has shape {tuple(state.shape)}; x and weight ask for {(N, D, W - 1)}")

    if T == 0:
        return x, state
    if cu_seqlens is None:
        padded_BDT = torch.cat((state, x.mT), -1)
        return F.conv1d(padded_BDT, weight, groups=D).mT, padded_BDT[..., T:]

    # Packed: tap w looks back W-1-w tokens; where that crosses the border it looks into the sequence's own state.
    borders = cu_seqlens.to(x.device).long()
    tokens = torch.arange(T, device=x.device)
    sequence = torch.bucketize(tokens, borders[1:], right=True)
    age = tokens - borders[sequence]
    y = torch.zeros_like(x)
    for w in range(W):
        back = W - 1 - w
        inside = age >= back
        before = state[sequence, :, (age - back + W - 1).clamp(0, max(W - 2, 0))] if back else x[0]
        y = y + torch.where(inside[:, None], x[0, (tokens - back).clamp(min=0)], before) * weight[:, 0, w]
    lengths = borders.diff()
    last = torch.arange(-(W - 1), 0, device=x.device)  # the last W-1 inputs of each sequence
    index = lengths[:, None] + last
    from_x = x[0, (borders[:-1, None] + index).clamp(0, T - 1)].mT
    from_state = state.gather(2, (index + W - 1).clamp(0, max(W - 2, 0))[:, None].expand(-1, D, -1))
    return y, torch.where((index >= 0)[:, None], from_x, from_state)


def short_conv_step_(x: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """One token, x [B, D]; the state [B, D, W - 1] is moved on in place. Returns y [B, D]. No gradient."""
    window = torch.cat((state, x[..., None]), -1)
    state.copy_(window[..., 1:])
    return (window * weight[:, 0]).sum(-1)
