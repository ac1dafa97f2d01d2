"""Text: the next byte of real text. The needle hides in the same text.

    tokens   T h e   m e m o r y
    labels   h e   m e m o r y .

The text is the interpreter's own library by default: some fifteen megabytes of prose and code on every machine. Files
are dealt to training and test by the hash of their names, so that no file is in both.
"""

import sysconfig
from dataclasses import dataclass
from functools import cache

import numpy as np

from palimpsest.checks import check
from palimpsest.lab.tasks.task import Batch, Key, batch, check_whole
from palimpsest.train.data import read_documents
from palimpsest.train.recipe import TextFiles


@cache
def library(paths: tuple[str, ...], include: tuple[str, ...] = ("*",)) -> dict[str, np.ndarray]:
    """The bytes of the text of each split, end to end."""
    if paths == ("python",):
        skip = ("*/test/*", "test/*", "*/tests/*", "site-packages/*", "dist-packages/*", "*/idle_test/*", "encodings/*")
        source = TextFiles(paths=(sysconfig.get_path("stdlib"),), include=("*.py",), exclude=skip)
    else:
        source = TextFiles(paths=paths, include=include)
    return {
        split: np.frombuffer(b"\n".join(d.content for d in documents), np.uint8)
        for split, documents in zip(("train", "test"), read_documents(source))
    }


def windows(rng: np.random.Generator, text: np.ndarray, count: int, length: int) -> np.ndarray:
    """[count, length] bytes from random places of the text."""
    check(len(text) > length, f"text: it holds {len(text)} bytes, too few for length {length}; give more text")
    start = rng.integers(len(text) - length, size=count)
    return text[start[:, None] + np.arange(length)].astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Text:
    """The task.

    Args:
        length: in bytes, at least 2.
        paths: files and folders of text, or ("python",) for the interpreter's library.

    Raises:
        ValueError: a length out of range.

    >>> Text(length=32).vocab_size
    256
    """

    length: int = 256
    paths: tuple[str, ...] = ("python",)
    name = "text"
    vocab_size = 256

    def __post_init__(self):
        check_whole(self)
        check(self.length >= 2, f"text: length is {self.length}; give at least 2")

    def draw(self, count: int, key: Key) -> Batch:
        """`count` sequences [count, length] of bytes from random places of the text; slice `position`: from 0."""
        rows = windows(key.generator(), library(self.paths)[key.split], count, self.length + 1)
        return batch(rows[:, :-1], rows[:, 1:], position=np.arange(self.length))
