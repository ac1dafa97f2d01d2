"""Training steps on two GPUs and more beside one of them: copies, shards, dealt experts, shared contexts.

    python -m benchmarks.parallel [--rows NAME ...] [--processes 2] [--tiny]

Spawns its processes. A row is a whole step, forward, backward, clipping and optimiser, with the same rows on each GPU as on
the one; the one is measured by the same process on the same card in the same run. Median of groups of steps that follow
one another. --tiny runs the same on a CPU with tiny shapes, to see that it does. Writes parallel.json and parallel.md to
benchmarks/results/<gpu>.
"""

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

from palimpsest.machine import in_words, machine
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.parallel import Plan, make_mesh, parallelize
from palimpsest.parallel.gradients import Gradients, copies
from palimpsest.train import Optim, load_recipe
from palimpsest.train.captured import CapturedGradients
from palimpsest.train.data import Batch
from palimpsest.train.optim import build_optimizer

SECONDS = 150  # of one row, what it compiles included
Row = Callable[[argparse.Namespace], dict[str, Any]]


class Autocast(nn.Module):
    """As `palimpsest train` runs a model: in bf16 by autocast."""

    def __init__(self, model: nn.Module, device: str):
        super().__init__()
        self.model, self.device = model, device

    def forward(self, *args, **kwargs):
        with torch.autocast(self.device, torch.bfloat16):
            return self.model(*args, **kwargs)


def config_of(name: str, tiny: bool) -> KimiLinearConfig:
    if tiny:
        return KimiLinearConfig.tiny("KM", num_experts=4 if name != "1.4B dense" else 0)
    if name == "172M mixture":
        return KimiLinearConfig.medium()
    return load_recipe("recipes/kimi_linear_1b.py" + (":mixture" if name == "2B mixture" else "")).model


class Run:
    """A model under a plan, and its step.

    Args:
        plan: None for one process by itself.
        capture: forward and backward as one CUDA graph.
    """

    def __init__(self, name: str, plan: Plan | None, arguments: argparse.Namespace, *, capture: bool):
        self.device = "cpu" if arguments.tiny else "cuda"
        torch.manual_seed(0)
        config = config_of(name, arguments.tiny)
        with torch.device(self.device):
            self.model = KimiLinearForCausalLM(config).train()
        mesh = make_mesh(plan, self.device) if plan is not None else None
        plan = plan or Plan(data=1)
        self.spread = parallelize(self.model, mesh, plan, compile=not arguments.tiny)
        B, T = (2, 64) if arguments.tiny else (arguments.batch.get(name, 8), 2048)
        rng = torch.Generator().manual_seed(dist.get_rank())
        ids = torch.randint(config.vocab_size, (B, T), generator=rng)
        self.part = Batch(ids, ids, None, 1.0)
        self.part = self.part if arguments.tiny else self.part.pinned()
        self.forward = Autocast(self.model, self.device)
        self.captured = CapturedGradients(self.forward) if capture and not arguments.tiny else None
        self.gradients = self.optimizer = None
        self.tokens = B * T

    def for_step(self, kind: str) -> Callable[[], torch.Tensor]:
        """A step with an optimiser of this kind, beside the other processes."""
        self.gradients = gradients = self.gradients or Gradients(self.model, self.spread)
        shared = copies(self.model, self.spread)
        optimizer = build_optimizer(self.model, Optim(kind=kind, lr=1e-4), fused=self.device == "cuda", copies=shared)

        def step() -> torch.Tensor:
            loss = self.captured(self.part, first=True) if self.captured else None
            if loss is None:
                ids = self.part.tokens.to(self.device, non_blocking=True)
                loss = self.forward(ids, labels=ids).loss
                loss.backward()
            gradients.sum_()
            norm = gradients.clip_(1.0)
            optimizer.found_inf = (~norm.isfinite()).float() if self.device == "cuda" else None
            optimizer.step()
            if gradients.keeps:
                gradients.zero_()
            else:
                optimizer.zero_grad(set_to_none=self.captured is None)
            return torch.stack((loss.detach().float(), norm.float()))

        return step


def milliseconds(
    step: Callable[[], torch.Tensor], device: str, groups: int = 3, steps: int = 4
) -> tuple[float, list[float]]:
    """Median wall-clock of a step, all processes together; and the first step's loss and norm."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    first = step().tolist()
    step()
    samples = []
    for _ in range(groups):
        wait()
        dist.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        samples.append((time.perf_counter() - began) / steps * 1e3)
    return statistics.median(samples), first


def copies_beside_one(
    name: str, arguments: argparse.Namespace, kinds: tuple[str, ...] = ("muon", "adamw")
) -> dict[str, Any]:
    """Copies: the model's graph is the same with and without the others, so one model serves both."""
    run, found = Run(name, Plan(), arguments, capture=True), {}
    for kind in kinds:
        many, told = milliseconds(run.for_step(kind), run.device)
        gc.collect()
        one, alone = milliseconds(step_alone(run, kind), run.device)
        found[kind] = row_of(run, one, many, told, alone)
        found[kind] |= parts(run, kind)
    return found


def step_alone(run: Run, kind: str) -> Callable[[], torch.Tensor]:
    """The same step without the others: no sum over processes, and the whole of Muon's work here."""
    gradients = run.gradients
    optimizer = build_optimizer(run.model, Optim(kind=kind, lr=1e-4), fused=run.device == "cuda")

    def step() -> torch.Tensor:
        loss = run.captured(run.part, first=True) if run.captured else None
        if loss is None:
            ids = run.part.tokens.to(run.device)
            loss = run.forward(ids, labels=ids).loss
            loss.backward()
        norm = gradients.clip_(1.0)
        optimizer.found_inf = (~norm.isfinite()).float() if run.device == "cuda" else None
        optimizer.step()
        gradients.zero_()
        return torch.stack((loss.detach().float(), norm.float()))

    return step


def parts(run: Run, kind: str) -> dict[str, float]:
    """Milliseconds of what a step is made of, each by itself: gradients, their sum, the optimiser's step."""
    if run.device == "cpu":
        return {}
    optimizer = build_optimizer(run.model, Optim(kind=kind, lr=1e-4), fused=True, copies=copies(run.model, run.spread))

    def clock(what: Callable[[], Any]) -> float:
        what()
        torch.cuda.synchronize()
        dist.barrier()
        began = time.perf_counter()
        for _ in range(3):
            what()
        torch.cuda.synchronize()
        return round((time.perf_counter() - began) / 3 * 1e3, 2)

    def backward():
        if run.captured:
            run.captured(run.part, first=True)
        else:
            ids = run.part.tokens.cuda()
            run.forward(ids, labels=ids).loss.backward()

    found = {
        "gradients_ms": clock(backward),
        "sum_ms": clock(run.gradients.sum_),
        "clip_ms": clock(lambda: run.gradients.clip_(1.0)),
    }
    return found | {
        "optimizer_ms": clock(optimizer.step),
        "memory_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


def row_of(run: Run, one: float, many: float, told: list[float], alone: list[float]) -> dict[str, Any]:
    n = dist.get_world_size()
    return {
        "one_ms": round(one, 2), "many_ms": round(many, 2), "ratio": round(n * one / many, 3),
        "one_tokens_per_second": round(run.tokens / one * 1e3), "many_tokens_per_second": round(n * run.tokens / many * 1e3),
        "loss_norm": told, "loss_norm_alone": alone,
    }  # fmt: skip


def other_plan(
    name: str, plan: Plan, arguments: argparse.Namespace, one: dict[str, Any] | None, kinds=("muon", "adamw")
):
    """A plan that needs a model of its own; one: what one GPU took, if an earlier row of this run knows it."""
    found: dict[str, Any] = {}
    if one is None:
        run = Run(name, Plan(), arguments, capture=True)
        run.for_step("muon")
        one = {kind: (*milliseconds(step_alone(run, kind), run.device), run) for kind in kinds}
        one = {kind: {"one_ms": ms, "loss_norm_alone": alone} for kind, (ms, alone, _) in one.items()}
        del run
        clear()
    run = Run(name, plan, arguments, capture=False)
    for kind in kinds:
        many, told = milliseconds(run.for_step(kind), run.device)
        found[kind] = row_of(run, one[kind]["one_ms"], many, told, one[kind]["loss_norm_alone"]) | parts(run, kind)
    return found


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def rows(arguments: argparse.Namespace, known: dict[str, Any]) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> what measures it, in the order of the run; `known` holds the rows before."""
    table = {
        "ddp 172M": lambda: copies_beside_one("172M mixture", arguments),
        "ddp 1.4B": lambda: copies_beside_one("1.4B dense", arguments),
        "fsdp 1.4B": lambda: other_plan("1.4B dense", Plan(kind="fsdp"), arguments, known.get("ddp 1.4B")),
        "experts 2B": lambda: other_plan("2B mixture", Plan(expert=arguments.processes), arguments, None),
    }
    with contextlib.suppress(ImportError):  # rows of shared contexts live in a file of their own
        table |= import_module("benchmarks.parallel_context").rows(arguments)
    return table


def work(rank: int, arguments: argparse.Namespace, port: int) -> None:
    """One process: all rows, the first process writing what came of each."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(arguments.processes), "LOCAL_WORLD_SIZE": str(arguments.processes)}
    faulthandler.enable()
    if arguments.tiny:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=arguments.processes)
    else:
        torch.cuda.set_device(rank)
        torch.backends.cuda.matmul.allow_tf32 = True
        dist.init_process_group("nccl", rank=rank, world_size=arguments.processes, device_id=torch.device("cuda", rank))
    known: dict[str, Any] = {}
    for name, measure in rows(arguments, known).items():
        if arguments.rows and not any(part in name for part in arguments.rows):
            continue
        began, over = time.perf_counter(), threading.Timer(arguments.seconds, give_up, (name, rank))
        over.daemon = True
        over.start()
        try:
            known[name] = measure() | {"seconds": round(time.perf_counter() - began, 1)}
        except Exception as error:  # the rows after it may still run, if all processes fail alike
            known[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            traceback.print_exc()
        over.cancel()
        clear()
        if rank == 0:
            print(name, json.dumps(known[name]), flush=True)
            write(known, arguments)
    dist.destroy_process_group()


def give_up(name: str, rank: int) -> None:
    """Ends a process whose row hangs: what was measured before is on disk."""
    print(f"{name}: process {rank} was not done in time", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(3)


def write(known: dict[str, Any], arguments: argparse.Namespace) -> None:
    """parallel.json and the table of it."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = machine("cpu" if arguments.tiny else "cuda")
    said = {
        "command": "python -m benchmarks.parallel",
        "machine": facts,
        "processes": arguments.processes,
        "date": time.strftime("%Y-%m-%d"),
    }
    (arguments.out / "parallel.json").write_text(json.dumps(said | {"rows": known}, indent=1) + "\n")
    lines = [f"{arguments.processes} x {in_words(facts)}, {said['date']}; `{said['command']}`.", ""]
    lines += ["| row | optimiser | one, ms | all, ms | times one | tokens/s |", "|---|---|---|---|---|---|"]
    for name, row in known.items():
        for kind, x in row.items():
            if isinstance(x, dict) and "ratio" in x:
                lines.append(
                    f"| {name} | {kind} | {x['one_ms']} | {x['many_ms']} | {x['ratio']} | {x.get('many_tokens_per_second', '')} |"
                )
        if "error" in row:
            lines.append(f"| {name} | | | | failed: {row['error'][:80]} | |")
    (arguments.out / "parallel.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=[], help="parts of the names of rows to run; all if none is given")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of one row")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    arguments.batch = {"172M mixture": 16}
    if arguments.out is None:
        name = "cpu" if arguments.tiny else torch.cuda.get_device_name().split()[1].lower()
        arguments.out = Path(__file__).parent / "results" / name
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(work, (arguments, port), nprocs=arguments.processes)


if __name__ == "__main__":
    main()
