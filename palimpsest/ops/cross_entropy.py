"""Cross entropy of hidden states against a head, without the logits: they exist for a few rows at a time.

    loss_n = log sum_v exp(z_nv) - z_n,target,    z = hidden head^T

Letters  N tokens, D channels, V words.
The gradient is formed with the loss, chunk by chunk, so that memory depends on neither N V nor V alone: a chunk has as many
rows as fit in CHUNK_BYTES of logits. What remains is the gradient of the head itself, [V, D].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from palimpsest.ops.arguments import fit, state_dtype

IGNORED = -100
CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 29}  # of logits: a CPU's cache, and a GPU's products at full speed


def law(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The definition, all logits at once, in the dtype it is given. Args as `cross_entropy_sum`."""
    return F.cross_entropy(hidden @ head.mT, targets, ignore_index=IGNORED, reduction="sum")


def cross_entropy_sum(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy of all targets, in nats, summed in float32.

    Args:
        hidden: [N, D]. Under autocast the products run in autocast's dtype.
        head: [V, D].
        targets: [N] int64, a word each, or IGNORED.

    Returns:
        A scalar, float32 (float64 for float64); its gradient reaches hidden and head.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on a CPU also a target beyond the words. A GPU, which is not
            waited for, gives NaN for that.

    >>> cross_entropy_sum(torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor([0, 1, -100])) / 2  # log 4
    tensor(1.3863)
    """
    fit("cross_entropy_sum", (hidden, head, targets))
    if not hidden.is_cuda and len(targets):
        real = targets[targets != IGNORED]
        if len(real) and not 0 <= int(real.min()) <= int(real.max()) < len(head):
            raise ValueError(f"targets has words from {real.min()} to {real.max()}; the head has 0 to {len(head) - 1}")
    kind = hidden.device.type
    autocast = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if autocast else hidden.dtype
    return _CrossEntropySum.apply(hidden, head, targets, dtype)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, dtype):
        with torch.autocast(hidden.device.type, enabled=False):
            wants_hidden, wants_head = ctx.needs_input_grad[:2]
            weight, wide = head.to(dtype), state_dtype(dtype)
            d_hidden = torch.empty_like(hidden) if wants_hidden else None
            d_head = torch.zeros_like(head, dtype=wide) if wants_head else None
            total = hidden.new_zeros((), dtype=wide)
            most = CHUNK_BYTES.get(hidden.device.type, 1 << 25)
            rows = max(16, most // (len(head) * (dtype.itemsize if hidden.is_cuda else wide.itemsize)))
            for at in range(0, len(hidden), rows):
                chunk = hidden[at : at + rows].to(dtype)
                logits = chunk @ weight.mT
                logits = logits if logits.is_cuda else logits.to(wide)
                total += row_losses_(logits, targets[at : at + rows], gradient=wants_hidden or wants_head).sum()
                d_logits = logits.to(dtype)
                if d_hidden is not None:
                    d_hidden[at : at + rows] = d_logits @ weight
                if d_head is not None:
                    _add_product_(d_head, d_logits.mT, chunk)
                del logits, d_logits  # before the next piece's are there
        ctx.save_for_backward(d_hidden, d_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_hidden, d_head = ctx.saved_tensors
        d_hidden = None if d_hidden is None else d_hidden * d_loss.to(d_hidden.dtype)
        d_head = None if d_head is None else (d_head * d_loss).to(ctx.head_dtype)
        return d_hidden, d_head, None, None


def row_losses_(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """The cross entropy of each row of logits [N, V], which are used up: with `gradient` they become its gradient."""
    if logits.is_cuda and logits.dtype != torch.float64:
        return torch.ops.palimpsest_gpu.row_losses_(logits, targets, IGNORED, gradient)
    real = targets != IGNORED
    at = torch.where(real, targets, 0)[:, None]
    top = logits.amax(-1, keepdim=True)
    hit = logits.gather(1, at) - top
    share = logits.sub_(top).exp_()
    total = share.sum(-1, keepdim=True)
    losses = torch.where(real, (total.log() - hit)[:, 0], 0)
    if gradient:
        share.div_(total).scatter_add_(1, at, torch.full_like(hit, -1.0)).mul_(real[:, None])
    return losses


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, summed in total's dtype however narrow the factors are."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total += (left @ right).to(total.dtype)
