"""What a sweep leaves in its folder, and how it is read again.

FOLDER/sweep.json      the experiment, its scale and its points: who this folder belongs to
FOLDER/results.jsonl   a line a finished point, with curves and settings
FOLDER/unfinished/     what an interrupted point left, to be taken up again
FOLDER/running/        how far each point is, while points run in other processes; see worker.py
FOLDER/jobs/           what submitit keeps of a sweep through it
FOLDER/results.csv     a line a row: what it is of, its label, its numbers
FOLDER/*.png           plots
FOLDER/report.md       one page: the verdict, the tables, the machine

Results that are published are the last three; `compare` and `show` need no more.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from palimpsest.files import locked, read_bytes, read_object, write_json, write_text
from palimpsest.lab.framework.experiment import Experiment, Record, Row
from palimpsest.machine import in_words, machine

COORDINATES = (
    "test",
    "test_length",
    "tokens",
    "context",
    "layer",
    "head",
    "step",
)  # columns that say where, not how much


class SweepFolder:
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
                self.folder / "results.jsonl", "".join(json.dumps(to_json(line)) + "\n" for line in self.lines())
            )
        except OSError as error:
            raise ValueError(f"results folder {str(self.folder)!r} cannot be written: {error.strerror}") from error
        history = read_sweep(self.folder)["sessions"] if (self.folder / "sweep.json").is_file() else []
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        history = [*history, {"began": now, "command": command, "machine": in_words(machine(device)), "note": note}]
        write_json(self.folder / "sweep.json", self.facts | {"sessions": history})

    def lines(self) -> list[Row]:
        return read_lines(self.folder / "results.jsonl")

    def done(self) -> set[str]:
        """Identities of the points that have a result."""
        return {line["id"] for line in self.lines() if "result" in line}

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
            file.write(json.dumps(to_json(line), allow_nan=False) + "\n")
        self.unfinished(identity).unlink(missing_ok=True)

    def unfinished(self, identity: str) -> Path:
        """Where a point puts what it has when it is interrupted."""
        return unfinished_file(self.folder, identity)


def unfinished_file(folder: Path, identity: str) -> Path:
    """Where a point of the sweep in a folder puts what it has when it is interrupted."""
    return folder / "unfinished" / f"{identity}.pt"


def read_sweep(folder: Path) -> Row:
    """What the folder holds. Raises ValueError if it is no sweep."""
    kinds = {"experiment": str, "place": str, "scale": str, "points": list, "sessions": list}
    try:
        sweep = read_object(folder / "sweep.json")
        if all(isinstance(sweep.get(name), kind) for name, kind in kinds.items()):
            return {name: sweep[name] for name in kinds}
    except ValueError:
        pass
    raise ValueError(
        f"folder {str(folder)!r} holds no results of the lab; give one that `palimpsest lab run` wrote, or a new one"
    ) from None


def read_lines(file: Path) -> list[Row]:
    """The whole lines of a JSONL file; the last may have been cut by a kill."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            lines.append(from_json(json.loads(line)))
        except ValueError:
            continue
    return lines


def to_json(value: Any) -> Any:
    """A value with numbers that JSON does not have as words.

    >>> to_json({"loss": [1.0, float("inf")]})
    {'loss': [1.0, 'inf']}
    """
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_json(value: Any) -> Any:
    """A value that `to_json` made, as it was."""
    if isinstance(value, dict):
        return {k: from_json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [from_json(v) for v in value]
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


def write_csv(file: Path, records: Sequence[Record]) -> None:
    """A line a row: under "point" what it is of, seeds aside; then its label, its numbers and the point's seconds."""
    rows = []
    for record in records:
        for row in record.result["rows"]:
            where = {k: v for k, v in row.items() if isinstance(v, str) or k in COORDINATES}
            point = title(_without_repetition(record.label | where))
            rows.append({"point": point} | record.label | row | {"seconds": record.seconds})
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, out.getvalue())


def read_numbers(folder: Path) -> dict[tuple[str, str], list[float]]:
    """(what a row is of, column) -> what was measured there, over seeds; from a folder's results.csv.

    Raises:
        ValueError: there is no such file, it is no table of results, or it has no row.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(read_bytes(folder / "results.csv").decode("utf-8"), newline="")))
    except (OSError, ValueError, csv.Error):
        rows = None
    if rows is None or any(not row.get("point") for row in rows):
        raise ValueError(
            f"folder {str(folder)!r} holds no results.csv of the lab; give one that `palimpsest lab run` wrote"
        )
    numbers: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        named = {part.partition(" ")[0] for part in row["point"].split(", ")}  # the label's columns
        for column, text in row.items():
            if column not in named and column not in (*COORDINATES, "point", "seed", "seconds"):
                with suppress(ValueError, TypeError):  # a word, True or False, or nothing
                    number = float(text)
                    numbers.setdefault((row["point"], column), []).append(number)
    return numbers


def _without_repetition(row: Row) -> Row:
    """What a row is of, without its seed and without saying the same twice."""
    known = {"seed", "test"} | {f"test_{k}" for k in ("task", "length") if row.get(k) == row.get(f"test_{k}")}
    return {k: v for k, v in row.items() if k not in known}


def title(label: Row) -> str:
    """A point in a line of text.

    >>> title({"contestant": "kda", "length": 64})
    'contestant kda, length 64'
    """
    return ", ".join(f"{name} {value}" for name, value in label.items())
