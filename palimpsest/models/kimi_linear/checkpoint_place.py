"""Where the weights are: a folder with a checkpoint is one, and a run's folder leads to its newest.

RUN/run.json                    a training run began here
RUN/checkpoints/step-00000200   a whole checkpoint
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

STEP = re.compile(r"step-(\d{8,})")  # a whole checkpoint


def is_run(folder: str | os.PathLike) -> bool:
    """Whether a training run began in this folder."""
    return (Path(folder) / "run.json").is_file()


def checkpoints_of(folder: str | os.PathLike) -> list[Path]:
    """The whole checkpoints of a run's folder, the oldest first; other names are nobody's business."""
    with suppress(OSError):
        entries = list((Path(folder) / "checkpoints").iterdir())
        return sorted((p for p in entries if STEP.fullmatch(p.name) and p.is_dir()), key=number_of)
    return []


def number_of(checkpoint: Path) -> int:
    """The step of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def latest(folder: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint of a run's folder; None before the first."""
    return (checkpoints_of(folder) or [None])[-1]


def checkpoint_of(folder: str | os.PathLike) -> Path:
    """The folder with the weights: itself, or a run's newest checkpoint.

    Raises:
        ValueError: a run without a checkpoint.
    """
    path = Path(folder)
    if not is_run(path):
        return path
    if (newest := latest(path)) is None:
        raise ValueError(f"the run in {str(folder)!r} has no checkpoint yet; train further, or wait for the first")
    return newest
