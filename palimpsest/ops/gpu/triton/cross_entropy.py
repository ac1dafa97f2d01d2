"""Cross entropy of rows of logits, and its gradient written over them.

Grid      (row).
Holds     a running maximum and sum of exponentials in fp32; the row is read twice and written once.
Bound     by the logits' bytes.
Answers   to cross_entropy.row_losses_.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, V, row_stride, IGNORE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = logits + tl.program_id(0).to(tl.int64) * row_stride
    target = tl.load(targets + tl.program_id(0))
    top = float("-inf")
    total = 0.0
    for first in range(0, V, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    log_total = top + tl.log(total)
    real = (target >= 0) & (target < V)
    hit = tl.load(row + tl.where(real, target, 0)).to(tl.float32)
    nothing = target == IGNORE
    loss = tl.where(nothing, 0.0, tl.where(real, log_total - hit, float("nan")))
    tl.store(losses + tl.program_id(0), loss)
    if GRADIENT:
        for first in range(0, V, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(row + at, mask=at < V, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - log_total) - (at == target).to(tl.float32)
            tl.store(row + at, tl.where(nothing, 0.0, p).to(logits.dtype.element_ty), mask=at < V)


def row_losses_(logits: Tensor, targets: Tensor, ignore: int, gradient: bool) -> Tensor:
    """logits [N, V] with rows of unit stride, targets [N] -> losses [N] fp32; see cross_entropy.row_losses_."""
    losses = targets.new_empty(targets.shape, dtype=torch.float32)
    if len(targets):
        V = logits.shape[1]
        cross_entropy_kernel[(len(targets),)](
            logits, targets, losses, V, logits.stride(0),
            IGNORE=ignore, GRADIENT=gradient, BLOCK=min(4096, triton.next_power_of_2(V)), num_warps=8,
        )  # fmt: skip
    return losses
