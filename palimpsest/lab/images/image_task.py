"""What a task on images is: pictures from a key, and the class that is asked for of each."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from palimpsest.lab.tasks.task import Key


class ImageBatch(NamedTuple):
    """Images with their classes.

    Attributes:
        images: [B, C, height, width], uint8.
        labels: [B], int64.
        kinds: [B], int64: which of the task's `kinds` each is.
    """

    images: Tensor
    labels: Tensor
    kinds: Tensor


@runtime_checkable
class ImageTask(Protocol):
    """Anything that draws images."""

    @property
    def name(self) -> str:
        """In tables."""
        ...

    @property
    def size(self) -> int:
        """Pixels of a side."""
        ...

    @property
    def channels(self) -> int:
        """3 for colour, 1 for grey."""
        ...

    @property
    def num_classes(self) -> int:
        """All classes of all kinds."""
        ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is asked, by name: accuracy is told for each."""
        ...

    def draw(self, count: int, key: Key) -> ImageBatch:
        """So many images; the same key gives the same ones, and no image of one split is one of the other."""
        ...
