"""How far a run is, and what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from palimpsest.checks import check, check_fields
from palimpsest.train.recipe import Recipe


@dataclass
class Progress:
    """How far a run is; part of every checkpoint, and the one thing that the loop changes besides model and optimiser.

    Attributes:
        step: optimiser steps done.
        tokens: read by them, over all processes.
        seconds: of wall time, over all parts of an interrupted run.
        skipped: steps whose gradient was not finite.
        skipped_in_a_row: of these, the last ones without a finite one between.
        latest_heldout_bits: per byte, of the last evaluation along the way; None before the first, and if it was not finite.

    >>> Progress(step=50).share_of(steps=200, minutes=None)
    0.25
    >>> Progress(step=50, seconds=90).share_of(steps=200, minutes=2)
    0.75
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    latest_heldout_bits: float | None = None

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Progress:
        """The progress that a checkpoint holds; raises ValueError if it is none."""
        names = {field.name for field in fields(cls)}
        check(isinstance(saved, Mapping) and saved.keys() == names, "its progress has other fields")
        progress = cls(**saved)
        check_fields(progress, "progress.")
        numbers = (progress.step, progress.tokens, progress.seconds, progress.skipped, progress.skipped_in_a_row)
        check(min(numbers) >= 0, "its progress is negative")
        return progress

    def advance(self, num_tokens: int) -> None:
        """One more step is begun."""
        self.step, self.tokens = self.step + 1, self.tokens + num_tokens

    def count(self, *, skipped: bool) -> None:
        """One more step has come to its end; on a GPU that is known some steps later."""
        self.skipped, self.skipped_in_a_row = self.skipped + skipped, self.skipped_in_a_row + 1 if skipped else 0

    def share_of(self, steps: int, minutes: float | None) -> float:
        """How much of a run is done, 0 to 1: by steps or by minutes, whichever is further."""
        by_time = self.seconds / 60 / minutes if minutes else 0.0
        return min(max(self.step / steps, by_time), 1.0)

    def share(self, recipe: Recipe) -> float:
        """How much of the recipe's run is done."""
        return self.share_of(recipe.steps, recipe.minutes)


@dataclass(frozen=True)
class Result:
    """What a run came to. An interrupted one goes on from `checkpoint` when it is resumed.

    Attributes:
        finished: it came to its end; False if it was interrupted.
        checkpoint: the newest.
        progress: how far it came.
        heldout_bits_per_byte: of the last and longest held-out text; None if interrupted, or not finite.
        compressors: bits per byte of the same text, by name.
        best: the checkpoint with the fewest held-out bits per byte along the way, if it is not the newest.
    """

    finished: bool
    checkpoint: Path
    progress: Progress
    heldout_bits_per_byte: float | None
    compressors: dict[str, float]
    best: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return {
            "finished": self.finished,
            "checkpoint": str(self.checkpoint),
            "best": None if self.best is None else str(self.best),
            **asdict(self.progress),
            "tokens_per_second": round(self.progress.tokens / max(self.progress.seconds, 1e-9), 1),
            "heldout_bits_per_byte": self.heldout_bits_per_byte,
            "compressors": self.compressors,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], checkpoint: Path, best: Path | None) -> Result | None:
        """What `as_dict` gave, its checkpoints as they lie now; None if it is damaged."""
        try:
            progress = Progress.from_dict({field.name: saved[field.name] for field in fields(Progress)})
            result = cls(True, checkpoint, progress, saved["heldout_bits_per_byte"], dict(saved["compressors"]), best)
            check_fields(result)
            check(all(isinstance(bits, int | float) for bits in result.compressors.values()), "no numbers")
        except (ValueError, KeyError, TypeError):
            return None
        return result
