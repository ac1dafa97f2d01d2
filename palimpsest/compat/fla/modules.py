"""The modules of flash-linear-attention that its KDA layers, and the released model's own code, are built from."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.ops.gates import l2norm as _l2norm
from palimpsest.ops.short_conv import short_conv


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension."""
    return _l2norm(x, eps).to(output_dtype or x.dtype)


class ShortConvolution(nn.Conv1d):
    """A causal convolution a channel, with FLA's cache of the last W columns, [N, D, W].

    >>> conv = ShortConvolution(6, 4)
    >>> y, cache = conv(torch.ones(2, 5, 6), output_final_state=True)
    >>> y.shape, cache.shape
    (torch.Size([2, 5, 6]), torch.Size([2, 6, 4]))
    """

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        bias: bool = False,
        activation: str | None = "silu",
        backend: str | None = "triton",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ):
        if activation not in (None, "silu", "swish"):
            raise ValueError(f"activation is {activation!r}; a short convolution has 'silu', 'swish' or None")
        options: Any = {
            "padding": kernel_size - 1,
            "groups": hidden_size,
            "bias": bias,
            "device": device,
            "dtype": dtype,
        }
        super().__init__(hidden_size, hidden_size, kernel_size, **options)
        self.hidden_size, self.activation = hidden_size, activation

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] -> y [B, T, D], and the cache after it if asked for. One token without gradients edits `cache`."""
        if mask is not None:
            if cu_seqlens is not None:
                raise ValueError("mask and cu_seqlens were both given; packed sequences have no padding, so give one")
            x = x * mask[..., None]
        W = self.kernel_size[0]
        before = None if cache is None else cache[..., 1:].to(x.dtype)
        y, after = short_conv(x, self.weight.to(x.dtype), state=before, cu_seqlens=cu_seqlens)
        y = y if self.bias is None else y + self.bias.to(x.dtype)
        y = y if self.activation is None else F.silu(y)
        y = y if residual is None else y + residual
        if not output_final_state and cache is None:
            return y, None
        oldest = x.new_zeros(*after.shape[:2], 1)
        if cache is not None and x.shape[1] == 1:
            oldest = cache[..., 1:2].to(x.dtype)
        elif cu_seqlens is None and x.shape[1] >= W:
            oldest = x[:, -W, :, None]
        after = torch.cat((oldest, after), -1)
        if cache is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            after = cache.copy_(after)
        return y, after if output_final_state else None


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, times a weight."""

    def __init__(
        self, hidden_size: int, elementwise_affine: bool = True, bias: bool = False, eps: float = 1e-5,
        device: Any = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return _scaled(x, self.eps, self.weight, self.bias).to(x.dtype)


class FusedRMSNormGated(nn.Module):
    """RMSNorm, times the sigmoid or SiLU of a gate, all in fp32: the way out of a memory layer.

    >>> FusedRMSNormGated(4, activation="sigmoid")(torch.ones(1, 4), torch.zeros(1, 4))
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]], grad_fn=<MulBackward0>)
    """

    def __init__(
        self, hidden_size: int, elementwise_affine: bool = True, eps: float = 1e-5, activation: str = "swish",
        device: Any = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        if activation not in ("swish", "silu", "sigmoid"):
            raise ValueError(f"activation is {activation!r}; a gated norm has 'swish', 'silu' or 'sigmoid'")
        self.eps, self.activation = eps, activation
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype)) if elementwise_affine else None

    def forward(
        self,
        x: Tensor,
        g: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x and g [..., D] -> [..., D]; with prenorm also the sum of x and residual that was normalised."""
        wide = x.float() if residual is None else x.float() + residual.float()
        gate = g.float()
        y = _scaled(wide, self.eps, self.weight, None) * (
            gate.sigmoid() if self.activation == "sigmoid" else F.silu(gate)
        )
        if not prenorm:
            return y.to(x.dtype)
        return y.to(x.dtype), wide if residual_in_fp32 else wide.to(x.dtype)


def _scaled(x: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x.float()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.float()
    return y if bias is None else y + bias.float()
