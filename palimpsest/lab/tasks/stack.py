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

from palimpsest.lab.tasks.task import IGNORED, Batch, Key, batch, check

PAD, PUSH, POP = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Args: length, in tokens, three an operation (a rest is padding); stacks, how many; elements, how many kinds.

    >>> Stack(length=12, stacks=2, elements=5).vocab_size
    10
    """

    length: int = 64
    stacks: int = 8
    elements: int = 32
    name = "stack"

    def __post_init__(self):
        check(self.length >= 6, f"stack: length is {self.length}; give at least 6, a push and a pop")
        check(self.stacks >= 1, f"stack: stacks is {self.stacks}; give at least 1")
        check(self.elements >= 2, f"stack: elements is {self.elements}; give at least 2")

    @property
    def vocab_size(self) -> int:
        return 3 + self.stacks + self.elements

    def draw(self, count: int, key: Key) -> Batch:
        chance, ops, rows = key.generator(), self.length // 3, np.arange(count)
        which = chance.integers(self.stacks, size=(ops, count))
        element = chance.integers(self.elements, size=(ops, count))
        wants_pop = chance.random((ops, count)) < 0.5
        content = np.zeros((count, self.stacks, ops + 1), np.int64)
        pushed_at = np.zeros_like(content)
        height = np.zeros((count, self.stacks), np.int64)
        popped, depth, gap = np.zeros((3, ops, count), np.int64)
        for i in range(ops):
            s = which[i]
            h = height[rows, s]
            pop = wants_pop[i] & (h > 0)
            top = np.maximum(h - 1, 0)
            element[i] = np.where(pop, content[rows, s, top], element[i])
            popped[i], depth[i], gap[i] = pop, h, i - pushed_at[rows, s, top]
            level = np.where(pop, top, h)  # a pop writes what is there already
            content[rows, s, level] = element[i]
            pushed_at[rows, s, level] = np.where(pop, pushed_at[rows, s, level], i)
            height[rows, s] = np.where(pop, h - 1, h + 1)

        tokens = np.full((count, self.length), PAD)
        spread = lambda part, x: np.put_along_axis(part, np.broadcast_to(np.arange(ops) * 3 + 1, (count, ops)), x.T, 1)
        tokens[:, : 3 * ops : 3] = np.where(popped, POP, PUSH).T
        tokens[:, 1 : 3 * ops : 3] = 3 + which.T
        tokens[:, 2 : 3 * ops : 3] = 3 + self.stacks + element.T
        labels, depths, gaps = np.full((count, self.length), IGNORED), np.zeros_like(tokens), np.zeros_like(tokens)
        spread(labels, np.where(popped, 3 + self.stacks + element, IGNORED))
        spread(depths, depth)
        spread(gaps, gap)
        return batch(tokens, labels, depth=depths, gap=gaps)
