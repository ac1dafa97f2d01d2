"""Running a sweep: what is done stays done, what is left is known, and an interrupt loses the running points at most.

FOLDER/sweep.json      the experiment, its scale and its points: who this folder belongs to
FOLDER/results.jsonl   a line a finished point, with curves
FOLDER/unfinished/     what an interrupted point left, to be taken up again
FOLDER/results.csv     the same as results.jsonl, a line a row, without curves
FOLDER/*.png           plots
FOLDER/report.md       one page: the verdict, the tables, the machine
"""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import platform
import queue
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from palimpsest.checks import check
from palimpsest.files import locked, replacing, write_json, write_text
from palimpsest.lab.framework.experiment import Experiment, InterruptedSweep, Record, Row, Tell, load_experiment

Report = Callable[[Row], None]
PATIENCE = 30.0  # seconds in which a worker that is asked to stop puts down what it is doing


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
) -> bool:
    """Runs the points that are not done yet, then writes CSV, plots and the report.

    Args:
        experiment, scale: what to run.
        folder: where results go; one that holds the same sweep is resumed.
        device: "cpu", "cuda" or "cuda:N"; None takes a GPU if there is one.
        workers: points run at once, each in a process of its own; 1 runs them in this one.
        only: run only points whose description contains this text; the rest stays for later.
        minutes: stop after so many, as an interrupt does but without an exception; the same call goes on.
        report: called with each event, a dict: "start", "progress", "point", "end".
        command, note: for the report: how this was called, and what a reader should know of the machine.

    Returns:
        Whether all points of the sweep are done.

    Raises:
        ValueError: the experiment, folder or device cannot be used; nothing was run.
        InterruptedSweep: Ctrl-C or SIGTERM; all finished points are in the folder, and so is their report.
    """
    began = time.monotonic()
    check(workers >= 1, f"workers is {workers}; give at least 1")
    check(
        workers == 1 or not experiment.alone,
        f"workers is {workers}, and {experiment.name!r} measures time, which others at work beside it would spoil; give 1",
    )
    check(
        minutes is None or 0 < minutes < math.inf,
        f"minutes is {minutes}; give a number above 0, or leave it out to run to the end",
    )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    plan, folder = experiment.plan(scale), Path(folder)
    sweep = Sweep(folder, experiment, scale, plan)
    done = {r["id"] for r in sweep.lines() if "result" in r}
    left = {i: p for i, p in plan.items() if i not in done and only in title(p.label())}
    titles = [title(p.label()) for p in plan.values()]
    check(
        any(only in words for words in titles),
        f"no point of {experiment.name!r} matches {only!r}; a point is described like {titles[0]!r}",
    )
    workers = max(min(workers, len(left)), 1)
    if device != "cpu" and left:
        hungriest = max(left.values(), key=lambda p: p.bytes_needed())
        room = torch.cuda.mem_get_info(device)[0]
        check_room(hungriest.bytes_needed(), room, workers, title(hungriest.label()))
    tally, end = Tally(plan, left, report), math.inf if minutes is None else began + 60 * minutes
    with sweep.held():
        sweep.start(command, note, device)
        report({"event": "start", "points": len(plan), "left": len(left), "device": device, "workers": workers})
        try:
            with _stops(end) as keep_on:
                if workers == 1:
                    _run_here(left, device, sweep, tally, keep_on)
                else:
                    _run_in_processes(experiment.place, left, device, workers, sweep, tally, keep_on)
        except TimeIsUp:
            pass
        finally:
            with suppress(OSError):  # it is not there, or holds points
                (folder / "unfinished").rmdir()
            finish(folder, experiment)
        complete = {r["id"] for r in sweep.lines() if "result" in r} >= set(plan)
    report({"event": "end", "complete": complete, "folder": str(folder), "failed": tally.failed})
    return complete


@contextmanager
def _stops(end: float) -> Iterator[Callable[[], None]]:
    """A function that raises once Ctrl-C or SIGTERM has arrived, or the time is up."""
    from palimpsest.train.interrupts import interrupts

    with interrupts() as interrupted:

        def keep_on() -> None:
            if interrupted():
                raise InterruptedSweep
            if time.monotonic() > end:
                raise TimeIsUp

        yield keep_on


def finish(folder: Path, experiment: Experiment) -> None:
    """Writes CSV, plots and the report of what is done, if anything is."""
    from palimpsest.lab.framework.report import write_report

    records = read_records(folder)
    if records:
        write_csv(folder / "results.csv", records)
        write_report(folder, experiment, records)


class Sweep:
    """The folder of one sweep.

    Raises ValueError if it holds something else: other files, or another sweep.
    """

    def __init__(self, folder: Path, experiment: Experiment, scale: str, plan: Mapping[str, Any]):
        self.folder = folder
        self.facts = {"experiment": experiment.name, "place": experiment.place, "scale": scale, "points": list(plan)}
        self.points = plan
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"results {str(folder)!r} is a file; give a folder")
        if not folder.is_dir() or not any(folder.iterdir()):
            return
        held = read_sweep(folder)
        if held["experiment"] != experiment.name or held["scale"] != scale:
            raise ValueError(
                f"results folder {str(folder)!r} holds {held['experiment']!r} at scale {held['scale']!r}, not "
                f"{experiment.name!r} at {scale!r}; give another folder"
            )
        if not set(held["points"]) <= set(plan):  # a recipe may grow: what it had is kept and the new points are run
            raise ValueError(
                f"results folder {str(folder)!r} holds {experiment.name!r} with other settings than the recipe has now; "
                "give another folder"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder and keeps other runs out of it meanwhile.

        Raises ValueError if it cannot be made, or another run holds it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"results folder {str(self.folder)!r} cannot be written: {error.strerror}") from error
        busy = f"results folder {str(self.folder)!r} is in use by another run; wait for it, or give another folder"
        with locked(self.folder, busy):
            yield

    def start(self, command: str, note: str, device: str) -> None:
        """Cuts off a line that a kill left half written, and adds this session to the folder's history."""
        try:
            write_text(
                self.folder / "results.jsonl", "".join(json.dumps(spelled(line)) + "\n" for line in self.lines())
            )
        except OSError as error:
            raise ValueError(f"results folder {str(self.folder)!r} cannot be written: {error.strerror}") from error
        history = read_sweep(self.folder)["sessions"] if (self.folder / "sweep.json").is_file() else []
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        history = [*history, {"began": now, "command": command, "machine": machine(device), "note": note}]
        write_json(self.folder / "sweep.json", self.facts | {"sessions": history})

    def lines(self) -> list[Row]:
        return read_lines(self.folder / "results.jsonl")

    def keep(self, identity: str, outcome: Row, seconds: float) -> None:
        """One point is done, or has failed."""
        point = self.points[identity]
        line = {
            "id": identity,
            "label": point.label(),
            "seconds": round(seconds, 2),
            **outcome,
            "settings": point.to_dict(),
        }
        with open(self.folder / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(spelled(line), allow_nan=False) + "\n")
        self.unfinished(identity).unlink(missing_ok=True)

    def unfinished(self, identity: str) -> Path:
        """Where a point puts what it has when it is interrupted."""
        return self.folder / "unfinished" / f"{identity}.pt"


class Tally:
    """How far the sweep is, and when it will end at the pace so far."""

    def __init__(self, plan: Mapping[str, Any], left: Mapping[str, Any], report: Report):
        self.work = {i: p.work() for i, p in left.items()}
        self.titles = {i: title(p.label()) for i, p in plan.items()}
        self.share = dict.fromkeys(left, 0.0)
        self.report, self.began, self.failed = report, time.monotonic(), 0

    def progress(self, identity: str, share: float, word: str) -> None:
        self.share[identity] = share
        self.report(
            {"event": "progress", "point": self.titles[identity], "share": share, "word": word, **self.outlook()}
        )

    def point(self, identity: str, outcome: Row, seconds: float) -> None:
        self.share[identity] = 1.0  # early stopping ends a point before its time
        self.failed += "error" in outcome
        event = {"event": "point", "point": self.titles[identity], "seconds": seconds, **outcome, **self.outlook()}
        self.report(event)

    def outlook(self) -> Row:
        total = sum(self.work.values())
        done = sum(self.work[i] * share for i, share in self.share.items())
        elapsed = time.monotonic() - self.began
        eta = elapsed * (total - done) / done if done > 0.002 * total else None  # a guess from less misleads
        return {"done": done / total if total else 1.0, "elapsed": elapsed, "eta": eta}


def title(label: Row) -> str:
    """A point in a line of text.

    >>> title({"contestant": "kda", "length": 64})
    'contestant kda, length 64'
    """
    return ", ".join(f"{name} {value}" for name, value in label.items())


def _attempt(point: Any, device: str, tell: Tell, unfinished: Path) -> Row:
    """The point's result, or why it has none; an interrupt passes through."""
    try:
        return {"result": point.run(device, tell, unfinished)}
    except InterruptedSweep:
        raise
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory on the device ({str(error).splitlines()[0]}); use fewer workers"}
    except Exception as error:  # one bad point must not end a sweep of hours; it is told, and tried again on resume
        return {"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"}
    finally:
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def _run_here(left: Mapping[str, Any], device: str, sweep: Sweep, tally: Tally, keep_on: Callable[[], None]) -> None:
    for identity, point in left.items():
        keep_on()

        def tell(share: float, word: str, identity=identity) -> None:
            tally.progress(identity, share, word)
            keep_on()

        began = time.monotonic()
        outcome = _attempt(point, device, tell, sweep.unfinished(identity))
        sweep.keep(identity, outcome, time.monotonic() - began)
        tally.point(identity, outcome, time.monotonic() - began)


def _serve(place: str, scale: str, device: str, folder: Path, jobs: Any, news: Any, stop: Any) -> None:
    """A worker process: takes identities, runs their points, sends what came of them, until told to stop."""
    torch.set_num_threads(1)
    experiment = load_experiment(place)
    plan = experiment.plan(scale)
    sweep, parent, last = Sweep(folder, experiment, scale, plan), multiprocessing.parent_process(), [0.0]
    assert parent is not None

    def tell(share: float, word: str) -> None:
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
            outcome = _attempt(plan[identity], device, tell, sweep.unfinished(identity))
        except InterruptedSweep:
            return
        news.put(("point", identity, outcome, time.monotonic() - began))


def _run_in_processes(
    place: str, left: Mapping[str, Any], device: str, workers: int, sweep: Sweep, tally: Tally,
    keep_on: Callable[[], None],
) -> None:  # fmt: skip
    context = multiprocessing.get_context("spawn")
    jobs, news, stop = context.Queue(), context.Queue(), context.Event()
    longest_first = sorted(left, key=lambda identity: -left[identity].work())  # so that all end at about the same time
    for identity in [*longest_first, *[None] * workers]:
        jobs.put(identity)
    facts = (place, sweep.facts["scale"], device, sweep.folder, jobs, news, stop)
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


def check_device(device: str) -> None:
    """Raise unless it is "cpu" or a GPU that this machine has."""
    name, _, number = device.partition(":")
    known = device == "cpu" or (name == "cuda" and (number.isdecimal() or device == "cuda"))
    check(known, f"device is {device!r}; give 'cpu', 'cuda', or 'cuda:1' and the like")
    if device == "cpu":
        return
    check(torch.cuda.is_available(), f"device is {device!r} and this machine has no CUDA GPU; give 'cpu'")
    count = torch.cuda.device_count()
    check(int(number or 0) < count, f"device is {device!r} and this machine has {count} GPUs; count them from 0")


def check_room(needed: int, room: int, workers: int, what: str) -> None:
    """Raise if so many workers cannot hold the largest point in the free memory of a GPU."""
    each = needed + (600 << 20)  # a process on the GPU costs its context
    check(
        each * workers <= room,
        f"the sweep needs about {each * workers / 2**30:.1f} GiB of GPU memory ({workers} workers, largest point: {what}) and "
        f"{room / 2**30:.1f} GiB are free; "
        + (f"give at most {room // each} workers" if room >= each else "run a smaller scale or on a larger GPU"),
    )


def read_sweep(folder: Path) -> Row:
    """What the folder holds. Raises ValueError if it is no sweep."""
    try:
        held = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        return {name: held[name] for name in ("experiment", "place", "scale", "points", "sessions")}
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(
            f"folder {str(folder)!r} holds no results of the lab; give one that `palimpsest lab run` wrote, or a new one"
        ) from None


def read_lines(file: Path) -> list[Row]:
    """The whole lines of a JSONL file; the last may have been cut by a kill."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found.append(counted(json.loads(line)))
        except ValueError:
            continue
    return found


def spelled(value: Any) -> Any:
    """The value with numbers that JSON does not have as words.

    >>> spelled({"loss": [1.0, float("inf")]})
    {'loss': [1.0, 'inf']}
    """
    if isinstance(value, dict):
        return {k: spelled(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [spelled(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def counted(value: Any) -> Any:
    """The inverse of spelled."""
    if isinstance(value, dict):
        return {k: counted(v) for k, v in value.items()}
    if isinstance(value, list):
        return [counted(v) for v in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def read_records(folder: Path) -> list[Record]:
    """The finished points of a sweep, the last result of each."""
    lines = {line["id"]: line for line in read_lines(folder / "results.jsonl") if "result" in line}
    return [Record(line["label"], line["result"], line["seconds"]) for line in lines.values()]


def failures(folder: Path) -> list[tuple[str, str]]:
    """Points that failed and have no result since: description and reason."""
    lines = read_lines(folder / "results.jsonl")
    done = {line["id"] for line in lines if "result" in line}
    return [(title(line["label"]), line["error"]) for line in lines if "error" in line and line["id"] not in done]


def write_csv(file: Path, records: list[Record]) -> None:
    rows = [row | {"seconds": record.seconds} for record in records for row in record.rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(file) as partial, open(partial, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(rows)


def machine(device: str) -> str:
    """The machine in words: device, torch, Python."""
    if device.startswith("cuda"):
        import importlib.metadata as metadata

        name = torch.cuda.get_device_name(device)
        try:
            triton = f", Triton {metadata.version('triton')}"
        except metadata.PackageNotFoundError:
            triton = ""
    else:
        name, triton = f"CPU {_cpu()}, {torch.get_num_threads()} threads", ""
    return f"{name}, torch {torch.__version__.split('+')[0]}{triton}, Python {platform.python_version()}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
