"""Running a sweep: what is done stays done, what is left is known, and an interrupt loses the running points at most."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from palimpsest.checks import check
from palimpsest.lab.framework.executors import ThroughExecutor, processes
from palimpsest.lab.framework.experiment import Experiment, InterruptedSweep
from palimpsest.lab.framework.report import write_report
from palimpsest.lab.framework.results import SweepFolder, read_records, title, write_csv
from palimpsest.lab.framework.tally import Report, Tally
from palimpsest.lab.framework.worker import run_here
from palimpsest.train.interrupts import interrupts

Runner = Callable[[Mapping[str, Any], str, SweepFolder, Tally, Callable[[], None]], None]  # as `run_here`


class TimeIsUp(InterruptedSweep):
    """The sweep used the minutes that it was given."""


def run(
    experiment: Experiment,
    scale: str,
    folder: str | Path,
    *,
    device: str | None = None,
    workers: int = 1,
    only: str = "",
    minutes: float | None = None,
    report: Report = lambda event: None,
    command: str = "",
    note: str = "",
    runner: Runner | None = None,
) -> bool:
    """Runs the points that are not done yet, then writes CSV, plots and the report.

    Args:
        experiment, scale: what to run.
        folder: where results go; one that holds the same sweep is resumed.
        device: "cpu", "cuda" or "cuda:N"; None takes a GPU if there is one. A runner whose points run elsewhere needs it.
        workers: points run at once, each in a process of its own; 1 runs them in this one.
        only: run only points whose description contains this text; the rest stays for later.
        minutes: stop after so many, as an interrupt does but without an exception; the same call goes on.
        report: called with each event, a dict: "start", "progress", "point", "end".
        command, note: for the report: how this was called, and what a reader should know of the machine.
        runner: takes the points in another way, such as `palimpsest.lab.side_by_side.SideBySide`, or through any executor
            (`palimpsest.lab.framework.executors`); without one they run in processes of this machine.

    Returns:
        Whether all points of the sweep are done.

    Raises:
        ValueError: the experiment, folder or device cannot be used; nothing was run.
        InterruptedSweep: Ctrl-C or SIGTERM; all finished points are in the folder, and so is their report.
    """
    began = time.monotonic()
    elsewhere = getattr(runner, "elsewhere", False)
    check(
        not elsewhere or device is not None,
        "device is None, and the points run on other machines; give 'cpu' or 'cuda'",
    )
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    check_request(experiment, workers, minutes, device, elsewhere=elsewhere)
    plan = experiment.plan(scale)
    sweep = SweepFolder(Path(folder), experiment, scale, plan)
    left = _left(experiment, plan, sweep.done(), only)
    workers = max(min(workers, len(left)), 1)
    if device != "cpu" and left and not elsewhere:
        check_room(left, torch.cuda.mem_get_info(device)[0], workers)
    tally, end = Tally(plan, left, report), math.inf if minutes is None else began + 60 * minutes
    with sweep.held():
        sweep.start(command, note, "cpu" if elsewhere else device)
        report({"event": "start", "points": len(plan), "left": len(left), "device": device, "workers": workers})
        try:
            with suppress(TimeIsUp), _stops(end) as keep_on:
                if runner is None:
                    runner = run_here if workers == 1 else ThroughExecutor(processes, workers)
                runner(left, device, sweep, tally, keep_on)
        finally:
            with suppress(OSError):  # it is not there, or holds points
                (sweep.folder / "unfinished").rmdir()
            finish(sweep.folder, experiment)
        complete = sweep.done() >= set(plan)
    report({"event": "end", "complete": complete, "folder": str(folder), "failed": tally.failed})
    return complete


def _left(experiment: Experiment, plan: Mapping[str, Any], done: set[str], only: str) -> dict[str, Any]:
    """identity -> point of those to run: neither done nor unwanted."""
    titles = {identity: title(point.label()) for identity, point in plan.items()}
    check(
        any(only in words for words in titles.values()),
        f"no point of {experiment.name!r} matches {only!r}; a point is described like {next(iter(titles.values()))!r}",
    )
    return {identity: point for identity, point in plan.items() if identity not in done and only in titles[identity]}


@contextmanager
def _stops(end: float) -> Iterator[Callable[[], None]]:
    """A function that raises once Ctrl-C or SIGTERM has arrived, or the time is up."""
    with interrupts() as interrupted:

        def keep_on() -> None:
            if interrupted():
                raise InterruptedSweep
            if time.monotonic() > end:
                raise TimeIsUp

        yield keep_on


def finish(folder: Path, experiment: Experiment) -> None:
    """Writes CSV, plots and the report of what is done, if anything is."""
    records = read_records(folder)
    if records:
        write_csv(folder / "results.csv", records)
        write_report(folder, experiment, records)


def check_request(
    experiment: Experiment, workers: int, minutes: float | None, device: str, *, elsewhere: bool = False
) -> None:
    """Raise unless an experiment can be run so: on this machine, or on others, whose devices nobody knows here."""
    check(workers >= 1, f"workers is {workers}; give at least 1")
    check(
        workers == 1 or not experiment.alone,
        f"workers is {workers}, and {experiment.name!r} measures time, which others at work beside it would spoil; give 1",
    )
    check(
        minutes is None or 0 < minutes < math.inf,
        f"minutes is {minutes}; give a number above 0, or leave it out to run to the end",
    )
    check_device(device, here=not elsewhere)


def check_device(device: str, *, here: bool = True) -> None:
    """Raise unless it is "cpu" or a GPU that this machine has, or with `here` False may have."""
    name, _, number = device.partition(":")
    known = device == "cpu" or (name == "cuda" and (number.isdecimal() or device == "cuda"))
    check(known, f"device is {device!r}; give 'cpu', 'cuda', or 'cuda:1' and the like")
    if device == "cpu" or not here:
        return
    check(torch.cuda.is_available(), f"device is {device!r} and this machine has no CUDA GPU; give 'cpu'")
    count = torch.cuda.device_count()
    check(int(number or 0) < count, f"device is {device!r} and this machine has {count} GPUs; count them from 0")


def check_room(left: Mapping[str, Any], room: int, workers: int) -> None:
    """Raise if so many workers cannot hold the largest of these points in the free memory of a GPU, `room` bytes."""
    hungriest = max(left.values(), key=lambda point: point.bytes_needed())
    each = hungriest.bytes_needed() + (600 << 20)  # a process on the GPU costs its context
    check(
        each * workers <= room,
        f"the sweep needs about {each * workers / 2**30:.1f} GiB of GPU memory ({workers} workers, largest point: "
        f"{title(hungriest.label())}) and {room / 2**30:.1f} GiB are free; "
        + (f"give at most {room // each} workers" if room >= each else "run a smaller scale or on a larger GPU"),
    )
