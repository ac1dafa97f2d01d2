"""Padding is packing: a padded batch runs as its real tokens alone, so that no layer ever sees a pad."""

import torch
from torch import Tensor

from palimpsest.ops.packing import check_cu_seqlens
from palimpsest.ops.split import SequenceSplit


def check_sizes(least: int = 1, **sizes: int) -> None:
    """Raise ValueError unless each size is a whole number, `least` or more."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < least:
            raise ValueError(f"{name} is {size!r}; expected a whole number, {least} or more")


def dtype_of(projection: torch.nn.Module) -> torch.dtype | None:
    """The dtype of its weight; None if that is not one of floats, or if the module is no plain projection."""
    weight = getattr(projection, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else None


def check_input(x: Tensor, hidden_size: int, *, step: bool = False, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless x is [B, T, hidden_size], or [B, hidden_size] for a step, of floats, of `dtype` if given."""
    shape = f"[B, hidden_size = {hidden_size}]" if step else f"[B, T, hidden_size = {hidden_size}]"
    if not isinstance(x, Tensor) or x.ndim != (2 if step else 3) or x.shape[-1] != hidden_size:
        came = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"x is {came}; expected a tensor {shape}")
    if not x.is_floating_point() or (dtype not in (None, x.dtype) and not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(f"x is {x.dtype}; expected {dtype or 'floating point'}, the weights' own: use x.to(...)")


def check_rows(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Raise if mask or cu_seqlens does not fit the rows x [B, T]; for one token a sequence, x [B] and mask [B]."""
    rows = tuple(x.shape)
    if mask is not None and cu_seqlens is not None:
        raise ValueError("mask and cu_seqlens were both given; a packed batch has no padding, so give one of them")
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != rows):
        raise ValueError(f"mask is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of shape {rows}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1], x.device)


def check_split(split: SequenceSplit | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Raise ValueError if a split came with borders or padding of its own part."""
    if split is not None and (mask is not None or cu_seqlens is not None):
        which = "mask" if cu_seqlens is None else "cu_seqlens"
        raise ValueError(
            f"{which} came with split; say where documents begin to split_sequence, of the whole sequence, and leave padding out"
        )


def pack(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The real tokens of x [B, T, ...] end to end, [1, N, ...], and the borders between the rows, cu_seqlens [B + 1].

    >>> pack(torch.tensor([[7, 8, 0], [0, 0, 9]]), torch.tensor([[True, True, False], [False, False, True]]))
    (tensor([[7, 8, 9]]), tensor([0, 2, 3]))
    """
    lengths = mask.sum(1)
    return x[mask][None], torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def unpack(packed: Tensor, mask: Tensor) -> Tensor:
    """The inverse of pack: [1, N, ...] back to [B, T, ...], zeros where mask is False."""
    shape = (*mask.shape, *packed.shape[2:])
    at = mask.view(*mask.shape, *[1] * (packed.ndim - 2))
    return packed.new_zeros(shape).masked_scatter(at, packed)
