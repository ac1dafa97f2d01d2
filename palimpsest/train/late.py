"""Numbers of a step that are still on their way from a GPU: the host runs a few steps ahead and waits for none."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

Facts = TypeVar("Facts")
BEHIND = 2  # steps that a GPU may be behind the host: enough to keep it busy, few enough to stop soon


class LateNumbers(Generic[Facts]):
    """A queue of what the host knows of each step, beside numbers that the device will have.

    On a CPU nothing is late.

    Args:
        device: where the numbers are computed.

    >>> late = LateNumbers(torch.device("cpu"))
    >>> late.push("step 1", torch.tensor([1.0, 2.0]))
    >>> list(late.ready())
    [('step 1', [1.0, 2.0])]
    """

    def __init__(self, device: torch.device):
        self._behind = BEHIND if device.type == "cuda" else 0
        self._waiting: deque[tuple[Facts, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, facts: Facts, numbers: Tensor) -> None:
        """Adds a step; the copy of its numbers [n] to the host begins."""
        if not numbers.is_cuda:
            self._waiting.append((facts, numbers, None))
            return
        here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        here.copy_(numbers, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._waiting.append((facts, here, done))

    def ready(self) -> Iterator[tuple[Facts, list[float]]]:
        """The steps old enough that the device is past them, oldest first."""
        yield from self._take(self._behind)

    def all(self) -> Iterator[tuple[Facts, list[float]]]:
        """Every step pushed, however long the device takes: before anything is saved or measured."""
        yield from self._take(0)

    def _take(self, leave: int) -> Iterator[tuple[Facts, list[float]]]:
        while len(self._waiting) > leave:
            facts, numbers, done = self._waiting.popleft()
            if done is not None:
                done.synchronize()
            yield facts, numbers.tolist()
