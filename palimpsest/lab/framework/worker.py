"""Running points: in this process one after another, or in several at once, which take what is left from a queue."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from palimpsest.lab.framework.experiment import InterruptedSweep, Progress, Row, load_experiment
from palimpsest.lab.framework.results import SweepFolder
from palimpsest.lab.framework.tally import Tally

PATIENCE = 30.0  # seconds in which a worker that is asked to stop puts down what it is doing


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


def run_here(
    left: Mapping[str, Any], device: str, sweep: SweepFolder, tally: Tally, keep_on: Callable[[], None]
) -> None:
    for identity, point in left.items():
        keep_on()

        def progress(share: float, word: str, identity=identity) -> None:
            tally.progress(identity, share, word)
            keep_on()

        began = time.monotonic()
        outcome = _attempt(point, device, progress, sweep.unfinished(identity))
        sweep.keep(identity, outcome, time.monotonic() - began)
        tally.point(identity, outcome, time.monotonic() - began)


def _serve(place: str, scale: str, device: str, folder: Path, jobs: Any, news: Any, stop: Any) -> None:
    """A worker process: takes identities, runs their points, sends what came of them, until told to stop."""
    torch.set_num_threads(1)
    experiment = load_experiment(place)
    plan = experiment.plan(scale)
    sweep, parent, last = SweepFolder(folder, experiment, scale, plan), multiprocessing.parent_process(), [0.0]
    assert parent is not None

    def progress(share: float, word: str) -> None:
        if stop.is_set():
            raise InterruptedSweep
        if word or time.monotonic() - last[0] > 1:
            last[0] = time.monotonic()
            news.put(("progress", identity, share, word))
            if not parent.is_alive():  # killed: nobody waits for the result
                raise InterruptedSweep

    while parent.is_alive() and not stop.is_set():
        try:
            identity = jobs.get(timeout=1)
        except queue.Empty:
            continue
        if identity is None:
            return
        began = time.monotonic()
        try:
            outcome = _attempt(plan[identity], device, progress, sweep.unfinished(identity))
        except InterruptedSweep:
            return
        news.put(("point", identity, outcome, time.monotonic() - began))


def run_in_processes(
    left: Mapping[str, Any], device: str, workers: int, sweep: SweepFolder, tally: Tally, keep_on: Callable[[], None],
) -> None:  # fmt: skip
    context = multiprocessing.get_context("spawn")
    jobs, news, stop = context.Queue(), context.Queue(), context.Event()
    longest_first = sorted(left, key=lambda identity: -left[identity].work())  # so that all end at about the same time
    for identity in [*longest_first, *[None] * workers]:
        jobs.put(identity)
    facts = (sweep.facts["place"], sweep.facts["scale"], device, sweep.folder, jobs, news, stop)
    processes = [context.Process(target=_serve, args=facts, daemon=True) for _ in range(workers)]
    waiting = set(left)

    def hear(timeout: float) -> None:
        kind, identity, *facts = news.get(timeout=timeout)
        if kind == "progress":
            return tally.progress(identity, *facts)
        waiting.discard(identity)
        sweep.keep(identity, *facts)
        tally.point(identity, *facts)

    try:
        with _deaf_to_ctrl_c():
            for process in processes:
                process.start()
        while waiting:
            keep_on()
            try:
                hear(0.5)
            except queue.Empty:
                dead = [p for p in processes if p.exitcode not in (None, 0)]
                if dead and not any(p.is_alive() for p in processes):
                    raise ValueError(
                        f"every worker process ended (exit code {dead[0].exitcode}) with {len(waiting)} points left; "
                        "use fewer workers if memory ran out, and run the command again to resume"
                    ) from None
    finally:
        stop.set()
        end = time.monotonic() + PATIENCE
        while any(p.is_alive() for p in processes) and time.monotonic() < end:
            with suppress(
                queue.Empty
            ):  # a point that is done just now counts, and a full pipe would hold its sender up
                hear(0.1)
        for process in processes:
            if process.is_alive():
                process.terminate()
            if process.pid is not None:
                process.join(10)
        with suppress(queue.Empty):
            while waiting:
                hear(0)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started within it never hear Ctrl-C: this one decides. It hears what came meanwhile afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
