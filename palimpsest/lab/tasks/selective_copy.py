"""Selective copying: say the few symbols that were scattered among noise, in their order.

    tokens   . b . . a . d . . ? ? ?
    labels   . . . . . . . . . b a d          (here . is noise, token 0; ? is "say the next", token 1)

The gate must learn what to let in. Source: Mamba, arXiv:2312.00752 (16 symbols among 4,096 tokens).
"""

from dataclasses import dataclass

import numpy as np

from palimpsest.checks import check
from palimpsest.lab.tasks.task import IGNORED, Batch, Key, batch, check_whole


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy:
    """The task.

    Args:
        length: tokens in a sequence, with the marks at the end, at least twice the symbols.
        vocab_size: noise (token 0), mark (token 1) and the kinds of symbols, at least 4.
        symbols: how many are scattered, and asked for.

    Raises:
        ValueError: a number out of these ranges.

    >>> SelectiveCopy(length=12, vocab_size=8, symbols=3).draw(1, Key("train", 0, 0)).tokens[0, 9:].tolist()
    [1, 1, 1]
    """

    length: int = 64
    vocab_size: int = 18
    symbols: int = 8
    name = "selective copy"

    def __post_init__(self):
        check_whole(self)
        check(self.symbols >= 1, f"selective copy: symbols is {self.symbols}; give at least 1")
        check(
            2 * self.symbols <= self.length,
            f"selective copy: {self.symbols} symbols and as many marks do not fit length {self.length}; "
            f"give at most {self.length // 2} symbols",
        )
        check(self.vocab_size >= 4, f"selective copy: vocab_size is {self.vocab_size}; give at least 4")

    def draw(self, count: int, key: Key) -> Batch:
        """`count` sequences [count, length]; slice `gap`: tokens since the symbol asked for."""
        rng, n, noisy = key.generator(), self.symbols, self.length - self.symbols
        place = np.sort(distinct_places(rng, noisy, count, n), 1)
        symbols = rng.integers(2, self.vocab_size, (count, n))
        tokens = np.zeros((count, self.length), np.int64)
        np.put_along_axis(tokens, place, symbols, 1)
        tokens[:, noisy:] = 1
        labels = np.full((count, self.length), IGNORED)
        labels[:, noisy:] = symbols
        gap = np.zeros((count, self.length), np.int64)
        gap[:, noisy:] = np.arange(noisy, self.length) - place
        return batch(tokens, labels, gap=gap)


def distinct_places(rng: np.random.Generator, places: int, rows: int, count: int) -> np.ndarray:
    """[rows, count] different places in [0, places)."""
    return np.argpartition(rng.random((rows, places)), count - 1, 1)[:, :count]
