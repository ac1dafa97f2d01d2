"""Whole models on one GPU: a training step of ours beside transformers' native model, with and without FLA.

    python -m benchmarks.model [--fresh] [--only PATTERN ...] [--together]

Every cell runs in a process of its own: random weights, random tokens, bf16 by autocast, AdamW, medians of wall-clock steps
after the warm-up. With --together all cells compile and tune side by side, on as many processors as there are, and are then
timed one by one while the others wait: much sooner done, if the GPU's memory holds them all. MFU counts 6 operations a
parameter at work and token, over 790 TFLOP/s, a measured bf16 product of 8192^3. Writes model.json, model.md and model.png to
benchmarks/results/<gpu>; what fails is recorded with its reason.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from benchmarks._timing import Results
from palimpsest.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.train import load_recipe
from palimpsest.train.captured import CapturedGradients
from palimpsest.train.data import Batch

PEAK = 790e12  # bf16 operations a second
SECONDS = 240  # of one cell


class Training(NamedTuple):
    """One workload: B sequences of T tokens a step."""

    model: str
    B: int
    T: int

    def __str__(self):
        return f"{self.model}, {self.B} x {self.T}"


MODELS: dict[str, Callable[[], KimiLinearConfig]] = {
    "172M mixture": KimiLinearConfig.medium,
    "114M dense": lambda: KimiLinearConfig.medium(num_experts=0),
    "1.4B dense": lambda: load_recipe("recipes/kimi_linear_1b.py").model,
    "2B mixture": lambda: load_recipe("recipes/kimi_linear_1b.py:mixture").model,
}
TRAINING = {
    str(work): work
    for work in (
        Training("172M mixture", 16, 2048),
        Training("172M mixture", 4, 2048),
        Training("114M dense", 16, 2048),
        Training("1.4B dense", 8, 2048),
        Training("2B mixture", 8, 2048),
    )
}
CONTESTANTS = ("palimpsest", "palimpsest, not compiled", "transformers + FLA", "transformers")
BESIDE_OTHERS = ("172M mixture, 4 x 2048", "114M dense, 16 x 2048")


def active_parameters(config: KimiLinearConfig, model: nn.Module) -> float:
    """Those that work on one token."""
    total = sum(p.numel() for p in model.parameters())
    if not config.num_experts:
        return total
    layers = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    one = 3 * config.hidden_size * config.moe_intermediate_size
    return total - layers * one * (config.num_experts - config.num_experts_per_token)


def build(name: str, contestant: str) -> tuple[KimiLinearConfig, nn.Module, Callable[[torch.Tensor], object]]:
    """The config, the model, and what adds the gradient of its loss on tokens."""

    def backward_of(loss_of):
        def gradients(ids):
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of(ids)
            loss.backward()

        return gradients

    config = MODELS[name]()
    if contestant.startswith("palimpsest"):
        with torch.device("cuda"):
            model = KimiLinearForCausalLM(config).train()
        if contestant == "palimpsest":  # as `palimpsest train` runs it: layers compiled, then one graph
            model.compile_layers()
            captured = CapturedGradients(_Autocast(model))
            return config, model, lambda ids: captured(Batch(ids, ids, None, 1.0), first=True)
        return config, model, backward_of(lambda ids: model(ids, labels=ids).loss)
    if contestant == "transformers":
        sys.modules["fla"] = None  # type: ignore[assignment]  # as if it were not installed
    else:
        import fla  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM

    official = config.to_dict()
    theirs = AutoConfig.for_model(**{k: v for k, v in official.items() if k != "architectures"})
    with torch.device("cuda"):
        other = AutoModelForCausalLM.from_config(theirs).train()
    return config, other, backward_of(lambda ids: other(ids, labels=ids, use_cache=False).loss)


class _Autocast(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        with torch.autocast("cuda", torch.bfloat16):
            return self.model(*args, **kwargs)


def training_step(work: Training, contestant: str, ready: Callable[[], None] = lambda: None) -> dict:
    """ready: called after the warm-up; returns when the GPU is this cell's alone."""
    torch.manual_seed(0)
    config, model, gradients = build(work.model, contestant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(config.vocab_size, (work.B, work.T), device="cuda")

    def step() -> None:
        gradients(ids)
        optimizer.step()
        optimizer.zero_grad(set_to_none=contestant != "palimpsest")

    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    ready()
    samples = []
    for _ in range(5):  # groups of steps that follow one another, as in training
        began = time.perf_counter()
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - began) / 3)
    seconds = statistics.median(samples)
    active = active_parameters(config, model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = sum(event.self_device_time_total for event in profile.key_averages())
    return {
        "ms": seconds * 1e3,
        "tokens_per_second": work.B * work.T / seconds,
        "mfu": 6 * active * work.B * work.T / seconds / PEAK,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "busy": min(kernels / 1e6 / seconds, 1.0),
        "first_step_seconds": first,
    }


def measure(key: str) -> dict:
    """One cell, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.model", "--cell", key]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def wait_to_be_told() -> None:
    """As a cell among others."""
    print("ready", flush=True)
    sys.stdin.readline()


def prepared_together(keys: list[str]) -> dict[str, Callable[[str], dict]]:
    """Start all cells; once each is ready or over its time, what measures a cell when its turn comes."""
    command = [sys.executable, "-m", "benchmarks.model", "--together", "--cell"]
    # Not pipes: one that nobody empties would stop who writes to it.
    notes = {key: tempfile.TemporaryFile("w+") for key in keys}  # noqa: SIM115  # the cells keep them open
    cells = {
        key: subprocess.Popen(
            [*command, key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=notes[key], text=True
        )
        for key in keys
    }
    until, failed = time.monotonic() + SECONDS, {}

    def last_word(key: str) -> str:
        notes[key].seek(0)
        return (notes[key].read().strip().splitlines() or ["no word"])[-1]

    def await_word(key: str) -> None:
        out = cells[key].stdout
        assert out is not None
        if not any(line.strip() == "ready" for line in out):
            failed.setdefault(key, last_word(key))

    waiting = {key: threading.Thread(target=await_word, args=(key,), daemon=True) for key in keys}
    for thread in waiting.values():
        thread.start()
    for key, thread in waiting.items():
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            failed[key] = f"not ready after {SECONDS} seconds"
            cells[key].kill()

    def turn(key: str) -> dict:
        if key in failed:
            raise RuntimeError(failed[key])
        out, _ = cells[key].communicate("go\n", timeout=SECONDS)
        if cells[key].returncode:
            raise RuntimeError(last_word(key))
        return json.loads(out.strip().splitlines()[-1])

    return dict.fromkeys(keys, turn)


def show(cell: dict) -> str:
    return (
        f"{cell['ms']:.0f} ms, {cell['tokens_per_second'] / 1e3:.0f}k tok/s, MFU {cell['mfu']:.0%}, "
        f"busy {cell['busy']:.0%}, {cell['peak_gib']:.1f} GiB"
    )


def draw_figure(results: Results) -> None:
    """Tokens a second, a group of bars a workload."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    measured = {key for key, cell in results.cells.items() if "ms" in cell}
    rows = [row for row in TRAINING if any(f"{row} | {c}" in measured for c in CONTESTANTS)]
    shown = [c for c in CONTESTANTS if any(f"{row} | {c}" in measured for row in rows)]
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / max(len(shown), 1)
    for at, contestant in enumerate(shown):
        cells = [results.cells.get(f"{row} | {contestant}", {}) for row in rows]
        heights = [cell.get("tokens_per_second", 0) / 1e3 for cell in cells]
        bars = axes.bar([x + at * width for x in range(len(rows))], heights, width, label=contestant)
        axes.bar_label(bars, [f"{h:.0f}" if h else "" for h in heights], fontsize=7)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(rows))], rows, fontsize=8)
    axes.set_ylabel("thousand tokens a second")
    axes.set_title(f"A training step on one {results.measured.get('gpu', 'GPU')}")
    axes.legend(fontsize=8)
    figure.savefig(results.folder / "model.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument(
        "--only", metavar="PATTERN", nargs="*", default=[""], help="cells whose name one of these matches"
    )
    parser.add_argument("--again", action="store_true", help="measure these cells again, and keep the others")
    parser.add_argument("--together", action="store_true", help="prepare all cells at once, then time one by one")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        row, contestant = options.cell.split(" | ")
        ready = wait_to_be_told if options.together else lambda: None
        print(json.dumps(training_step(TRAINING[row], contestant, ready)))
        return
    results = Results("model", options.fresh)
    cells = [f"{row} | {c}" for row in TRAINING for c in CONTESTANTS if c == "palimpsest" or row in BESIDE_OTHERS]
    chosen = [cell for cell in cells if any(re.search(pattern, cell) for pattern in options.only)]
    for cell in chosen if options.again else []:
        results.cells.pop(cell, None)
    missing = [cell for cell in chosen if cell not in results.cells]
    together = prepared_together(missing) if options.together else {}
    results.fill(chosen, lambda key: together.get(key, measure)(key))
    results.write(results.table(list(TRAINING), list(CONTESTANTS), show, "A training step"))
    draw_figure(results)


if __name__ == "__main__":
    main()
