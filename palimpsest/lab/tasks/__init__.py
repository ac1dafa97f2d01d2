"""Tasks whose answers are known by construction. Each is one file; read `task.py` first."""

from palimpsest.lab.tasks.induction import Induction
from palimpsest.lab.tasks.mqar import MQAR
from palimpsest.lab.tasks.needle import Needle
from palimpsest.lab.tasks.palindrome import Palindrome
from palimpsest.lab.tasks.selective_copy import SelectiveCopy
from palimpsest.lab.tasks.stack import Stack
from palimpsest.lab.tasks.state_tracking import StateTracking
from palimpsest.lab.tasks.task import IGNORED, Batch, Key, Task, describe
from palimpsest.lab.tasks.text import Text

TASKS = {
    "palindrome": Palindrome,
    "mqar": MQAR,
    "stack": Stack,
    "state_tracking": StateTracking,
    "needle": Needle,
    "selective_copy": SelectiveCopy,
    "induction": Induction,
    "text": Text,
}

__all__ = [
    "IGNORED",
    "TASKS",
    "Batch",
    "Key",
    "Task",
    "describe",
    *sorted(cls.__name__ for cls in TASKS.values()),
]
