"""What several processes share: the accelerator, and the few numbers and sentences on which they must agree."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object

from palimpsest.parallel.watch import watching
from palimpsest.train.recipe import Recipe, difference_of


def start_accelerator(recipe: Recipe) -> Accelerator:
    """The accelerator of this process; several processes are started by `torchrun` or `accelerate launch`.

    Raises:
        ValueError: this machine cannot compute in the recipe's precision, the processes cannot reach each other, or the
            recipe's plan does not fit them.
    """
    # accelerate keeps one state per process; a second run in the same process may differ in precision or accumulation.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    cpu = not torch.accelerator.is_available()  # said aloud: without it, processes on CPUs do not find each other
    several = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        recipe.parallel.refuse(recipe.model, several)  # before anybody waits for anybody
    except ValueError as error:
        raise RefusedError(str(error)) from error
    if recipe.precision == "fp16" and cpu:
        raise ValueError("precision='fp16' needs a GPU; use bf16, or no for fp32")
    plan = recipe.parallel
    if recipe.precision == "fp16" and several > 1 and (plan.kind != "ddp" or plan.expert > 1):
        raise ValueError("precision='fp16' scales its loss, which goes with parallel.kind=ddp alone; use bf16")
    if several > 1 and not cpu and not dist.is_nccl_available():
        raise ValueError(
            "several GPUs need NCCL, which this build of torch lacks; install torch with CUDA, or use one GPU"
        )
    try:
        PartialState(cpu=cpu)
    except (RuntimeError, OSError) as error:  # of torch.distributed: a port in use, an address that nobody answers
        first = str(error).strip().splitlines()[0]
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise ValueError(
            f"the {several} processes do not find each other at {where} ({first}); give another port "
            "(torchrun --master_port, or --standalone on one host)"
        ) from error
    return Accelerator(cpu=cpu, mixed_precision=recipe.precision)


def agree(accelerator: Accelerator, *numbers: float) -> tuple[float, ...]:
    """The largest of each number over the processes: what all act on, so that none acts alone."""
    if accelerator.num_processes == 1:
        return numbers
    mine = torch.tensor(numbers, dtype=torch.float64, device=accelerator.device)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return tuple(mine.tolist())


def total(accelerator: Accelerator, value: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over the processes."""
    if accelerator.num_processes == 1:
        return value
    value = value.to(accelerator.device, copy=True)
    dist.all_reduce(value, op=dist.ReduceOp.SUM)
    return value


class RefusedError(ValueError):
    """What is wrong in one of several processes, said by the first of them; the others leave without a word."""


class LostError(ValueError):
    """Another process of the job is gone."""


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Within it, this process ends if another one is gone, in a minute at most, with a sentence.

    Raises:
        LostError: another process is gone, and the backend noticed.
    """
    try:
        with watching():
            yield
    except (dist.DistError, RuntimeError) as error:
        lost = isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "store"))
        if accelerator.num_processes == 1 or not lost:
            raise
        raise LostError(
            f"another of the {accelerator.num_processes} processes is gone: the connection to it broke; go on from the last "
            "checkpoint with --resume"
        ) from error


def settle(accelerator: Accelerator, problem: Exception | None, **facts: Any) -> None:
    """Goes on in all processes or in none: where one has a problem, or facts that differ, all raise the same sentence.

    Args:
        problem: what this process cannot do; None if all is well.
        facts: what must be the same everywhere, as plain values.

    Raises:
        Exception: the problem itself, if this process is alone.
        RefusedError: a process has a problem, or its facts differ from the first one's.
    """
    if accelerator.num_processes == 1:
        if problem is not None:
            raise problem
        return
    said: list[tuple[str | None, dict[str, Any]]] = gather_object([(None if problem is None else str(problem), facts)])
    for process, (sentence, _) in enumerate(said):
        if sentence is not None:
            same = [i for i, (other, _) in enumerate(said) if other == sentence]
            who = "" if len(same) == len(said) else f" (process {process} of {len(said)})"
            raise RefusedError(sentence + who) from problem
    for process, (_, theirs) in enumerate(said):
        for name, value in theirs.items():
            first = said[0][1][name]
            if value != first:
                what = difference_of(value, first) if isinstance(value, dict) else f"{value!r}, {first!r}"
                raise RefusedError(
                    f"process {process} has another {name} than process 0 ({what}); start all with the same"
                )
