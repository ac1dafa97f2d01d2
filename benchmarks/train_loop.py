"""`palimpsest train` beside the bare step it repeats, on one GPU: what data, clipping, bookkeeping and logging cost.

    python -m benchmarks.train_loop [--steps 60]

The recipe is recipes/kimi_linear_100m.py: 64 x 2,048 packed tokens, Muon. The bare step is forward, backward and optimiser on
one batch that lies ready, in a process of its own; the loop's rate is that between its lines of metrics, the first ones
left out. Writes train_loop.json and train_loop.md to benchmarks/results/<gpu>.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks._timing import Results
from benchmarks.model import _Autocast
from palimpsest.models.kimi_linear import KimiLinearForCausalLM
from palimpsest.train import load_recipe
from palimpsest.train.captured import CapturedGradients
from palimpsest.train.data import Corpus
from palimpsest.train.optim import build_optimizer

RECIPE = "recipes/kimi_linear_100m.py"
SECONDS = 400  # of one cell


def bare() -> dict:
    """The step alone."""
    recipe = load_recipe(RECIPE)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = KimiLinearForCausalLM(recipe.model).train()
    model.compile_layers()
    optimizer = build_optimizer(model, recipe.optim, fused=True)
    optimizer.found_inf = torch.zeros((), device="cuda")
    (batch,), tokens = Corpus(recipe.data, recipe.seed).step(0, 0, 1)
    captured, batch = CapturedGradients(_Autocast(model)), batch.to(torch.device("cuda"))

    def step() -> None:
        captured(batch, first=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    samples = []
    for group in range(7):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        if group > 1:
            samples.append((time.perf_counter() - began) / 5)
    seconds = statistics.median(samples)
    return {"ms": seconds * 1e3, "tokens_per_second": tokens / seconds}


def loop(steps: int) -> dict:
    """All of `palimpsest train`, evaluation and checkpoints left to the end."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"steps": steps, "output.log_every": 5, "output.checkpoint_every": 10**6, "evaluate.every": 10**6}
        settings |= {"evaluate.final_max_bytes": 1 << 16, "evaluate.max_bytes": 1 << 16}
        command = [sys.executable, "-m", "palimpsest", "train", RECIPE, "--out", f"{folder}/run"]
        for name, value in settings.items():
            command += ["--set", f"{name}={value}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if line.get("event") == "train"]
    kept = rates[len(rates) // 3 :]
    recipe = load_recipe(RECIPE)
    tokens = recipe.data.batch_size * recipe.data.sequence_length
    return {"ms": tokens / statistics.median(kept) * 1e3, "tokens_per_second": statistics.median(kept), "lines": rates}


def measure(key: str, steps: int) -> dict:
    if key.endswith("palimpsest train"):
        return loop(steps)
    command = [sys.executable, "-m", "benchmarks.train_loop", "--bare"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of the run that is timed")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare()))
        return
    results, row, columns = (
        Results("train_loop", fresh=True),
        "100M, 64 x 2048 packed, Muon",
        ("bare step", "palimpsest train"),
    )
    results.fill([f"{row} | {column}" for column in columns], lambda key: measure(key, options.steps))
    found = [results.cells[f"{row} | {column}"] for column in columns]
    if all("ms" in cell for cell in found):
        found[1]["of_the_bare_step"] = found[0]["ms"] / found[1]["ms"]
        results.save()

    def show(cell: dict) -> str:
        share = f", {cell['of_the_bare_step']:.0%} of the bare step" if "of_the_bare_step" in cell else ""
        return f"{cell['ms']:.0f} ms, {cell['tokens_per_second'] / 1e3:.0f}k tok/s{share}"

    results.write(results.table([row], list(columns), show, "A step in the loop"))


if __name__ == "__main__":
    main()
