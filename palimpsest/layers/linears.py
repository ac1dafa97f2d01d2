"""Several linear layers at once, for the few rows that decoding has."""

from collections.abc import Sequence
from typing import TypeGuard

from torch import Tensor, nn

from palimpsest.ops.decode import MOST_TOKENS, compiled, fused, project


def apply_linears(xs: Sequence[Tensor], linears: Sequence[nn.Module]) -> list[Tensor]:
    """linear_i(x_i), in one launch where a GPU has a kernel for it and every layer is what it seems.

    Args:
        xs: [N, D] each, the same tensor as often as it is projected.
        linears: without biases.

    >>> import torch
    >>> a, b = nn.Linear(4, 2, bias=False), nn.Linear(4, 3, bias=False)
    >>> [y.shape for y in apply_linears([torch.ones(1, 4)] * 2, [a, b])]
    [torch.Size([1, 2]), torch.Size([1, 3])]
    """
    plain = [linear.weight for linear in linears if is_plain(linear) and linear.weight.dtype == xs[0].dtype]
    if len(plain) == len(linears) and (compiled(xs[0]) or fused(xs[0], most=MOST_TOKENS)):
        return project(list(xs), plain)
    return [linear(x) for x, linear in zip(xs, linears, strict=True)]


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear layer that nobody wrapped, quantised or watches, so that its weight may be used without it."""
    if type(linear) is not nn.Linear or linear.bias is not None or linear._forward_hooks or linear._forward_pre_hooks:
        return False
    weight = linear.weight
    return type(weight) is nn.Parameter and weight.is_contiguous() and weight.data_ptr() % 16 == 0
