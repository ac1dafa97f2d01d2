"""Guesses at the tokens to come. A guess is checked by the model, so a bad one costs time and never changes a token."""

from collections.abc import Sequence


def prompt_lookup(tokens: Sequence[int], *, longest: int = 4, shortest: int = 2, length: int = 8) -> list[int]:
    """What followed the last time that the text had the same last tokens: good for code and quotations.

    Args:
        tokens: everything so far.
        longest, shortest: how many last tokens to look for, the longest run first.
        length: guesses at most.

    Source: prompt lookup decoding, github.com/apoorvumang/prompt-lookup-decoding.

    >>> prompt_lookup([1, 2, 3, 4, 1, 2], length=2)
    [3, 4]
    """
    tokens = list(tokens)
    for n in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        end = tokens[-n:]
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == end:
                return tokens[start + n : start + n + length]
    return []
