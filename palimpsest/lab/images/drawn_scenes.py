"""Scenes drawn at random, with exact answers: how many, where, and whether there is a way.

    counting   discs and squares, one to six of each, anywhere: how many discs?                             1 to 6
    relation   one red and one blue shape among grey ones: on which side of the blue one is the red one?   left, right,
                                                                                                          above, below
    maze       a maze without loops, cut in two by one wall more, and two dots: is there a way?            yes, no

Three questions of growing reach: a count needs no place, a relation two places, a way every cell between them. Each image
shows which is asked. Chance is 1/6, 1/4 and 1/2. Classes are numbered one kind after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from palimpsest.checks import check, check_fields
from palimpsest.lab.images.image_task import ImageBatch
from palimpsest.lab.tasks.task import Key

KINDS = ("counting", "relation", "maze")
MOST = 6  # discs
CLASSES = {"counting": MOST, "relation": 4, "maze": 2}
SIDES = ("left", "right", "above", "below")
RED, BLUE, WALL = (230, 40, 40), (50, 80, 235), (235, 235, 235)


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Drawn anew for every batch.

    Args:
        size: pixels of a side, a multiple of 4.
        kinds: those that are drawn, each as often as the others.
        cells: of a maze's side.

    >>> batch = Scenes(size=32).draw(6, Key("train", 0, 0))
    >>> batch.images.shape, batch.kinds.tolist()
    (torch.Size([6, 3, 32, 32]), [0, 1, 2, 0, 1, 2])
    """

    size: int = 64
    kinds: tuple[str, ...] = KINDS
    cells: int = 5
    name = "scenes"
    channels = 3
    num_classes = sum(CLASSES.values())

    def __post_init__(self):
        check_fields(self, f"{self.name}: ")
        check(self.size >= 16 and self.size % 4 == 0, f"scenes: size is {self.size}; give a multiple of 4 from 16 on")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        check(bool(self.kinds) and not unknown, f"scenes: kinds is {self.kinds}; choose from {', '.join(KINDS)}")
        check(
            2 <= self.cells <= self.size // 4, f"scenes: cells is {self.cells}; give 2 to {self.size // 4} at this size"
        )

    def draw(self, count: int, key: Key) -> ImageBatch:
        """As ImageTask.draw."""
        rng = key.generator()
        images = np.zeros((count, self.size, self.size, 3), np.uint8)
        labels, kinds = np.empty(count, np.int64), np.arange(count) % len(self.kinds)
        paint = {"counting": self._count, "relation": self._relate, "maze": self._maze}
        first = {kind: sum(CLASSES[k] for k in KINDS[: KINDS.index(kind)]) for kind in KINDS}
        for i in range(count):
            kind = self.kinds[kinds[i]]
            labels[i] = first[kind] + paint[kind](images[i], rng)
        return ImageBatch(
            torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels), torch.from_numpy(kinds)
        )

    def _places(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Middles [count, 2] of squares of a quarter of the side, shaken, no two of them meeting."""
        step = self.size // 4
        cell = rng.permutation(16)[:count]
        return (
            np.stack((cell // 4, cell % 4), 1) * step + step // 2 + rng.integers(-step // 8, step // 8 + 1, (count, 2))
        )

    def _shape(self, image: np.ndarray, rng: np.random.Generator, place: np.ndarray, disc: bool, colour) -> None:
        radius = int(rng.integers(max(self.size // 16, 2), max(self.size // 11, 3) + 1))
        inside = _inside(radius, disc)
        top, left = np.maximum(place - radius, 0)
        part = image[top : place[0] + radius + 1, left : place[1] + radius + 1]
        part[inside[-part.shape[0] :, -part.shape[1] :]] = colour

    def _count(self, image: np.ndarray, rng: np.random.Generator) -> int:
        discs, squares = rng.integers(1, MOST + 1, 2)
        for i, place in enumerate(self._places(rng, discs + squares)):
            self._shape(image, rng, place, i < discs, rng.integers(90, 256, 3))
        return int(discs) - 1

    def _relate(self, image: np.ndarray, rng: np.random.Generator) -> int:
        places = self._places(rng, int(rng.integers(3, 8)))
        colours = [RED, BLUE, *([(130, 130, 130)] * (len(places) - 2))]
        for place, colour in zip(places, colours):
            self._shape(image, rng, place, rng.random() < 0.5, colour)
        down, across = places[0] - places[1]
        if abs(across) == abs(down):  # neither side is right: draw another
            image[:] = 0
            return self._relate(image, rng)
        return (0 if across < 0 else 1) if abs(across) > abs(down) else (2 if down < 0 else 3)

    def _maze(self, image: np.ndarray, rng: np.random.Generator) -> int:
        """A random tree of cells (Kruskal), less one of its edges."""
        n = self.cells
        at = np.arange(n * n).reshape(n, n)
        walls = np.concatenate(
            (np.stack((at[:, :-1], at[:, 1:]), -1).reshape(-1, 2), np.stack((at[:-1], at[1:]), -1).reshape(-1, 2))
        )
        edges = walls[rng.permutation(len(walls))].tolist()
        tree, _ = joined(n * n, edges)
        cut = int(rng.integers(len(tree)))
        open_ = tree[:cut] + tree[cut + 1 :]
        _, part = joined(n * n, open_)
        way = bool(rng.integers(2))
        first, second = rng.integers(n * n, size=2)
        while first == second or (part[first] == part[second]) != way:
            first, second = rng.integers(n * n, size=2)
        pitch = self.size // n
        image[:] = WALL
        middle = lambda cell: (cell // n * pitch + pitch // 2, cell % n * pitch + pitch // 2)
        half = max(pitch // 2 - 2, 1)
        for cell in range(n * n):
            y, x = middle(cell)
            image[y - half : y + half + 1, x - half : x + half + 1] = 0
        for a, b in open_:
            (y, x), (y2, x2) = middle(a), middle(b)
            image[y - half : y2 + half + 1, x - half : x2 + half + 1] = 0
        for cell, colour in ((first, RED), (second, BLUE)):
            y, x = middle(cell)
            small = max(half - 2, 0)
            image[y - small : y + small + 1, x - small : x + small + 1] = colour
        return 0 if way else 1


@cache
def _inside(radius: int, disc: bool) -> np.ndarray:
    """Which pixels of the square around a shape belong to it."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return y * y + x * x <= (radius + 0.4) ** 2 if disc else np.ones((2 * radius + 1,) * 2, bool)


def joined(cells: int, edges: list) -> tuple[list, list[int]]:
    """The edges that join what was apart before them, and of each cell the part that it belongs to in the end.

    >>> joined(4, [(0, 1), (1, 0), (2, 3)])
    ([(0, 1), (2, 3)], [1, 1, 3, 3])
    """
    part, joining = list(range(cells)), []
    for a, b in edges:
        mine, other = part[a], part[b]
        if mine != other:
            joining.append((a, b))
            part = [other if p == mine else p for p in part]
    return joining, part
