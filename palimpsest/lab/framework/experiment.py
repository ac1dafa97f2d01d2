"""What an experiment is: points to run, a judge of what they came to, and plots. A recipe file holds one.

    EXPERIMENT = Experiment(name="mine", question=..., claim=..., scales={...}, points=..., judge=..., draw=...)

A point is one run with one result: `Training` for a model that learns a task, or anything with the methods of `Point`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from palimpsest.checks import check
from palimpsest.python_files import load_file

Row = dict[str, Any]
Progress = Callable[[float, str], None]  # the share of a point that is done, and a word about it
METHODS = ("label", "to_dict", "prepare", "work", "bytes_needed", "run")  # of a point
NAMES = sorted(file.stem for file in (Path(__file__).parents[1] / "experiments").glob("[!_]*.py"))  # those that ship


class InterruptedSweep(Exception):  # noqa: N818 - not an error: the user asked for it
    """The user interrupted; finished points are kept."""


class Point(Protocol):
    """One run of a sweep."""

    def label(self) -> Row:
        """What tells it from the other points: columns of every table."""
        ...

    def to_dict(self) -> Row:
        """Everything that decides its result."""
        ...

    def prepare(self) -> None:
        """Raises ValueError, before any compute is spent, if it cannot run."""
        ...

    def work(self) -> float:
        """How long it takes, in any unit that its sweep shares."""
        ...

    def bytes_needed(self) -> int:
        """Of memory on the device, about."""
        ...

    def run(self, device: str, progress: Progress, unfinished: Path) -> Row:
        """{"rows": [a flat row a line of the CSV], ...}.

        Calls progress often: that is where an InterruptedSweep arrives. What it leaves in the file `unfinished` then is
        there when it is run again; a short point need not care.
        """
        ...


@dataclass(frozen=True)
class Record:
    """A point that was run."""

    label: Row
    result: Row
    seconds: float

    @property
    def rows(self) -> list[Row]:
        return [self.label | row for row in self.result["rows"]]


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


@dataclass(frozen=True)
class Verdict:
    """What the results say of the claim, with the uncertainty, in sentences."""

    outcome: Literal["shown", "not shown", "undecided", "measured"]
    because: Sequence[str]
    tables: Sequence[Table] = ()


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One question and how it is answered.

    Attributes:
        name: of the command and the folder.
        question: what is asked, in a sentence.
        claim: what was published, with its source.
        scales: name -> what runs and for how long; "tiny" is for tests.
        points: scale -> the runs, all of one kind of work.
        judge: records (those there are) -> verdict.
        draw: records -> name -> matplotlib figure.
        setting: what a reader must know about how it was done.
        alone: its points measure time, so that only one may run at once.
    """

    name: str
    question: str
    claim: str
    scales: Mapping[str, str]
    points: Callable[[str], Sequence[Any]]
    judge: Callable[[Sequence[Record]], Verdict]
    draw: Callable[[Sequence[Record]], Mapping[str, Any]]
    setting: str = ""
    alone: bool = False
    place: str = field(default="")  # where it was loaded from, so that other processes can load it too

    def plan(self, scale: str) -> dict[str, Any]:
        """identity -> point, each checked."""
        check(
            scale in self.scales,
            f"experiment {self.name!r} has no scale {scale!r}; choose one of {', '.join(self.scales)}",
        )
        points: dict[str, Any] = {}
        made = list(self.points(scale))
        check(bool(made), f"experiment {self.name!r} has no point at scale {scale!r}; give its recipe at least one")
        for point in made:
            lacks = [name for name in METHODS if not callable(getattr(point, name, None))]
            check(
                not lacks,
                f"experiment {self.name!r} has a point {point!r:.60} without {', '.join(lacks)}; give a Training, or "
                "anything with the methods of palimpsest.lab.framework.experiment.Point",
            )
            point.prepare()
            points.setdefault(identity(point), point)
        return points


def identity(point: Point) -> str:
    """A short name of everything that decides the point's result."""
    return hashlib.sha256(json.dumps(point.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


def load_experiment(place: str) -> Experiment:
    """An experiment by its name, or the EXPERIMENT of a recipe file.

    >>> load_experiment("fig4").name
    'fig4'
    """
    if place.endswith(".py"):
        module = load_file(place, "experiment", again=False)
    else:
        check(place in NAMES, f"experiment {place!r} is unknown; choose one of {', '.join(NAMES)}, or give a .py file")
        module = import_module(f"palimpsest.lab.experiments.{place}")
    experiment = getattr(module, "EXPERIMENT", None)
    if not isinstance(experiment, Experiment):
        raise ValueError(
            f"experiment {place!r} defines no EXPERIMENT of type palimpsest.lab.framework.experiment.Experiment"
        )
    object.__setattr__(experiment, "place", place)
    return experiment
