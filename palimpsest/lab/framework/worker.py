"""Running points: in this process one after another, or as calls of `work` in processes that somebody else starts.

A sweep and its workers meet in its folder, which all of them must see:

    FOLDER/running/session.json   the sweep that is at work, with a beat that counts up; gone when it ends
    FOLDER/running/ID.json        how far the point ID is, written by its worker

So a worker needs no connection to the sweep: it stops once the session is gone, is another, or no longer beats.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from palimpsest.files import read_object, remove_partials, write_json
from palimpsest.lab.framework.experiment import InterruptedSweep, Progress, Row, load_experiment
from palimpsest.lab.framework.results import SweepFolder, unfinished_file
from palimpsest.lab.framework.tally import Tally

PATIENCE = 30.0  # seconds in which a worker that is asked to stop puts down what it is doing
SILENCE = 120.0  # seconds without a beat after which the sweep counts as gone


def run_here(
    left: Mapping[str, Any], device: str, sweep: SweepFolder, tally: Tally, keep_on: Callable[[], None]
) -> None:
    """Runs points one after another.

    Args:
        left: identity -> point of what is to run.
        device: where.
        sweep: keeps what comes of them.
        tally: is told how far they are.
        keep_on: called often; raises InterruptedSweep to stop.
    """
    for identity, point in left.items():
        keep_on()

        def progress(share: float, word: str, identity=identity) -> None:
            tally.progress(identity, share, word)
            keep_on()

        began = time.monotonic()
        outcome = _attempt(point, device, progress, sweep.unfinished(identity))
        sweep.keep(identity, outcome, time.monotonic() - began)
        tally.point(identity, outcome, time.monotonic() - began)


class Job(NamedTuple):
    """One point, as a worker on any machine can find it.

    Attributes:
        place: the experiment's name, or its file with the whole path.
        scale: of the experiment.
        identity: of the point.
        device: where it runs.
        folder: of the sweep.
        session: of the sweep that asks for it.
    """

    place: str
    scale: str
    identity: str
    device: str
    folder: str
    session: str


def work(job: Job) -> Row | None:
    """What came of a point, {"result": ...} or {"error": ...}, with its "seconds"; None if it was told to stop."""
    torch.set_num_threads(1)
    session = Session(Path(job.folder), job.session)
    if not session.is_on():
        return None
    point = _plan(job.place, job.scale).get(job.identity)
    if point is None:
        return {"error": "the experiment's file was changed while the sweep ran; run the command again", "seconds": 0.0}
    began, told = time.monotonic(), [-1.0]
    over = threading.Event()
    threading.Thread(target=_end_if_stuck, args=(session, over), daemon=True).start()

    def progress(share: float, word: str) -> None:
        if not session.is_on():
            raise InterruptedSweep
        if time.monotonic() - told[0] > 1:
            told[0] = time.monotonic()
            with suppress(OSError):  # a sweep that ended meanwhile has taken the folder away
                write_json(session.progress(job.identity), {"share": share, "word": word})

    try:
        progress(0.0, "")
        outcome = _attempt(point, job.device, progress, unfinished_file(Path(job.folder), job.identity))
    except InterruptedSweep:
        return None
    finally:
        over.set()
    return outcome | {"seconds": time.monotonic() - began}


class Session:
    """The sweep at work in a folder, as it and its workers see it.

    Args:
        folder: of the sweep.
        name: of the session, no two alike.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder / "running", name
        self._beat, self._changed, self._asked, self._on = -1, time.monotonic(), -1.0, True

    def beat(self) -> None:
        """Says that the sweep lives; called by it, often."""
        if time.monotonic() - self._changed > SILENCE / 10 or self._beat < 0:
            self._beat, self._changed = self._beat + 1, time.monotonic()
            self.folder.mkdir(exist_ok=True)
            write_json(self.folder / "session.json", {"session": self.name, "beat": self._beat})

    def is_on(self) -> bool:
        """Whether the sweep lives and wants results; asked by workers."""
        if not self._on or time.monotonic() - self._asked < 0.5:
            return self._on
        self._asked = time.monotonic()
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():  # killed: nobody waits for the result
            self._on = False
            return False
        try:
            held = read_object(self.folder / "session.json")
        except ValueError:  # gone; or a network file system's hiccup
            self._on = (self.folder / "session.json").is_file()
            return self._on
        if held.get("beat") != self._beat:
            self._beat, self._changed = held.get("beat", -1), time.monotonic()
        self._on = held.get("session") == self.name and time.monotonic() - self._changed < SILENCE
        return self._on

    def progress(self, identity: str) -> Path:
        """Where a worker says how far a point is."""
        return self.folder / f"{identity}.json"

    def end(self) -> None:
        """Asks all workers to stop."""
        (self.folder / "session.json").unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes what is left of the session."""
        for file in self.folder.glob("*.json"):
            file.unlink(missing_ok=True)
        remove_partials(self.folder)
        with suppress(OSError):  # it is not there, or somebody writes in it just now
            self.folder.rmdir()


@cache
def _plan(place: str, scale: str) -> dict[str, Any]:
    return load_experiment(place).plan(scale)


def _end_if_stuck(session: Session, over: threading.Event) -> None:
    """Ends this process if its point does not hear that the sweep is over."""
    while not over.wait(1.0):
        if not session.is_on() and not over.wait(PATIENCE):
            os._exit(1)


def _attempt(point: Any, device: str, progress: Progress, unfinished: Path) -> Row:
    """The point's result, or why it has none; an interrupt passes through."""
    try:
        return {"result": point.run(device, progress, unfinished)}
    except InterruptedSweep:
        raise
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory on the device ({str(error).splitlines()[0]}); use fewer workers"}
    except Exception as error:  # one bad point must not end a sweep of hours; it is told, and tried again on resume
        return {"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"}
    finally:
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
