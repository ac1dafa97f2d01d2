"""In-context induction: a text made of its own pieces; after n tokens of a piece the next one is known.

    tokens   c a d b e f | a d b | d b e          a random first half, then pieces of it, here n = 1
    labels   . . . . . . . d b ?   b e ?          what followed these n tokens in the first half

Asked wherever the last n tokens lie in one piece and occur once in the first half.
Source: induction heads, Olsson et al., arXiv:2209.11895; n-grams as in arXiv:2401.12973.
"""

from dataclasses import dataclass

import numpy as np

from palimpsest.checks import check
from palimpsest.lab.tasks.task import IGNORED, Batch, Key, batch, check_whole


@dataclass(frozen=True, kw_only=True)
class Induction:
    """The task.

    Args:
        length: tokens in a sequence, half of them the random text; at least two pieces.
        vocab_size: kinds of tokens, at least 2.
        n: how many tokens decide the next.
        piece: tokens in a piece, more than n.

    Raises:
        ValueError: a number out of these ranges.

    >>> Induction(length=32, vocab_size=64, n=1, piece=4).name
    'induction'
    """

    length: int = 64
    vocab_size: int = 64
    n: int = 1
    piece: int = 8
    name = "induction"

    def __post_init__(self):
        check_whole(self)
        check(self.n >= 1, f"induction: n is {self.n}; give at least 1")
        check(self.piece > self.n, f"induction: piece is {self.piece}; give more than n = {self.n}")
        check(
            self.length >= 2 * self.piece,
            f"induction: length {self.length} has no room for a piece of {self.piece}; give at least {2 * self.piece}",
        )
        check(self.vocab_size >= 2, f"induction: vocab_size is {self.vocab_size}; give at least 2")
        check(
            self.vocab_size**self.n < 2**62,
            f"induction: {self.vocab_size} to the power n = {self.n} is too many n-grams to count; give a smaller n",
        )

    def draw(self, count: int, key: Key) -> Batch:
        """`count` sequences [count, length]; slice `gap`: tokens since the place that decides the answer."""
        rng, n, P, half = key.generator(), self.n, self.piece, self.length // 2
        first = rng.integers(self.vocab_size, size=(count, half))
        pieces = -(-(self.length - half) // P)
        start = rng.integers(half - P + 1, size=(count, pieces))
        source = (start[..., None] + np.arange(P)).reshape(count, -1)[:, : self.length - half]
        tokens = np.concatenate((first, np.take_along_axis(first, source, 1)), 1)

        # the n-gram that ends at each place of the first half, as one number; it decides if no other place has it
        digits = [first[:, n - 1 - j : half - j] * self.vocab_size**j for j in range(n)]
        grams = np.sum(digits, 0)
        order = np.argsort(grams, 1, kind="stable")
        ranked = np.take_along_axis(grams, order, 1)
        same = np.diff(ranked, axis=1) == 0
        twice = np.pad(same, ((0, 0), (1, 0))) | np.pad(same, ((0, 0), (0, 1)))
        once = np.zeros_like(twice)
        np.put_along_axis(once, order, ~twice, 1)

        within = np.arange(source.shape[1]) % P
        asked = (within >= n - 1) & (source < half - 1)
        asked &= np.take_along_axis(once, np.clip(source - n + 1, 0, once.shape[1] - 1), 1)
        labels = np.full(tokens.shape, IGNORED)
        following = np.take_along_axis(first, np.minimum(source + 1, half - 1), 1)
        labels[:, half:] = np.where(asked, following, IGNORED)
        gap = np.zeros_like(tokens)
        gap[:, half:] = np.arange(half, self.length) - source
        return batch(tokens, labels, gap=gap)
