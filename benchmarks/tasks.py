"""How fast the lab's tasks draw their sequences: below a million tokens a second, a GPU would wait for them.

    python -m benchmarks.tasks

Writes tasks.json (every sample) and tasks.md to benchmarks/results/tasks.
"""

import time

from benchmarks._samples import publish
from palimpsest.lab.tasks import MQAR, Key, Palindrome, Stack

TASKS = {
    "MQAR, 256 pairs": MQAR(length=1024, vocab_size=8192, pairs=256),
    "palindrome": Palindrome(length=1024, vocab_size=8192),
    "stack, 64 stacks": Stack(length=1024, stacks=64, elements=445),
}
BATCH, REPEATS = 64, 20


def tokens_a_second(task, step: int) -> float:
    began = time.perf_counter()
    task.draw(BATCH, Key("train", 0, step))
    return BATCH * task.length / (time.perf_counter() - began)


def main() -> None:
    samples = {name: [tokens_a_second(task, i) / 1e6 for i in range(REPEATS)] for name, task in TASKS.items()}
    publish("tasks", "million tokens a second, 64 sequences of 1,024", samples)


if __name__ == "__main__":
    main()
