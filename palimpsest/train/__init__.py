"""Training: a recipe in, a run's folder out.

>>> from palimpsest.train import Recipe, train
"""

from palimpsest.train.checkpoints import CheckpointError, latest
from palimpsest.train.loop import NonFiniteError, train
from palimpsest.train.progress import Progress, Result
from palimpsest.train.recipe import (
    Data,
    Evaluate,
    NamedDataset,
    Optim,
    Output,
    Recipe,
    Schedule,
    TextFiles,
    load_recipe,
    override,
)

__all__ = [
    "CheckpointError",
    "Data",
    "Evaluate",
    "Output",
    "NamedDataset",
    "NonFiniteError",
    "Optim",
    "Progress",
    "Recipe",
    "Result",
    "Schedule",
    "TextFiles",
    "latest",
    "load_recipe",
    "override",
    "train",
]
