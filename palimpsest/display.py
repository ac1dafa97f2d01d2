"""How a command shows that its work goes on: a live line on a terminal, a line now and then in a log, JSON for programs.

Work tells of itself in events, dicts with a name under "event". Two functions put them into words: `status` gives the
share that is done and a line that the next one replaces, or None; `remarks` gives lines that stay.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

Event = dict[str, Any]
Status = Callable[[Event], tuple[float, str] | None]
Remarks = Callable[[Event], list[str]]
EVERY = 10.0  # seconds between two lines of a log
notes = Console(stderr=True, highlight=False)


@contextmanager
def display(
    status: Status, remarks: Remarks = lambda event: [], *, quiet: bool = False, as_json: bool = False,
    silent: str = "progress",
) -> Iterator[Callable[[Event], None]]:  # fmt: skip
    """A function that shows events on standard error, or with as_json prints them on standard output.

    Args:
        status, remarks: what an event says; remarks in rich's markup.
        quiet: shows nothing.
        as_json: a line an event, those named `silent` aside.
    """
    if as_json:
        yield lambda event: None if event["event"] == silent else say(json.dumps(event))
    elif quiet:
        yield lambda event: None
    elif notes.is_terminal:
        columns = (BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
        with Progress(*columns, console=notes) as progress:
            yield _live(progress, status, remarks)
    else:
        yield _log(status, remarks)


def say(line: str) -> None:
    """A line on standard output, now."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _live(progress: Progress, status: Status, remarks: Remarks) -> Callable[[Event], None]:
    task = progress.add_task("starting", total=1.0)

    def show(event: Event) -> None:
        if (now := status(event)) is not None:
            progress.update(task, completed=now[0], description=escape(now[1]))
        for line in remarks(event):
            progress.console.print(line, soft_wrap=True)

    return show


def _log(status: Status, remarks: Remarks) -> Callable[[Event], None]:
    last = 0.0

    def show(event: Event) -> None:
        nonlocal last
        now, lines = status(event), remarks(event)
        if now is not None and not lines and time.monotonic() - last > EVERY:
            last = time.monotonic()
            lines = [escape(f"{now[0]:4.0%}  {now[1]}")]
        for line in lines:
            notes.print(line, soft_wrap=True)

    return show


def clock(seconds: float | None) -> str:
    """Seconds as on a clock.

    >>> clock(75), clock(3700), clock(None)
    ('1:15', '1:01:40', '--:--')
    """
    if seconds is None:
        return "--:--"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def size(count: float) -> str:
    """Bytes in the unit that suits them.

    >>> size(512), size(3 << 20)
    ('512 B', '3.0 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
