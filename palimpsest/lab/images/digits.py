"""Handwritten digits that scikit-learn ships: 1,797 of 8 x 8 pixels, a third of them kept for the test.

Source: the test set of the UCI machine learning repository's optical recognition of handwritten digits (Alpaydin and
Kaynak, 1998; CC BY 4.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from palimpsest.checks import check, check_fields
from palimpsest.lab.images.image_task import ImageBatch
from palimpsest.lab.tasks.task import Key


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install palimpsest-kda[vision]") from error
    found: Any = load_digits()
    return (found.images * (255 / 16)).astype(np.uint8), found.target.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Every third image is of the test split, so that both hold every writer's hand.

    Args:
        size: pixels of a side, a multiple of 8; each pixel of an image becomes a square.

    >>> Digits(size=16).num_classes
    10
    """

    size: int = 16
    name = "digits"
    channels = 1
    num_classes = 10
    kinds = ("digits",)

    def __post_init__(self):
        check_fields(self, f"{self.name}: ")
        check(self.size >= 8 and self.size % 8 == 0, f"digits: size is {self.size}; give a multiple of 8")

    def draw(self, count: int, key: Key) -> ImageBatch:
        """As ImageTask.draw, with repetition."""
        images, labels = _digits()
        test = np.arange(len(labels)) % 3 == 2
        mine = np.flatnonzero(test if key.split == "test" else ~test)
        chosen = key.generator().choice(mine, count, replace=key.split == "train" or count > len(mine))
        drawn = images[chosen].repeat(self.size // 8, 1).repeat(self.size // 8, 2)[:, None]
        zeros = torch.zeros(count, dtype=torch.long)
        return ImageBatch(torch.from_numpy(drawn), torch.from_numpy(labels[chosen]), zeros)
