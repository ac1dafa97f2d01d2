"""Ctrl-C and SIGTERM as a question that the loop asks between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def interrupts(heard: Callable[[str], None] = lambda name: None) -> Iterator[Callable[[], bool]]:
    """Within it, the first Ctrl-C or SIGTERM makes the function that it gives return True; the next acts as ever.

    Outside the main thread, where signals cannot be caught, the function stays False.

    Args:
        heard: called at once with the first signal's name, since what it interrupts may take a while to end.

    >>> with interrupts(print) as interrupted:
    ...     before = interrupted()
    ...     signal.raise_signal(signal.SIGTERM)
    ...     before, interrupted()
    SIGTERM
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
        with contextlib.suppress(RuntimeError, OSError):  # it came in the middle of a write to the same stream
            heard(signal.Signals(number).name)

    for number in STOPPING:
        signal.signal(number, note)
    try:
        yield lambda: bool(arrived)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
