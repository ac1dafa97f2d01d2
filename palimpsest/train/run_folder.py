"""The folder of one run, and the names in it that are the program's own.

    RUN/run.json                    the recipe and the digest of its data; written first
    RUN/metrics.jsonl               a line a logged step and evaluation
    RUN/checkpoints/step-00000200   a checkpoint; see checkpoints.py
    RUN/result.json, loss.png, ...  what came of it

One run at a time holds the folder, by a lock that ends with its process. Rotation and --overwrite remove what stands
under these names alone: a copy named step-00000200-best, or a file of notes, is the user's and stays.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from palimpsest.checks import is_a
from palimpsest.files import PARTIAL, locked, put, read_json, read_object, remove_partials, write_json, write_text
from palimpsest.models.kimi_linear.checkpoint_place import STEP, checkpoints_of, is_run, latest, number_of
from palimpsest.train.recipe import Recipe, as_dict, difference

HALF = re.compile(r"\.(saving|removing)-step-\d{8,}")  # one that is being written or removed
WRITTEN = ("result.json", "metrics.jsonl", "loss.png", "loss.svg")
STATE = "training.json"  # of a checkpoint: what resuming needs to know


class RunFolder:
    """The folder of one training run.

    Args:
        path: the folder; made if missing, by `held`.
        recipe, digest: what a run in this folder must be.
        resume: go on with a run that is there.
        overwrite: remove a run that is there, once the new one is ready to start. Without either, a run is refused.

    Raises:
        ValueError: the folder holds something else, a run already, or a run of another recipe or other data.
    """

    def __init__(self, path: str | Path, recipe: Recipe, digest: str, *, resume: bool = False, overwrite: bool = False):
        self.path, self.recipe, self.digest = Path(path), recipe, digest
        self.resume, self.overwrite = resume, overwrite
        self.metrics, self.checkpoints = self.path / "metrics.jsonl", self.path / "checkpoints"
        self.check()

    def check(self) -> None:
        """Refuses a folder in which this run may not be; raises as the class says."""
        name = repr(str(self.path))
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{name} is a file; a run needs a folder")
        if not is_run(self.path):
            if self._holds_something_else():
                raise ValueError(f"folder {name} holds files but no run; give an empty or a new folder")
        elif self.resume:
            self._refuse_another(read_run(self.path))
        elif not self.overwrite:
            raise ValueError(
                f"folder {name} holds a run already; go on with it (--resume), replace it (--overwrite), or give another "
                "folder (--out)"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder if need be and keeps other runs out of it meanwhile. One process of a run calls this.

        Raises:
            ValueError: it cannot be made, or another run is at work in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"folder {str(self.path)!r} cannot be made: {error.strerror}; give another") from error
        busy = f"another run is at work in folder {str(self.path)!r}; wait for its end, or give another folder (--out)"
        with locked(self.path, busy):
            self.check()  # again: a run may have come and gone since
            yield

    def start(self) -> None:
        """Clears what a killed run left half written, or with `overwrite` the run that is there, and writes run.json."""
        try:
            remove_partials(self.path)
            if self.overwrite:
                self._clear()
            write_json(self.path / "run.json", {"recipe": as_dict(self.recipe), "data": self.digest})
            self.checkpoints.mkdir(exist_ok=True)
            for entry in list(self.checkpoints.iterdir()):
                if HALF.fullmatch(entry.name):
                    _remove(entry)
        except OSError as error:
            raise ValueError(f"folder {str(self.path)!r} cannot be written: {error.strerror}; give another") from error

    def result(self) -> dict[str, Any] | None:
        """What result.json says of a run that finished and whose last checkpoint is there; None otherwise."""
        try:
            result = read_object(self.path / "result.json")
        except ValueError:
            return None
        newest = latest(self.path)
        whole = newest is not None and result.get("step") == number_of(newest)
        return result if result.get("finished") is True and whole else None

    def rewind(self, step: int) -> None:
        """Removes the lines of metrics.jsonl after this step, and its last evaluation: the run writes them again."""
        kept = [line for line in self.records() if line["step"] <= step and not line.get("final")]
        if self.metrics.exists():
            write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def record(self, line: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl; what is not finite becomes null."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(line)) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that a kill cut short is left out."""
        try:
            lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return [record for line in lines if (record := _record(line)) is not None]

    def keep(self, half: Path, step: int) -> Path:
        """Puts a checkpoint that is written in its place, then removes the oldest beyond the recipe's number.

        The one with the best held-out bits per byte stays, however old it is.
        """
        final = self.place(step)
        put(half, final)
        older = set(checkpoints_of(self.path)[: -self.recipe.output.checkpoints])
        with suppress(OSError):  # one too many harms nobody, and goes with the next
            for path in older - {best(self.path)}:
                _remove(path)
        return final

    def place(self, step: int) -> Path:
        """Where the checkpoint of a step lies once it is whole."""
        return self.checkpoints / f"step-{step:08d}"

    def half(self, step: int) -> Path:
        """Where it lies while it is being written."""
        return self.checkpoints / f".saving-step-{step:08d}"

    def _holds_something_else(self) -> bool:
        """Anything beside what a run leaves that was killed before it wrote run.json."""
        names = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        names = {name for name in names if name != ".DS_Store" and not PARTIAL.fullmatch(name)}
        if names == {"checkpoints"} and self.checkpoints.is_dir():
            return any(self.checkpoints.iterdir())
        return bool(names)

    def _clear(self) -> None:
        """Removes a run but run.json, which `start` replaces: a kill leaves one that may be overwritten."""
        for path in checkpoints_of(self.path):
            _remove(path)
        for name in WRITTEN:
            (self.path / name).unlink(missing_ok=True)
        if (self.path / "tensorboard").is_dir():
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)

    def _refuse_another(self, saved: Mapping[str, Any]) -> None:
        other = difference(self.recipe, saved["recipe"])
        if other:
            raise ValueError(f"the run in {str(self.path)!r} has another recipe: {other}; give another folder (--out)")
        if saved["data"] != self.digest:
            raise ValueError(
                f"the data changed since the run in {str(self.path)!r} began; bring the old files back, or start in "
                "another folder (--out)"
            )


def read_run(folder: str | Path) -> dict[str, Any]:
    """What run.json of a folder says: "recipe", as JSON, and "data", a digest.

    Raises:
        ValueError: it cannot be read, or says something else.
    """
    file = Path(folder) / "run.json"
    written = read_object(file)
    if not is_a(written.get("data"), str) or not isinstance(written.get("recipe"), dict):
        raise ValueError(f"{str(file)!r} is damaged: it holds no recipe and data; start anew with --overwrite")
    if "keep" in written["recipe"]:  # as earlier releases called it
        written["recipe"]["output"] = written["recipe"].pop("keep")
    return written


def best(folder: str | Path) -> Path | None:
    """The checkpoint of a run with the fewest held-out bits per byte, the earliest of equals; None if none was measured."""
    measured = [(bits, number_of(p), p) for p in checkpoints_of(folder) if (bits := heldout_bits(p)) is not None]
    return min(measured)[2] if measured else None


def heldout_bits(checkpoint: Path) -> float | None:
    """Held-out bits per byte of the last evaluation before a checkpoint; None if there was none."""
    try:
        found = read_json(checkpoint / STATE)["progress"]["latest_heldout_bits"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if is_a(found, float) else None


def finite(value: Any) -> Any:
    """The same for JSON, which knows no infinity and no NaN: they become None."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remove(path: Path) -> None:
    """Removes a checkpoint; renamed first, so that a kill leaves no part of it under a whole one's name."""
    if path.is_symlink():
        path.unlink()
        return
    if STEP.fullmatch(path.name):
        path = path.rename(path.with_name(f".removing-{path.name}"))
    shutil.rmtree(path, ignore_errors=True)


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None  # the last line of a killed run
    known = isinstance(record, dict) and is_a(record.get("step"), int) and is_a(record.get("event"), str)
    return record if known else None
