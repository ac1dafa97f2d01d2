"""The machine, as results say it: one place for reports, benchmarks and `palimpsest info`."""

import importlib.metadata
import platform
from contextlib import suppress
from pathlib import Path

import torch

Facts = dict[str, str | int]


def machine(device: str = "cpu") -> Facts:
    """What a number that was measured here depends on.

    Args:
        device: "cpu", or a GPU such as "cuda" or "cuda:1".

    Returns: "gpu", or "cpu" and "threads"; the versions of torch, of Triton on a GPU, and of Python.

    >>> list(machine())
    ['cpu', 'threads', 'torch', 'python']
    """
    if device == "cpu":
        facts: Facts = {"cpu": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    else:
        facts = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__}
        with suppress(importlib.metadata.PackageNotFoundError):
            facts["triton"] = importlib.metadata.version("triton")
    return facts | {"python": platform.python_version()}


def in_words(facts: Facts) -> str:
    """The facts as a line of text.

    >>> in_words({"cpu": "AMD EPYC", "threads": 2, "torch": "2.13.0+cpu", "python": "3.12.1"})
    'CPU AMD EPYC, 2 threads, torch 2.13.0, Python 3.12.1'
    """
    what = facts.get("gpu") or f"CPU {facts['cpu']}, {facts['threads']} threads"
    triton = f", Triton {facts['triton']}" if "triton" in facts else ""
    return f"{what}, torch {str(facts['torch']).partition('+')[0]}{triton}, Python {facts['python']}"


def processor() -> str:
    """The processor's name, as Linux or else Python knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
