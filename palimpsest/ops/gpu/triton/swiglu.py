"""The inside of a gated MLP, one pass.

    h = silu(gate) * up * weight        weight: one a row, or none

Grid      (row, block of channels).
Bound     by its bytes: gate and up in, h out.
Answers   to ops/prefill.py, `swiglu`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from palimpsest.ops.gpu.triton.tiles import sigmoid

BLOCK_I = 1024


@triton.jit
def swiglu_kernel(gate, up, weight, h, I: tl.constexpr, BLOCK_I: tl.constexpr, WEIGHTED: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    at, inside = row * I + i, i < I
    gate_I = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    h_I = gate_I * sigmoid(gate_I) * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        h_I *= tl.load(weight + row)
    tl.store(h + at, h_I.to(h.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor, weight: Tensor | None) -> Tensor:
    """gate and up [..., I], contiguous, weight [N] fp32 or None -> h like gate."""
    h, I = torch.empty_like(gate), gate.shape[-1]
    if gate.numel():
        block = min(BLOCK_I, triton.next_power_of_2(I))
        swiglu_kernel[(gate.numel() // I, triton.cdiv(I, block))](
            gate, up, weight, h, I=I, BLOCK_I=block, WEIGHTED=weight is not None, num_warps=4 if block > 512 else 2
        )
    return h
