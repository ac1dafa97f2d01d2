"""Stack: many stacks at once; a pop asks for what lies on top of its stack.

    tokens   push 3 a  push 7 b  push 3 c  pop 3 c  pop 7 b  pop 3 a
    labels   .    . .  .    . .  .    . .  .   c .  .   b .  .   a .

Which stack is random; a stack that is empty is pushed, another is pushed or popped with equal chance. What lies below
must come back when what lies above is gone: writing is not enough, the memory must edit. Slices: the depth of the stack
that is popped, and the operations since the element was pushed.
Source: Kimi Linear, arXiv:2510.26692, section 5.1 (64 stacks).
"""

from dataclasses import dataclass

import numpy as np

from palimpsest.checks import check
from palimpsest.lab.tasks.task import IGNORED, Batch, Key, batch, check_whole

PAD, PUSH, POP = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The task.

    Args:
        length: tokens in a sequence, three an operation; a rest is padding. At least 6.
        stacks: how many there are, at least 1.
        elements: kinds of things that are pushed, at least 2.

    Raises:
        ValueError: a number out of these ranges.

    >>> Stack(length=12, stacks=2, elements=5).vocab_size
    10
    """

    length: int = 64
    stacks: int = 8
    elements: int = 32
    name = "stack"

    def __post_init__(self):
        check_whole(self)
        check(self.length >= 6, f"stack: length is {self.length}; give at least 6, a push and a pop")
        check(self.stacks >= 1, f"stack: stacks is {self.stacks}; give at least 1")
        check(self.elements >= 2, f"stack: elements is {self.elements}; give at least 2")

    @property
    def vocab_size(self) -> int:
        """Padding, push and pop, then the stacks, then the elements."""
        return 3 + self.stacks + self.elements

    def draw(self, count: int, key: Key) -> Batch:
        """`count` sequences [count, length]; slices `depth`, of the stack popped, and `gap`, operations since the push."""
        rng, ops = key.generator(), self.length // 3
        which = rng.integers(self.stacks, size=(ops, count))
        element = rng.integers(self.elements, size=(ops, count))
        wants_pop = (rng.random((ops, count)) < 0.5).T.flatten()

        # All stacks of all sequences side by side, and their first operations, their second ones, ... one after another.
        stack = (which + self.stacks * np.arange(count)).T.flatten()
        by_stack = np.argsort(stack, kind="stable")
        firsts = np.flatnonzero(np.diff(stack[by_stack], prepend=-1))
        turn = np.empty_like(stack)
        turn[by_stack] = np.arange(len(stack)) - np.repeat(firsts, np.diff(firsts, append=len(stack)))
        by_turn, turns = np.argsort(turn, kind="stable"), np.bincount(turn)
        height = np.zeros(count * self.stacks, np.int64)
        popped, level = np.zeros_like(wants_pop), np.zeros_like(stack)
        for now in np.split(by_turn, np.cumsum(turns)[:-1]):
            h = height[stack[now]]
            popped[now] = pop = wants_pop[now] & (h > 0)
            level[now] = h - pop
            height[stack[now]] = h + 1 - 2 * pop

        # On one level of one stack a push is followed by the pop of what it wrote.
        by_level = np.lexsort((level, stack))
        pops = np.flatnonzero(popped[by_level])
        push, pop = by_level[pops - 1], by_level[pops]
        element = element.T.flatten()
        element[pop] = element[push]
        gap = np.zeros_like(stack)
        gap[pop] = pop - push

        tokens = np.full((count, self.length), PAD)
        labels, depths, gaps = np.full((count, self.length), IGNORED), np.zeros_like(tokens), np.zeros_like(tokens)
        element = 3 + self.stacks + element.reshape(count, ops)
        popped, level, gap = (x.reshape(count, ops) for x in (popped, level, gap))
        tokens[:, : 3 * ops : 3] = np.where(popped, POP, PUSH)
        tokens[:, 1 : 3 * ops : 3] = 3 + which.T
        tokens[:, 2 : 3 * ops : 3] = element
        labels[:, 1 : 3 * ops : 3] = np.where(popped, element, IGNORED)
        depths[:, 1 : 3 * ops : 3] = level + 1
        gaps[:, 1 : 3 * ops : 3] = gap
        return batch(tokens, labels, depth=depths, gap=gaps)
