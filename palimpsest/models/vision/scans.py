"""In which order a memory reads the patches of an image."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

SCANS = {  # name -> the directions of a layer
    "one": ("rows",),
    "both": ("rows", "rows back"),
    "four": ("rows", "rows back", "columns", "columns back"),
}


@cache
def scan_order(direction: str, rows: int, columns: int) -> Tensor:
    """The patches of a grid in the order of a direction: [rows * columns], each a place in reading order.

    Args:
        direction: "rows" (as one reads), "columns" (column by column), or either with " back", from the end.
        rows, columns: of the grid.

    Raises:
        ValueError: another direction.

    >>> scan_order("columns", 2, 3).tolist(), scan_order("rows back", 2, 3).tolist()
    ([0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0])
    """
    line, _, back = direction.partition(" ")
    if line not in ("rows", "columns") or back not in ("", "back"):
        raise ValueError(f"direction is {direction!r}; it is 'rows' or 'columns', or one of them with ' back'")
    grid = torch.arange(rows * columns).view(rows, columns)
    order = (grid if line == "rows" else grid.mT).flatten()
    return order.flip(0) if back else order


def in_order(x: Tensor, direction: str, rows: int, columns: int) -> Tensor:
    """Patches in the order of a direction, by views and flips: their gradients need no scattering.

    Args:
        x: [B, rows * columns, D], in reading order. direction: as of `scan_order`.

    >>> in_order(torch.arange(6).view(1, 6, 1), "columns back", 2, 3).flatten().tolist()
    [5, 2, 4, 1, 3, 0]
    """
    line, _, back = direction.partition(" ")
    x = x.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2) if line == "columns" else x
    return x.flip(1) if back else x


def in_reading_order(y: Tensor, direction: str, rows: int, columns: int) -> Tensor:
    """What `in_order` put into the order of a direction, back in reading order.

    >>> x = torch.arange(6).view(1, 6, 1)
    >>> in_reading_order(in_order(x, "columns back", 2, 3), "columns back", 2, 3).equal(x)
    True
    """
    line, _, back = direction.partition(" ")
    y = y.flip(1) if back else y
    return y.unflatten(1, (columns, rows)).transpose(1, 2).flatten(1, 2) if line == "columns" else y
