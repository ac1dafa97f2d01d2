"""Faults to the files that everything is written through: errors, kills and other writers at every system call."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.faults import Campaign, Trial, refused
from palimpsest.files import locked, read_object, write_json

CALLS = ("mkdir", "open", "replace", "fsync", "close")


def _interrupted(folder: Path, call: str, nth: int, kill: bool) -> str | None:
    """Writes a file over another one in a forked process; its nth call of this name fails, or is its last."""
    file = folder / f"{call}-{nth}-{kill}" / "value.json"
    file.parent.mkdir()
    write_json(file, {"value": "old"})
    if (process := os.fork()) == 0:
        real, calls = getattr(os, call), iter(range(10**6))

        def struck(*arguments, **options):
            if next(calls) == nth:
                if kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(28, "No space left on device")
            return real(*arguments, **options)

        setattr(os, call, struck)
        try:
            write_json(file, {"value": "new" * 10_000})
        except OSError:
            os._exit(3)
        os._exit(0)
    os.waitpid(process, 0)
    if read_object(file)["value"] not in ("old", "new" * 10_000):
        return "the file is neither the old one nor the new"
    write_json(file, {"value": "next"})
    left = sorted(path.name for path in file.parent.iterdir())
    return None if left == ["value.json"] else f"the next write left {left}"


def _count(folder: Path, call: str) -> int:
    """How often a write calls this function of the system."""
    real, times = getattr(os, call), []
    setattr(os, call, lambda *arguments, **options: (times.append(call), real(*arguments, **options))[1])
    try:
        write_json(folder / "counted.json", {})
    finally:
        setattr(os, call, real)
    return len(times)


def writes(folder: Path) -> Iterator[Trial]:
    for call in CALLS:
        for nth in range(_count(folder, call)):
            for kill in (False, True):
                name = f"{'killed' if kill else 'no room'} at {call} {nth}"
                yield Trial(name, lambda call=call, nth=nth, kill=kill: _interrupted(folder, call, nth, kill))


CONTENTS = {
    "empty": b"", "half": b'{"a": ', "a list": b"[]", "null": b"null", "a number": b"3", "no UTF-8": b"\xff\xfe{}",
    "deep": b"[" * 10**6, "deep objects": b'{"a":' * 10**5, "zeros": b"\0" * 4096, "two": b"{}{}", "a page": b"<html>",
}  # fmt: skip


def malformed(folder: Path) -> Iterable[Trial]:
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
        yield Trial(name, lambda name=name: refused(lambda: read_object(folder / name), (ValueError,), 400))
    os.mkfifo(folder / "pipe")
    (folder / "endless").symlink_to("/dev/zero")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "folder").mkdir()
    for name in ("pipe", "endless", "loop", "folder", "absent"):
        yield Trial(name, lambda name=name: refused(lambda: read_object(folder / name), (ValueError,), 400))


def _lock_after_kill(folder: Path) -> str | None:
    read, write = os.pipe()
    if (process := os.fork()) == 0:
        with locked(folder, "busy"):
            os.write(write, b"x")
            signal.pause()
    os.read(read, 1)
    problem = refused(lambda: locked(folder, "this folder is busy").__enter__())
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with locked(folder, "busy"):
        return problem


def locks(folder: Path) -> Iterable[Trial]:
    for i in range(10):
        yield Trial(f"killed holder {i}", lambda: _lock_after_kill(folder))


CAMPAIGNS = [
    Campaign(
        "one file, struck while written",
        "a full disk or a kill at each system call of a write: the old content or the new, and no litter after the next",
        writes,
    ),
    Campaign(
        "malformed JSON",
        "empty, cut, deep, of another kind, a pipe, a device: refused in a sentence that names it",
        malformed,
    ),
    Campaign("locks of the killed", "a folder's lock while its holder lives, and after kill -9", locks),
]
