"""Faults on purpose: kills, full disks, damaged files, double runs, hostile files, bad inputs, and what became of them.

A campaign is a file of this folder with a list CAMPAIGNS. Each draws trials; a trial does one thing that must not do harm
and says what was wrong, or None. `python -m benchmarks.faults` runs them all, each in a process of its own, so that a
crash or a hang is counted and the next trial goes on, and writes the table of docs/faults.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

REFUSALS = (ValueError, TypeError, OSError, ImportError)  # what a caller is told of; anything else is a trace


class Trial(NamedTuple):
    """One fault."""

    name: str  # unique in its campaign, the same in every run
    run: Callable[[], str | None]  # None if it was survived, else what went wrong; an error counts as wrong, too


class Campaign(NamedTuple):
    """Faults of one kind.

    Attributes:
        name: of the row in the table.
        about: what is done to what, and what counts as survived: a phrase or two of Markdown.
        trials: given an empty folder to work in; must draw the same trials in every process.
        patience: seconds without an end of a trial after which it counts as hanging.
    """

    name: str
    about: str
    trials: Callable[[Path], Iterable[Trial]]
    patience: float = 120.0


class Counts(NamedTuple):
    """What came of a campaign."""

    tried: int
    survived: int
    failures: list[str]  # "trial: what went wrong"


def refused(call: Callable[[], Any], errors: tuple[type[Exception], ...] = REFUSALS, longest: int = 1000) -> str | None:
    """None if call raises one of these errors in a readable sentence, else what it did instead.

    >>> def check():
    ...     raise ValueError("top_p is 2.0; it must be in (0, 1]")
    >>> refused(check)
    >>> refused(lambda: 3)
    'was accepted and gave 3'
    """
    try:
        value = call()
    except errors as error:
        return unreadable(error, longest)
    except Exception as error:
        return f"ended in a trace: {type(error).__name__}: {str(error)[:200]}"
    return f"was accepted and gave {repr(value)[:100]}"


def unreadable(error: Exception, longest: int = 1000) -> str | None:
    """None if the message of an error is one a user can read: some words, on few lines, and not a page of them."""
    text = str(error)
    if len(text.split()) < 3:
        return f"{type(error).__name__} says only {text!r}"
    return f"a message of {len(text)} characters" if len(text) > longest else None
