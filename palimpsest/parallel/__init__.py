"""Training beyond one GPU, on torch.distributed: which process holds what, and what they tell each other.

>>> from palimpsest.parallel import Plan
>>> Plan(expert=2).sizes(8)
{'data': 4, 'expert': 2, 'context': 1}

Reading order: plan.py, which is the table of the axes; spread.py, which applies a plan; dealt_experts.py; context.py.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "Plan": "plan",
    "SequenceSplit": "context",
    "Spread": "spread",
    "layout_of": "context",
    "make_mesh": "plan",
    "parallelize": "spread",
    "share": "context",
    "split_sequence": "context",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from palimpsest.parallel.context import SequenceSplit as SequenceSplit
    from palimpsest.parallel.context import layout_of as layout_of
    from palimpsest.parallel.context import share as share
    from palimpsest.parallel.context import split_sequence as split_sequence
    from palimpsest.parallel.plan import Plan as Plan
    from palimpsest.parallel.plan import make_mesh as make_mesh
    from palimpsest.parallel.spread import Spread as Spread
    from palimpsest.parallel.spread import parallelize as parallelize


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'palimpsest.parallel' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"palimpsest.parallel.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
