"""What stands between the products of a prompt, without a gradient: on a GPU one pass over memory each.

    gated_norm     each head of a memory's output at its own scale, times the output gate
    swiglu         silu(gate) * up, times a weight a row
    expert_sum     what a token's experts gave, added up

Each is a few lines of plain PyTorch here, the law of its kernel. In training torch.compile fuses these lines with their
neighbours; prompts come in any length, and would be compiled anew. Nothing here has a gradient, or looks at numbers on the host.

Letters  N tokens (or pairs of a token and an expert), D channels, H heads of K channels, I inner channels, k experts a token.
Forms    as in ops/decode.py: "torch", "triton", or "auto", which takes the kernels where they suit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest.ops import decode  # as a whole: it imports the experts, which import this
from palimpsest.ops.arguments import state_dtype
from palimpsest.ops.backends import within_a_transform


def suits(x: Tensor) -> bool:
    """Whether a call on x is for these kernels: on a GPU, where no gradient is wanted and nobody compiles or transforms."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cuda:
        return False
    return not within_a_transform() and decode.fused(x)


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, silu: bool = False, form: decode.Form = "auto"
) -> Tensor:
    """The RMSNorm of each head, times the sigmoid (or silu) of the gate.

    Args:
        x: [..., H, K], as read from the memory.
        gate: [..., H K], logits.
        weight: [K].

    Returns:
        [..., H K] in the gate's dtype.

    >>> gated_norm(torch.ones(1, 2, 3), torch.zeros(1, 6), torch.ones(3), 0.0)
    tensor([[0.5000, 0.5000, 0.5000, 0.5000, 0.5000, 0.5000]])
    """
    if decode.fused(gate, form):
        return torch.ops.palimpsest_gpu.gated_norm(x.contiguous(), gate.contiguous(), weight, eps, silu)
    wide = _wide(gate)
    y = F.rms_norm(x.to(wide.dtype), weight.shape, weight.to(wide.dtype), eps).flatten(-2)
    return (y * (F.silu(wide) if silu else wide.sigmoid())).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor, weight: Tensor | None = None, *, form: decode.Form = "auto") -> Tensor:
    """silu(gate) * up, in float32 inside.

    Args:
        gate, up: [..., I].
        weight: [N] for gate [N, I], fp32: how much of each row; 1 if None.

    >>> swiglu(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([2.0]))
    tensor([[1.4621, 1.4621]])
    """
    if decode.fused(gate, form):
        return torch.ops.palimpsest_gpu.swiglu(gate.contiguous(), up.contiguous(), weight)
    h = F.silu(_wide(gate)) * _wide(up)
    return (h if weight is None else h * weight[:, None]).to(gate.dtype)


def expert_sum(rows: Tensor, back: Tensor, *, form: decode.Form = "auto") -> Tensor:
    """sum_j rows[back_nj], in float32 inside and in the order of j.

    Args:
        rows: [M, D]. back: [N, k] int64, rows' places.

    Returns:
        [N, D] in rows' dtype.

    >>> expert_sum(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0, 2], [1, 1]]))
    tensor([[5.],
            [4.]])
    """
    if decode.fused(rows, form):
        return torch.ops.palimpsest_gpu.expert_sum(rows.contiguous(), back.contiguous())
    return _wide(rows[back]).sum(1).to(rows.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(state_dtype(x.dtype))
