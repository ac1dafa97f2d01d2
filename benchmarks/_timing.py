"""What the GPU benchmarks share: inputs, contestants, clocks, results that survive an interruption."""

import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest import delta_rule, dplr, gated_delta, gated_linear_attention, gdn2, kda, linear_attention
from palimpsest.files import write_json
from palimpsest.machine import machine

HERE = Path(__file__).parent / "results"
GATES = ("fast", "slow")


@dataclass(frozen=True)
class Shape:
    """One workload: B sequences of T tokens, H heads of K = V channels."""

    B: int
    T: int
    H: int
    K: int = 128

    def __str__(self):
        return f"{self.B}x{self.T} H{self.H}" + (f" K{self.K}" if self.K != 128 else "")


def draw(shape: Shape, gates: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v, log_decay (fp32), beta. fast: the decays of a new layer with a floor of -5; slow: U(-0.01, 0)."""
    rng = torch.Generator("cuda").manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=rng, device="cuda")
    B, T, H, K = shape.B, shape.T, shape.H, shape.K
    q, k = (F.normalize(normal(B, T, H, K), dim=-1).to(dtype) for _ in range(2))
    x = normal(B, T, H, K)
    log_decay = -5 * x.sigmoid() if gates == "fast" else -0.01 * torch.special.ndtr(x)
    return q, k, normal(B, T, H, K).to(dtype), log_decay, normal(B, T, H).sigmoid().to(dtype)


def contestants() -> dict[str, Callable[..., Tensor]]:
    """Everything installed that computes KDA: name -> function of q, k, v, log_decay, beta that returns the output."""
    named = lambda backend: lambda *x: kda(*x, backend=backend).output
    found = {"hopper": named("hopper"), "triton": named("triton")}
    if fla := optional("fla.ops.kda"):
        found["FLA"] = lambda q, k, v, g, beta: fla.chunk_kda(q, k, v, g, beta, output_final_state=True)[0]
    if cudnn := optional("cudnn.linear_attention.ops"):
        found["cuDNN"] = lambda *x: through_cudnn(cudnn.kimi_delta_attention, *x)
    return found


@cache
def borders(B: int, T: int) -> Tensor:
    """Of B sequences of T tokens, end to end."""
    return torch.arange(0, B * T + 1, T, device="cuda", dtype=torch.int32)


def through_cudnn(run: Callable, q, k, v, g, beta) -> Tensor:
    """cuDNN's frontend takes tokens end to end and strengths in fp32."""
    flat = (x.flatten(0, 1) for x in (q, k, v, g, beta.float()))
    return run(*flat, borders(*q.shape[:2]), output_final_state=True)[0].view_as(v)


def relatives() -> dict[str, Callable[..., Tensor]]:
    """The paper's figure 2, extended: the same inputs through KDA, its baseline DPLR, cousins and softmax; FLA's if installed."""
    one_decay = lambda g: g[..., 0].contiguous()

    def general(run, q, k, v, g, beta):  # KDA written as a general transition
        return run(q, k, beta[..., None] * v, g.exp().to(k.dtype) * k, -beta[..., None] * k, g)[0]

    def softmax(q, k, v, g, beta):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)

    plain = dict(feature_map=lambda x: x, normalise=False)
    found = {
        "KDA": lambda *x: kda(*x)[0],
        "DPLR": partial(general, dplr),
        "Gated DeltaNet": lambda q, k, v, g, beta: gated_delta(q, k, v, one_decay(g), beta)[0],
        "Gated DeltaNet 2": lambda q, k, v, g, beta: gdn2(q, k, v, g, k.sigmoid(), v.sigmoid())[0],
        "DeltaNet": lambda q, k, v, g, beta: delta_rule(q, k, v, beta)[0],
        "GLA": lambda q, k, v, g, beta: gated_linear_attention(q, k, v, g)[0],
        "linear attention": lambda q, k, v, g, beta: linear_attention(q, k, v, **plain)[0],
        "softmax": softmax,
    }
    if fla := optional("fla.ops"):
        found |= {
            "FLA KDA": lambda *x: fla.chunk_kda(*x)[0],
            "FLA DPLR": partial(general, fla.chunk_dplr_delta_rule),
            "FLA Gated DeltaNet": lambda q, k, v, g, beta: fla.chunk_gated_delta_rule(q, k, v, one_decay(g), beta)[0],
            "FLA DeltaNet": lambda q, k, v, g, beta: fla.chunk_delta_rule(q, k, v, beta)[0],
            "FLA GLA": lambda q, k, v, g, beta: fla.chunk_gla(q, k, v, g)[0],
            "FLA linear attention": lambda q, k, v, g, beta: fla.chunk_linear_attn(q, k, v, normalize=False)[0],
        }
    return found


def optional(module: str):
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(module)
    except Exception:  # not installed, or something that it needs is not
        return None


def gpu_ms(call: Callable[[], object], seconds: float = 0.3, graph: bool = True) -> float:
    """Median milliseconds on the GPU between events, over replays of a captured graph where it can be captured.

    Calls follow one another without waiting, so that the GPU does not stand idle while the next is prepared.
    """
    call()
    torch.cuda.synchronize()
    run = call
    if graph:
        try:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                call()
            run = captured.replay
        except Exception:  # a contestant that waits for the GPU cannot be captured; it is timed as it is
            torch.cuda.synchronize()
    samples, began = [], time.perf_counter()
    while len(samples) < 10 or (time.perf_counter() - began < seconds and len(samples) < 200):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
        run()
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        events[-1].synchronize()
        samples += [start.elapsed_time(stop) for start, stop in itertools.pairwise(events)]
    return statistics.median(samples)


def host_us(call: Callable[[], object], calls: int = 30) -> float:
    """Microseconds until an eager call returns, the GPU being busy with earlier ones or not."""
    call()
    samples = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - began) / calls * 1e6)
    torch.cuda.synchronize()
    return min(samples)


def peak_mib(call: Callable[[], object]) -> float:
    """The most memory in use during the call beyond what was there before it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()  # what a call returns counts as its own
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak / 2**20


def relative_error(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


class Results:
    """Cells of a table, kept in a file after each one, so that an interrupted run goes on where it stopped."""

    def __init__(self, name: str, fresh: bool):
        if not torch.cuda.is_available():
            sys.exit(
                "this benchmark measures a CUDA device and none is visible; `python -m benchmarks.cpu` measures a CPU"
            )
        words = torch.cuda.get_device_name().split()  # "NVIDIA H100 80GB HBM3" is an h100
        self.folder = HERE / next((word for word in words if any(map(str.isdigit, word))), words[-1]).lower()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name, self.path = name, self.folder / f"{name}.json"
        self.cells: dict[str, dict] = {}
        self.measured = machine("cuda") | {"date": date.today().isoformat()}
        if self.path.exists() and not fresh:
            before = json.loads(self.path.read_text())
            self.cells, self.measured = before["cells"], before["machine"]
        self.began = time.perf_counter()

    def fill(self, keys: list[str], measure: Callable[[str], dict]) -> None:
        """Measure what is missing; a contestant that fails is recorded with its reason."""
        missing = [key for key in keys if key not in self.cells]
        for done, key in enumerate(missing):
            spent = time.perf_counter() - self.began
            left = spent / done * (len(missing) - done) if done else 0.0
            print(f"\r{done}/{len(missing)}  {key:60.60}  {left:5.0f} s left ", end="", file=sys.stderr, flush=True)
            try:
                self.cells[key] = measure(key)
            except Exception as error:
                self.cells[key] = {"failed": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
                torch.cuda.empty_cache()
            self.save()
        print("\r" + " " * 90 + "\r", end="", file=sys.stderr)

    def save(self) -> None:
        self.measured = machine("cuda") | {"date": date.today().isoformat()}
        write_json(self.path, {"machine": self.measured, "cells": self.cells}, indent=1)

    def table(self, rows: list[str], columns: list[str], show: Callable[[dict], str], title: str) -> str:
        """Markdown, or nothing if nothing is measured yet; the cell of row and column is kept under "row | column"."""
        if not any(f"{row} | {column}" in self.cells for row in rows for column in columns):
            return ""
        lines = [f"### {title}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row in rows:
            found = [self.cells.get(f"{row} | {column}", {}) for column in columns]
            cells = [x["failed"][:40] if "failed" in x else show(x) if x else "" for x in found]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def write(self, *tables: str) -> None:
        where = ", ".join(f"{name} {value}" for name, value in self.measured.items())
        text = "\n".join((f"`python -m benchmarks.{self.name}`: {where}\n", *filter(None, tables)))
        (self.folder / f"{self.name}.md").write_text(text)
        print(text)
