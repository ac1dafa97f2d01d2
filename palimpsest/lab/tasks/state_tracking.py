"""State tracking: after every token, the state of a small machine that has read them all.

    kind "parity"   tokens 1 1 0 1        labels 1 0 0 1          is the number of ones odd?
    kind "modular"  tokens 2 4 1 3        labels 2 1 2 0          the sum so far, here modulo 5
    kind "group"    tokens (ab) (bc) ..   labels the product so far of permutations of `degree` things

A memory whose transition has no negative eigenvalue (beta up to 1) cannot keep parity at lengths beyond training;
beta up to 2 allows it (Unlocking State-Tracking in Linear RNNs, arXiv:2411.12537). Degree 5 is the S5 word problem,
which no constant-depth circuit of threshold gates is believed to solve (arXiv:2404.08819).
"""

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from palimpsest.checks import check
from palimpsest.lab.tasks.task import Batch, Key, batch, check_whole


@cache
def permutations(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """All permutations [N, degree] in lexicographic order, and their products: table[a, b] is first a, then b."""
    every = np.array(list(itertools.permutations(range(degree))))
    number = {tuple(p): i for i, p in enumerate(every.tolist())}
    table = np.array([[number[tuple(b[a].tolist())] for b in every] for a in every])
    return every, table


@dataclass(frozen=True, kw_only=True)
class StateTracking:
    """The task.

    Args:
        length: tokens in a sequence, at least 1.
        kind: "parity", "modular" or "group".
        modulus: of kind "modular", at least 2.
        degree: of kind "group": permutations of so many things, 2 to 5.
        letters: which permutations are read, "all" or "swaps" (exchanges of two things).

    Raises:
        ValueError: a number out of these ranges, or another word.

    >>> StateTracking(kind="group", degree=5).vocab_size
    120
    """

    length: int = 64
    kind: Literal["parity", "modular", "group"] = "parity"
    modulus: int = 5
    degree: int = 5
    letters: Literal["all", "swaps"] = "all"

    def __post_init__(self):
        check_whole(self)
        kinds = ("parity", "modular", "group")
        check(self.kind in kinds, f"state tracking: kind is {self.kind!r}; it is one of {', '.join(kinds)}")
        check(self.length >= 1, f"state tracking: length is {self.length}; give at least 1")
        check(self.modulus >= 2, f"state tracking: modulus is {self.modulus}; give at least 2")
        check(2 <= self.degree <= 5, f"state tracking: degree is {self.degree}; give 2 to 5")
        check(self.letters in ("all", "swaps"), f"state tracking: letters is {self.letters!r}; it is 'all' or 'swaps'")

    @property
    def name(self) -> str:
        """What tables and plots call it: the machine."""
        group = f"S{self.degree}" + " by swaps" * (self.letters == "swaps")
        return {"parity": "parity", "modular": f"sum mod {self.modulus}", "group": group}[self.kind]

    @property
    def vocab_size(self) -> int:
        """The states of the machine: 2, the modulus, or all permutations."""
        return {"parity": 2, "modular": self.modulus, "group": len(permutations(self.degree)[0])}[self.kind]

    def draw(self, count: int, key: Key) -> Batch:
        """`count` sequences [count, length], asked after every token; slice `position`: from 0."""
        rng, shape = key.generator(), (count, self.length)
        place = np.arange(self.length)
        if self.kind != "group":
            tokens = rng.integers(self.vocab_size, size=shape)
            return batch(tokens, tokens.cumsum(1) % self.vocab_size, position=place)
        every, table = permutations(self.degree)
        swaps = np.flatnonzero((every != np.arange(self.degree)).sum(1) == 2)
        letters = swaps if self.letters == "swaps" else np.arange(len(every))
        tokens = letters[rng.integers(len(letters), size=shape)]
        labels, state = np.empty(shape, np.int64), np.zeros(count, np.int64)  # permutation 0 moves nothing
        for t in range(self.length):
            state = table[state, tokens[:, t]]
            labels[:, t] = state
        return batch(tokens, labels, position=place)
