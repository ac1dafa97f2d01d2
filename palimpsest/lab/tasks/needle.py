"""Needle in a haystack: a fact at a chosen depth of a long real text, asked for at its end.

    ...some text... The key of qxva is 4071. ...more text... What is the key of qxva? The key of qxva is 4071.
    asked                                                                                               ^^^^
    ...The key of qxva is 4071. ...The key of qxva is 9326. ...What are the keys of qxva? The keys of qxva are 4071, 9326.
    asked                                                                                                      ^^^^  ^^^^

Bytes. Depth is where the needle lies, in tenths of the text. Several needles (other names, other keys), several
questions, and several values under one name, to be told in the order of the text, make it harder. All the rest of the
text is labelled too, so that a model learns the language of the haystack, but only the digits of the answers are scored,
and an answer is right when all of them are.
Source: Kamradt's test, 2023; the forms with several keys, values and queries are RULER's, arXiv:2404.06654.
"""

from dataclasses import dataclass

import numpy as np

from palimpsest.checks import check
from palimpsest.lab.tasks.task import Batch, Key, batch, check_whole
from palimpsest.lab.tasks.text import library, windows

NAME, DIGITS = 4, 4
FACT, QUESTION = b"\nThe key of %b is %b.\n", b"\nWhat is the key of %b? The key of %b is %b."
QUESTION_FOR_ALL, COMMA = b"\nWhat are the keys of %b? The keys of %b are %b.", b", "


@dataclass(frozen=True, kw_only=True)
class Needle:
    """The task.

    Args:
        length: in bytes, the questions included.
        needles: names hidden, 1 to 26.
        queries: how many of them are asked, one after another, 1 to all.
        values: facts a name, all of them to be told, at least 1.
        depth: of the asked fact, 0.0 (start) to 1.0 (end); None draws it anew each time. Further values lie anywhere.
        language: label the haystack too.
        paths: the text, as for Text.

    Raises:
        ValueError: a number out of these ranges, or a length that the facts and questions do not fit.

    >>> bytes(Needle(length=256).draw(1, Key("test", 0, 0)).tokens[0].tolist())[-7:-4]
    b'is '
    """

    length: int = 1024
    needles: int = 1
    queries: int = 1
    values: int = 1
    depth: float | None = None
    language: bool = True
    paths: tuple[str, ...] = ("python",)
    vocab_size = 256

    def __post_init__(self):
        check_whole(self)
        check(1 <= self.needles <= 26, f"needle: needles is {self.needles}; give 1 to 26, a first letter each")
        check(
            1 <= self.queries <= self.needles,
            f"needle: queries is {self.queries}; ask at least 1 and at most all {self.needles} needles",
        )
        check(self.values >= 1, f"needle: values is {self.values}; give at least 1, the facts a name")
        least = self._facts_length + self.queries * self._question_length + 32
        check(
            self.length >= least,
            f"needle: needles and questions do not fit length {self.length}; give at least {least}",
        )
        check(
            self.depth is None or 0 <= self.depth <= 1,
            f"needle: depth is {self.depth}; give a share of the text from 0 to 1, or None",
        )

    @property
    def name(self) -> str:
        """What tables and plots call it, with what makes it harder."""
        several = f", {self.queries} of {self.needles}" if self.needles > 1 else ""
        return "needle" + several + (f", {self.values} values" if self.values > 1 else "")

    @property
    def _facts_length(self) -> int:
        return self.needles * self.values * len(FACT % (b"n" * NAME, b"0" * DIGITS))

    @property
    def _question_length(self) -> int:
        return len(self._question(b"n" * NAME, [b"0" * DIGITS] * self.values))

    def _question(self, name: bytes, keys: list[bytes]) -> bytes:
        return (QUESTION if self.values == 1 else QUESTION_FOR_ALL) % (name, name, COMMA.join(keys))

    def draw(self, count: int, key: Key) -> Batch:
        """`count` sequences [count, length] of bytes; slice `depth`: of the needle asked for, in tenths of the text."""
        rng, text = key.generator(), library(self.paths)[key.split]
        rows, depths, scored = np.empty((3, count, self.length + 1), np.int64)
        straw = windows(rng, text, count, self.length + 1 - self.queries * self._question_length - self._facts_length)
        names = rng.integers(97, 123, (count, self.needles, NAME), np.uint8)
        names[..., 0] = 97 + np.argsort(rng.random((count, 26)), 1)[:, : self.needles]  # told apart by the first letter
        keys = rng.integers(48, 58, (count, self.needles, self.values, DIGITS), np.uint8)
        place = rng.random((count, self.needles, self.values))
        if self.depth is not None:
            place[:, : self.queries, 0] = self.depth
        place.sort(-1)  # values are told in the order of the text
        for row in range(count):
            self._hide(rows[row], depths[row], scored[row], straw[row], names[row], keys[row], place[row])
        labels = rows[:, 1:].copy()
        scored = scored[:, 1:] > 0
        if not self.language:
            labels[~scored] = -100
        return batch(rows[:, :-1], labels, scored, depth=depths[:, 1:])

    def _hide(
        self,
        row: np.ndarray,
        depths: np.ndarray,
        scored: np.ndarray,
        straw: np.ndarray,
        names: np.ndarray,
        keys: np.ndarray,
        place: np.ndarray,
    ) -> None:
        """Writes one sequence into row, and tenths of depth and marks at its answers."""
        pieces, before = [], 0
        cuts = np.rint(place.flatten() * len(straw)).astype(int)
        for i in np.argsort(cuts, kind="stable"):
            name, value = divmod(int(i), self.values)
            fact = FACT % (bytes(names[name]), bytes(keys[name, value]))
            pieces += [straw[before : cuts[i]], np.frombuffer(fact, np.uint8)]
            before = cuts[i]
        pieces.append(straw[before:])
        for i in range(self.queries):
            question = self._question(bytes(names[i]), [bytes(value) for value in keys[i]])
            pieces.append(np.frombuffer(question, np.uint8))
        row[:] = np.concatenate(pieces)
        depths[:], scored[:] = 0, 0
        for i in range(self.queries):
            end = len(row) - 1 - (self.queries - 1 - i) * self._question_length  # of this answer's digits
            for j in range(self.values):
                last = end - (self.values - 1 - j) * (DIGITS + len(COMMA))
                scored[last - DIGITS : last] = 1
                depths[last - DIGITS : last] = round(place[i, j] * 10)
