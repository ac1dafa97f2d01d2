"""How far a run is, and what it came to."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from palimpsest.train.recipe import Recipe


@dataclass
class Progress:
    """How far a run is; part of every checkpoint, and the one thing that the loop changes besides model and optimiser.

    >>> Progress(step=50).share_of(steps=200, minutes=None)
    0.25
    >>> Progress(step=50, seconds=90).share_of(steps=200, minutes=2)
    0.75
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of wall time, over all parts of an interrupted run
    skipped: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def advance(self, num_tokens: int, *, skipped: bool) -> None:
        """One more step is done."""
        self.step, self.tokens = self.step + 1, self.tokens + num_tokens
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
    """What a run came to. An interrupted one goes on from `checkpoint` when it is resumed."""

    finished: bool
    checkpoint: Path
    progress: Progress
    heldout_bits_per_byte: float | None  # of the last and longest held-out text; None if interrupted
    compressors: dict[str, float]  # bits per byte of the same text

    def as_dict(self) -> dict[str, Any]:
        """As JSON would hold it."""
        return {
            "finished": self.finished,
            "checkpoint": str(self.checkpoint),
            **asdict(self.progress),
            "tokens_per_second": round(self.progress.tokens / max(self.progress.seconds, 1e-9), 1),
            "heldout_bits_per_byte": self.heldout_bits_per_byte,
            "compressors": self.compressors,
        }
