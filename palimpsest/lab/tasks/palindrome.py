"""Palindrome: say a random sequence backwards.

    tokens   c a b | b a        n = 3 symbols, a separator, and what was said so far
    labels   . . . b a c

Needs a memory that holds every symbol with its place, and reads them newest first. Length counts the whole sequence.
Source: Kimi Linear, arXiv:2510.26692, section 5.1.
"""

from dataclasses import dataclass

import numpy as np

from palimpsest.checks import check
from palimpsest.lab.tasks.task import IGNORED, Batch, Key, batch, check_whole


@dataclass(frozen=True, kw_only=True)
class Palindrome:
    """The task.

    Args:
        length: tokens in a sequence, an even number of at least 4.
        vocab_size: the separator (token 0) and the symbols, at least 3.

    Raises:
        ValueError: a number out of these ranges.

    >>> Palindrome(length=6, vocab_size=8).draw(1, Key("train", 0, 0)).tokens.shape
    torch.Size([1, 6])
    """

    length: int = 64
    vocab_size: int = 64
    name = "palindrome"

    def __post_init__(self):
        check_whole(self)
        fits = self.length >= 4 and self.length % 2 == 0
        check(fits, f"palindrome: length is {self.length}; give an even number of at least 4")
        check(
            self.vocab_size >= 3,
            f"palindrome: vocab_size is {self.vocab_size}; give at least 3, a separator and 2 symbols",
        )

    def draw(self, count: int, key: Key) -> Batch:
        """`count` sequences [count, length]; slice `gap`: tokens since the symbol asked for."""
        n = self.length // 2
        symbols = key.generator().integers(1, self.vocab_size, (count, n))
        separator = np.zeros((count, 1), symbols.dtype)
        tokens = np.concatenate((symbols, separator, symbols[:, :0:-1]), 1)
        labels = np.concatenate((np.full((count, n), IGNORED), symbols[:, ::-1]), 1)
        return batch(tokens, labels, gap=2 * (np.arange(2 * n) - n) + 1)
