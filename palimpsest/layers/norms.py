"""Root mean square normalisation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.ops.decode import add_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a weight a channel; float32 inside.

    Args:
        size: channels.
        eps: inside the root.

    >>> RMSNorm(8)(torch.ones(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(self, size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def after(self, x: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D] plus parts [N, J, D], and the norm of that sum. For decoding: no gradient on a GPU."""
        return add_norm(x, parts, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
