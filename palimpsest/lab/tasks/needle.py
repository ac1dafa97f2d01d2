"""Needle in a haystack: a fact at a chosen depth of a long real text, asked for at its end.

    ...some text... The key of qxva is 4071. ...more text... What is the key of qxva? The key of qxva is 4071.
    asked                                                                                               ^^^^

Bytes. Depth is where the needle lies, in tenths of the text. Several needles (other names, other keys) and several
questions make it harder. All the rest of the text is labelled too, so that a model learns the language of the haystack,
but only the digits of the answers are scored, and an answer is right when all of them are.
Source: Kamradt's test, 2023; the forms with several keys and queries are RULER's, arXiv:2404.06654.
"""

from dataclasses import dataclass

import numpy as np

from palimpsest.lab.tasks.task import Batch, Key, batch, check
from palimpsest.lab.tasks.text import library, windows

NAME, DIGITS = 4, 4
FACT, QUESTION = b"\nThe key of %b is %b.\n", b"\nWhat is the key of %b? The key of %b is %b."


@dataclass(frozen=True, kw_only=True)
class Needle:
    """Args:
        length: in bytes, the questions included.
        needles: facts hidden. queries: how many of them are asked, one after another.
        depth: of the asked fact, 0.0 (start) to 1.0 (end); None draws it anew each time.
        language: label the haystack too.
        paths: the text, as for Text.

    >>> bytes(Needle(length=256).draw(1, Key("test", 0, 0)).tokens[0].tolist())[-7:-4]
    b'is '
    """

    length: int = 1024
    needles: int = 1
    queries: int = 1
    depth: float | None = None
    language: bool = True
    paths: tuple[str, ...] = ("python",)
    vocab_size = 256

    def __post_init__(self):
        check(1 <= self.needles <= 26, f"needle: needles is {self.needles}; give 1 to 26, a first letter each")
        check(
            1 <= self.queries <= self.needles,
            f"needle: queries is {self.queries}; ask at least 1 and at most all {self.needles} needles",
        )
        least = self.needles * len(self._fact(b"n" * NAME, b"0" * DIGITS)) + self.queries * self._question_length + 32
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
        return "needle" if self.needles == 1 else f"needle, {self.queries} of {self.needles}"

    @staticmethod
    def _fact(name: bytes, key: bytes) -> bytes:
        return FACT % (name, key)

    @property
    def _question_length(self) -> int:
        return len(QUESTION % (b"n" * NAME, b"n" * NAME, b"0" * DIGITS))

    def draw(self, count: int, key: Key) -> Batch:
        chance, text = key.generator(), library(self.paths)[key.split]
        questions = self.queries * self._question_length
        fact = len(self._fact(b"n" * NAME, b"0" * DIGITS))
        hay = self.length + 1 - questions - self.needles * fact
        rows, depths, scored = np.empty((3, count, self.length + 1), np.int64)
        straw = windows(chance, text, count, hay)
        names = chance.integers(97, 123, (count, self.needles, NAME), np.uint8)
        names[..., 0] = (
            97 + np.argsort(chance.random((count, 26)), 1)[:, : self.needles]
        )  # told apart by the first letter
        keys = chance.integers(48, 58, (count, self.needles, DIGITS), np.uint8)
        place = (
            chance.random((count, self.needles)) if self.depth is None else np.full((count, self.needles), self.depth)
        )
        place[:, self.queries :] = chance.random((count, self.needles - self.queries))  # those not asked lie anywhere
        for row in range(count):
            self._hide(rows[row], depths[row], scored[row], straw[row], names[row], keys[row], place[row])
        labels = rows[:, 1:].copy()
        scored = scored[:, 1:] > 0
        if not self.language:
            labels[~scored] = -100
        return batch(rows[:, :-1], labels, scored, depth=depths[:, 1:])

    def _hide(self, row, depths, scored, straw, names, keys, place) -> None:
        """Writes one sequence into row, and tenths of depth and marks at its answers."""
        pieces, before = [], 0
        cuts = np.rint(place * len(straw)).astype(int)
        for i in np.argsort(cuts, kind="stable"):
            pieces += [straw[before : cuts[i]], np.frombuffer(self._fact(bytes(names[i]), bytes(keys[i])), np.uint8)]
            before = cuts[i]
        pieces.append(straw[before:])
        for i in range(self.queries):
            name, digits = bytes(names[i]), bytes(keys[i])
            pieces.append(np.frombuffer(QUESTION % (name, name, digits), np.uint8))
        row[:] = np.concatenate(pieces)
        depths[:], scored[:] = 0, 0
        for i in range(self.queries):
            end = len(row) - 1 - (self.queries - 1 - i) * self._question_length  # of this answer's digits
            scored[end - DIGITS : end] = 1
            depths[end - DIGITS : end] = round(place[i] * 10)
