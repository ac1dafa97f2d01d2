"""Images of a data set that has a name, through `datasets`: CIFAR, ImageNet and the like, where there is a network."""

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
def _split(name: str, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("named images come through datasets: pip install palimpsest-kda[vision]") from error
    try:
        return load_dataset(name, split=split)
    except Exception as error:  # of many libraries: the network, the name, the split
        raise ValueError(
            f"named images: {name!r} has no split {split!r} here ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "check the name, the split and the network, or give a folder that `datasets` reads"
        ) from error


@dataclass(frozen=True, kw_only=True)
class NamedImages:
    """The images of a data set, fitted to a square.

    Args:
        path: "uoft-cs/cifar10", "ILSVRC/imagenet-1k", or a folder with train/CLASS/*.png and test/CLASS/*.png.
        size: pixels of a side; images are resized so that the shorter side fits, and the middle is taken.
        num_classes: that it has.
        image, label: its columns.
        train: the split that is learned from.
        test: the split that is asked.
        mirror: show every second training image from behind.
    """

    path: str = "uoft-cs/cifar10"
    size: int = 32
    num_classes: int = 10
    image: str = "img"
    label: str = "label"
    train: str = "train"
    test: str = "test"
    mirror: bool = True
    channels = 3

    def __post_init__(self):
        check_fields(self, "named images: ")
        check(self.size >= 1, f"named images: size is {self.size}; give at least 1")
        check(self.train != self.test, f"named images: train and test are both {self.train!r}; give two splits")

    @property
    def name(self) -> str:
        """The last word of the path."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def kinds(self) -> tuple[str, ...]:
        """One: the name."""
        return (self.name,)

    def draw(self, count: int, key: Key) -> ImageBatch:
        """As ImageTask.draw."""
        rng, rows = key.generator(), _split(self.path, self.test if key.split == "test" else self.train)
        missing = [c for c in (self.image, self.label) if c not in rows.column_names]
        check(
            not missing,
            f"named images: {self.path!r} has no column {missing[:1]}; its columns are {', '.join(rows.column_names)}",
        )
        images, labels = np.empty((count, self.size, self.size, 3), np.uint8), np.empty(count, np.int64)
        for i, place in enumerate(rng.choice(len(rows), count, replace=key.split == "train" or count > len(rows))):
            row = rows[int(place)]
            images[i], labels[i] = self._fitted(row[self.image]), row[self.label]
            check(
                0 <= labels[i] < self.num_classes,
                f"named images: {self.path!r} has a label {labels[i]}, and num_classes is {self.num_classes}",
            )
            if self.mirror and key.split == "train" and rng.random() < 0.5:
                images[i] = images[i][:, ::-1]
        zeros = torch.zeros(count, dtype=torch.long)
        return ImageBatch(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels), zeros)

    def _fitted(self, image: Any) -> np.ndarray:
        image = image.convert("RGB")
        scale = self.size / min(image.size)
        wide, high = (max(round(side * scale), self.size) for side in image.size)
        left, top = (wide - self.size) // 2, (high - self.size) // 2
        return np.asarray(image.resize((wide, high)).crop((left, top, left + self.size, top + self.size)))
