"""What a task is: sequences from a seed, and the answers that are asked for.

Letters  B sequences, T tokens.

To add a task: one file beside this one, with a frozen dataclass that has `length`, `vocab_size` and `draw(count, key)`,
and a line in `__init__.py`. Its docstring draws a sequence; a solver in tests/lab/solvers.py answers it independently.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from palimpsest.checks import check

IGNORED = -100  # the label where nothing is asked
SPLITS = ("train", "test")


class Key(NamedTuple):
    """Names a batch: the same key gives the same batch, and no key of one split gives a batch of the other.

    Attributes:
        split: "train" or "test".
        seed: of the whole run, 0 or more; another seed gives other sequences.
        step: which batch of the run, 0 or more.

    >>> bool(Key("train", seed=0, step=7).generator().integers(10) == Key("train", seed=0, step=7).generator().integers(10))
    True
    """

    split: str
    seed: int
    step: int

    def generator(self) -> np.random.Generator:
        """The source of all that is drawn for this batch, at its start.

        Raises:
            ValueError: a split that is neither of the two, or a negative seed.
        """
        check(self.split in SPLITS, f"split is {self.split!r}; it is 'train' or 'test'")
        check(self.seed >= 0, f"seed is {self.seed}; give 0 or more")
        return np.random.default_rng([SPLITS.index(self.split), self.seed, self.step])


class Batch(NamedTuple):
    """Sequences with what to say after each token.

    Attributes:
        tokens: [B, T], int64.
        labels: [B, T]; labels[b, t] is the answer after reading tokens[b, : t + 1], IGNORED where nothing is asked.
        scored: [B, T], True where the answer counts for accuracy; other labels only help to train.
        slices: what accuracy may be cut by: a whole number [B, T] a name, read where `scored`.
    """

    tokens: Tensor
    labels: Tensor
    scored: Tensor
    slices: dict[str, Tensor]


@runtime_checkable
class Task(Protocol):
    """Anything that draws batches; a class need not inherit from this one.

    >>> from palimpsest.lab.tasks.mqar import MQAR
    >>> isinstance(MQAR(), Task)
    True
    """

    @property
    def name(self) -> str:
        """What tables and plots call it."""
        ...

    @property
    def length(self) -> int:
        """Tokens in a sequence, T."""
        ...

    @property
    def vocab_size(self) -> int:
        """How many tokens there are; all tokens and all answers are from 0 to one less."""
        ...

    def draw(self, count: int, key: Key) -> Batch:
        """`count` sequences, decided by the task's fields, count and key alone."""
        ...


def batch(tokens: np.ndarray, labels: np.ndarray, scored: np.ndarray | None = None, **slices: np.ndarray) -> Batch:
    """A Batch of NumPy arrays of shape [B, T]; what is asked is scored unless told otherwise."""
    tensor = lambda x, kind: torch.from_numpy(np.array(x, kind))
    scored = labels != IGNORED if scored is None else scored
    whole = {name: tensor(np.broadcast_to(value, tokens.shape), np.int64) for name, value in slices.items()}
    return Batch(tensor(tokens, np.int64), tensor(labels, np.int64), tensor(scored, np.bool_), whole)


def distinct(rng: np.random.Generator, low: int, high: int, rows: int, count: int) -> np.ndarray:
    """[rows, count] whole numbers in [low, high), no two of a row alike, in random order."""
    if count * count < 2 * (high - low):  # few of many: draw, and draw again the rows in which two are alike
        numbers, clash = np.empty((rows, count), np.int64), np.ones(rows, bool)
        while clash.any():
            numbers[clash] = rng.integers(low, high, (int(clash.sum()), count))
            clash = (np.diff(np.sort(numbers, 1), axis=1) == 0).any(1)
        return numbers
    return rng.permuted(np.tile(np.arange(low, high, dtype=np.int32), (rows, 1)), axis=1)[:, :count]


def describe(task: Any) -> dict[str, Any]:
    """The task as JSON would hold it."""
    return {"task": task.name, **asdict(task)}


def check_whole(task: Any) -> None:
    """Raise ValueError unless every field that is declared as a whole number is one."""
    for field in fields(task):
        value = getattr(task, field.name)
        whole = field.type is not int or (isinstance(value, int) and not isinstance(value, bool))
        check(whole, f"{type(task).__name__}: {field.name} is {value!r}; give a whole number")
