"""Ctrl-C and SIGTERM as a question that the loop asks between two steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Within it, the first Ctrl-C or SIGTERM makes the function that it gives return True; the next acts as ever.

    Outside the main thread, where signals cannot be caught, the function stays False.

    >>> with interrupts() as interrupted:
    ...     before = interrupted()
    ...     signal.raise_signal(signal.SIGTERM)
    ...     before, interrupted()
    (False, True)
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    arrived: list[int] = []

    def note(number, frame):
        arrived.append(number)
        for each, handler in before.items():  # a second one need not wait for the step and the checkpoint
            signal.signal(each, handler if handler is not None else signal.SIG_DFL)

    for number in STOPPING:
        signal.signal(number, note)
    try:
        yield lambda: bool(arrived)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
