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
