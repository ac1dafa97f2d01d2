"""Training: a recipe in, a run's folder out. Each name is loaded when first used; only `train` needs accelerate.

>>> from palimpsest.train import Recipe, train
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {  # name -> where it lives
    "CheckpointError": "checkpoints",
    "NonFiniteError": "checkpoints",
    "train": "loop",
    "Progress": "progress",
    "Result": "progress",
    "Data": "recipe",
    "Evaluate": "recipe",
    "NamedDataset": "recipe",
    "Optim": "recipe",
    "Output": "recipe",
    "Recipe": "recipe",
    "Schedule": "recipe",
    "TextFiles": "recipe",
    "load_recipe": "recipe",
    "override": "recipe",
    "best": "run_folder",
    "latest": "run_folder",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from palimpsest.train.checkpoints import CheckpointError as CheckpointError
    from palimpsest.train.checkpoints import NonFiniteError as NonFiniteError
    from palimpsest.train.loop import train as train
    from palimpsest.train.progress import Progress as Progress
    from palimpsest.train.progress import Result as Result
    from palimpsest.train.recipe import Data as Data
    from palimpsest.train.recipe import Evaluate as Evaluate
    from palimpsest.train.recipe import NamedDataset as NamedDataset
    from palimpsest.train.recipe import Optim as Optim
    from palimpsest.train.recipe import Output as Output
    from palimpsest.train.recipe import Recipe as Recipe
    from palimpsest.train.recipe import Schedule as Schedule
    from palimpsest.train.recipe import TextFiles as TextFiles
    from palimpsest.train.recipe import load_recipe as load_recipe
    from palimpsest.train.recipe import override as override
    from palimpsest.train.run_folder import best as best
    from palimpsest.train.run_folder import latest as latest


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'palimpsest.train' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"palimpsest.train.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
