"""Points through a `concurrent.futures.Executor`: processes of this machine, a Slurm cluster, or what a file of yours makes.

An executor need only call functions somewhere: `submit(function, *arguments)` gives something with `done()`, `result()` and
`cancel()`, as submitit's do, too. How far a point is and when to stop goes through the sweep's folder (see worker.py).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from palimpsest.checks import check
from palimpsest.files import read_object
from palimpsest.lab.framework.experiment import Row
from palimpsest.lab.framework.results import SweepFolder
from palimpsest.lab.framework.tally import Tally
from palimpsest.lab.framework.worker import PATIENCE, Job, Session, work
from palimpsest.python_files import load_file

TRIES = 3  # times that a point may take its worker down with it
POLL = 0.1  # seconds


class ThroughExecutor(NamedTuple):
    """Runs points as `worker.run_here` does, through an executor: a runner of `sweep.run`.

    A point whose worker is lost (killed, out of memory, its machine gone) is given to another, from what it has put down;
    one that takes three of them along is said to have failed.

    Attributes:
        make: (workers, folder of the sweep) -> the executor.
        workers: points under way at once, the longest first.
        elsewhere: they run on other machines, so that nothing is known of their device.
    """

    make: Callable[[int, Path], Any]
    workers: int
    elsewhere: bool = False

    def __call__(
        self, left: Mapping[str, Any], device: str, sweep: SweepFolder, tally: Tally, keep_on: Callable[[], None]
    ) -> None:
        place = sweep.facts["place"]
        place = str(Path(place).resolve()) if place.endswith(".py") else place
        session = Session(sweep.folder.resolve(), uuid.uuid4().hex)
        session.clear()  # what a sweep left that was killed
        jobs = {i: Job(place, sweep.facts["scale"], i, device, str(sweep.folder.resolve()), session.name) for i in left}
        waiting = deque(sorted(left, key=lambda identity: -left[identity].work()))  # so that all end at about one time
        running: dict[str, Any] = {}  # identity -> what submit gave
        losses: Counter[str] = Counter()
        heard: dict[str, Row] = {}

        def take(identity: str, outcome: Row) -> None:
            seconds = outcome.pop("seconds")
            sweep.keep(identity, outcome, seconds)
            tally.point(identity, outcome, seconds)

        executor = self.make(self.workers, sweep.folder)
        try:
            while waiting or running:
                keep_on()
                session.beat()
                while waiting and len(running) < self.workers:
                    identity = waiting.popleft()
                    with _deaf_to_ctrl_c():
                        running[identity] = executor.submit(work, jobs[identity])
                for identity in _finished(running):
                    outcome, loss = _outcome(running.pop(identity))
                    losses[identity] += loss is not None
                    if outcome is not None:
                        take(identity, outcome)
                    elif losses[identity] < TRIES:
                        waiting.appendleft(identity)
                    else:
                        take(identity, {"error": _lost(loss, losses[identity]), "seconds": 0.0})
                for identity in running:
                    _hear(session, identity, heard, tally)
                time.sleep(POLL)
        finally:
            session.end()
            for identity, call in running.items():
                if not session.progress(identity).is_file():  # it has not begun
                    call.cancel()
            end = time.monotonic() + PATIENCE
            while running and time.monotonic() < end:
                for identity in _finished(running):  # a point that is done just now counts
                    outcome, _ = _outcome(running.pop(identity))
                    if outcome is not None:
                        take(identity, outcome)
                time.sleep(POLL)
            for call in running.values():
                call.cancel()
            if hasattr(executor, "shutdown"):
                executor.shutdown(wait=False)
            session.clear()


class Processes(Executor):
    """Processes of this machine, each a pool of its own: one that dies takes down no other.

    Args:
        workers: how many.
    """

    def __init__(self, workers: int):
        self._pools = [_pool() for _ in range(workers)]
        self._calls: list[Future | None] = [None] * workers
        self._children: set[Any] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """As any executor's, in a process that has nothing to do, if there is one."""
        at = next((i for i, call in enumerate(self._calls) if call is None or call.done()), 0)
        before = set(multiprocessing.active_children())
        try:
            call = self._pools[at].submit(fn, *args, **kwargs)
        except BrokenExecutor:  # its process died in the call before
            self._pools[at] = _pool()
            call = self._pools[at].submit(fn, *args, **kwargs)
        self._children |= set(multiprocessing.active_children()) - before
        self._calls[at] = call
        return call

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As any executor's; without `wait`, processes that are still at work are ended."""
        for pool in self._pools:
            pool.shutdown(wait=wait, cancel_futures=cancel_futures)
        if not wait and any(call is not None and not call.done() for call in self._calls):
            for child in self._children:
                child.terminate()


def processes(workers: int, folder: Path) -> Processes:
    """Processes of this machine."""
    return Processes(workers)


def executor_of(text: str, workers: int) -> ThroughExecutor:
    """The runner that a command line names.

    Args:
        text: "processes"; "slurm" or "submitit-local", with settings of submitit after a colon, as in
            "slurm:timeout_min=60,gpus_per_node=1,slurm_partition=gpu"; or "FILE.py:function", whose function takes the number
            of workers and gives an executor.
        workers: points under way at once.

    Raises:
        ValueError: it names none of these, or the file does not run. ImportError: submitit is not installed.

    >>> executor_of("processes", 2).elsewhere
    False
    """
    name, _, rest = text.partition(":")
    if name == "processes" and not rest:
        return ThroughExecutor(processes, workers)
    if name in ("slurm", "submitit-local"):
        return _submitit("slurm" if name == "slurm" else "local", _settings(text, rest), workers)
    check(
        name.endswith(".py"),
        f"executor {text!r} is unknown; give 'processes', 'slurm', 'slurm:timeout_min=60,gpus_per_node=1', "
        "'submitit-local', or 'FILE.py:function'",
    )
    make = getattr(load_file(name, "executor"), rest or "executor", None)
    check(
        callable(make), f"executor {text!r} names no function of that file; define executor(workers), or name another"
    )
    return ThroughExecutor(lambda workers, folder: make(workers), workers, elsewhere=True)  # type: ignore[misc]


def _settings(text: str, rest: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        check(
            bool(key and equals and value), f"executor {text!r}: {pair!r} is not SETTING=VALUE, such as timeout_min=60"
        )
        settings[key] = int(value) if value.isdecimal() else value
    return settings


def _submitit(cluster: str, settings: dict[str, Any], workers: int) -> ThroughExecutor:
    try:
        import submitit
    except ImportError as error:
        raise ImportError(
            "executors 'slurm' and 'submitit-local' need submitit: pip install 'palimpsest-kda[cluster]'"
        ) from error

    def make(workers: int, folder: Path) -> Any:
        jobs = folder / "jobs"
        jobs.mkdir(mode=0o700, exist_ok=True)  # calls and results lie there as pickles
        try:
            executor = submitit.AutoExecutor(jobs, cluster=cluster)
            executor.update_parameters(name="palimpsest-lab", **settings)
        except (NameError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"submitit refuses {cluster} with {settings}: {' '.join(str(error).split())}") from error
        return executor

    return ThroughExecutor(make, workers, elsewhere=cluster == "slurm")


def _finished(running: Mapping[str, Any]) -> list[str]:
    return [identity for identity, call in running.items() if call.done()]


def _outcome(call: Any) -> tuple[Row | None, BaseException | None]:
    """What `work` gave, and what became of its worker if it gave nothing."""
    try:
        return call.result(), None
    except Exception as error:  # each executor has errors of its own; those of the point are in what `work` gives
        return None, error


def _lost(error: BaseException | None, times: int) -> str:
    what = "" if error is None else f" ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    return f"its worker was lost {times} times{what}; use fewer workers if memory ran out, and run the command again"


def _hear(session: Session, identity: str, heard: dict[str, Row], tally: Tally) -> None:
    """Passes on how far a point is, if that is news."""
    try:
        news = read_object(session.progress(identity))
    except ValueError:  # it has not begun
        return
    if news != heard.get(identity):
        heard[identity] = news
        tally.progress(identity, news["share"], news["word"])


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_end_with_the_parent)


def _end_with_the_parent() -> None:
    """A worker that waits for work would outlive a parent that was killed."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        time.sleep(PATIENCE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
        with suppress(ValueError):
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
