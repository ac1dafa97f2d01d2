"""MQAR, multi-query associative recall: keys with their values, then keys again.

    form "gaps"       a 4 b 7 c 5 9 4 b 6 8 5 a 5     pairs, then queries among filler, most of them soon, some late
    labels            . . . . . . . . 7 . . . 4 .
    form "separator"  a 4 b 7 c 5 | b a a c b c a     pairs, a separator, then query after query
    labels            . . . . . . . 7 4 4 5 7 5 4

Keys are the lower half of the vocabulary (without 0, the separator), values the upper half; filler is values, so that a
key after the pairs is always a query. Source: Zoology, arXiv:2312.04927 (gaps with p(i) ~ i^(a - 1)); the separator form
is that of Kimi Linear, arXiv:2510.26692, section 5.1.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from palimpsest.checks import check
from palimpsest.lab.tasks.task import IGNORED, Batch, Key, batch, check_whole, distinct


@dataclass(frozen=True, kw_only=True)
class MQAR:
    """The task.

    Args:
        length: tokens in a sequence: 4 a pair for "gaps", 2 a pair and 2 more for "separator", or longer.
        vocab_size: keys and values together, an even number, more than twice the pairs.
        pairs: how many keys there are to remember, at least 1.
        form: "gaps" or "separator".
        power: a of the gaps' law, in (0, 1]; small values ask soon.

    Raises:
        ValueError: a number out of these ranges, or another form.

    >>> MQAR(length=16, vocab_size=32, pairs=4).draw(2, Key("train", 0, 0)).scored.sum().item()
    8
    """

    length: int = 64
    vocab_size: int = 64
    pairs: int = 8
    form: Literal["gaps", "separator"] = "gaps"
    power: float = 0.01
    name = "mqar"

    def __post_init__(self):
        check_whole(self)
        check(self.form in ("gaps", "separator"), f"mqar: form is {self.form!r}; it is 'gaps' or 'separator'")
        check(self.pairs >= 1, f"mqar: pairs is {self.pairs}; give at least 1")
        least = 4 * self.pairs if self.form == "gaps" else 2 * self.pairs + 2
        check(
            least <= self.length,
            f"mqar: {self.pairs} pairs and their queries need length {least}, and it is {self.length}; "
            f"give at most {self.length // 4 if self.form == 'gaps' else (self.length - 2) // 2} pairs",
        )
        check(
            self.vocab_size % 2 == 0 and self.pairs < self.vocab_size // 2,
            f"mqar: vocab_size {self.vocab_size} has too few keys for {self.pairs} pairs or is odd; "
            f"give an even number of at least {2 * self.pairs + 2}",
        )
        check(0 < self.power <= 1, f"mqar: power is {self.power}; give a number in (0, 1]")

    def draw(self, count: int, key: Key) -> Batch:
        """`count` sequences [count, length]; slices `gap`, tokens since the key was told, and `pairs`."""
        rng, n, half = key.generator(), self.pairs, self.vocab_size // 2
        keys = distinct(rng, 1, half, count, n)
        values = rng.integers(half, self.vocab_size, (count, n))
        tokens = rng.integers(half, self.vocab_size, (count, self.length))
        tokens[:, 0 : 2 * n : 2], tokens[:, 1 : 2 * n : 2] = keys, values
        labels = np.full((count, self.length), IGNORED)
        which, place = (self._gaps if self.form == "gaps" else self._one_after_another)(rng, count)
        if self.form == "separator":
            tokens[:, 2 * n] = 0
        np.put_along_axis(tokens, place, np.take_along_axis(keys, which, 1), 1)
        np.put_along_axis(labels, place, np.take_along_axis(values, which, 1), 1)
        gap = np.zeros((count, self.length), np.int64)
        np.put_along_axis(gap, place, place - 2 * which, 1)
        return batch(tokens, labels, gap=gap, pairs=np.array(n))

    def _gaps(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Key j is asked in a slot of two tokens drawn without replacement, slot i with weight i^(power - 1)."""
        n = self.pairs
        slots = (self.length - 2 * n) // 2
        weight = (self.power - 1) * np.log(np.arange(1, slots + 1))
        score = weight + rng.gumbel(size=(count, slots))  # the n largest, in order, are n draws without replacement
        return np.broadcast_to(np.arange(n), (count, n)), 2 * n + 2 * np.argsort(-score, 1)[:, :n]

    def _one_after_another(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """All keys in random order, then all again in another, to the end."""
        n, queries = self.pairs, self.length - 2 * self.pairs - 1
        rounds = [rng.permuted(np.tile(np.arange(n), (count, 1)), axis=1) for _ in range(-(-queries // n))]
        place = np.broadcast_to(np.arange(2 * n + 1, self.length), (count, queries))
        return np.concatenate(rounds, 1)[:, :queries], place
