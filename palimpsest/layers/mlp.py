"""The gated MLP: down(silu(gate(x)) * up(x))."""

import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.layers.linears import apply_linears
from palimpsest.ops.prefill import suits, swiglu


class GatedMLP(nn.Module):
    """SwiGLU (arXiv:2002.05202), without biases.

    Args:
        hidden_size: channels in and out.
        intermediate_size: channels between.

    >>> import torch
    >>> GatedMLP(8, 16)(torch.ones(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(swiglu(gate, up) if suits(gate) and gate.dtype == up.dtype else F.silu(gate) * up)

    def step(self, x: Tensor) -> Tensor:
        """A few tokens x [N, D], as one part to be added to the residual stream, [N, 1, D]."""
        gate, up = apply_linears([x, x], [self.gate_proj, self.up_proj])
        return apply_linears([F.silu(gate) * up], [self.down_proj])[0][:, None]
