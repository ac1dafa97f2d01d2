"""The short convolution before the memory: each channel looks at its own last few tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.ops.short_conv import short_conv, short_conv_step_


class ShortConvolution(nn.Module):
    """A causal convolution a channel, then SiLU.

    Args:
        channels: D.
        width: W, the token itself included.

    >>> conv = ShortConvolution(6, 4)
    >>> y, window = conv(torch.ones(2, 5, 6))
    >>> y.shape, window.shape
    (torch.Size([2, 5, 6]), torch.Size([2, 6, 3]))
    """

    def __init__(self, channels: int, width: int = 4):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x: Tensor, window: Tensor | None = None, *, cu_seqlens: Tensor | None = None):
        """x [B, T, D] and the window [B, D, W - 1] before it (zeros if None) -> y [B, T, D] and the window after it.

        Packed: B is 1 and windows are [N, D, W - 1], one a document.
        """
        window = None if window is None else window.to(x.dtype)
        y, window = short_conv(x, self.weight.to(x.dtype), state=window, cu_seqlens=cu_seqlens)
        return F.silu(y), window.contiguous()  # not a view: a state must not keep the whole sequence alive

    def step_(self, x: Tensor, window: Tensor) -> Tensor:
        """One token x [B, D] -> y [B, D]; the window moves on in place."""
        return F.silu(short_conv_step_(x, self.weight.to(x.dtype), window).to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.weight.shape[-1]}"
