"""KDA on this CPU against everything else that runs here: one process, round robin, medians.

    python -m benchmarks.cpu                    the whole table; continues where an interrupted run stopped
    python -m benchmarks.cpu --quick            small shapes only, about a minute
    python -m benchmarks.cpu --only memory      one of: forward, training, decode, memory, model
    python -m benchmarks.cpu --threads 1        on a machine that others use too

Writes cpu.json (every sample), cpu.md (tables) and cpu.png to benchmarks/results/cpu. The machine's speed
drifts, so the figures to trust are ratios inside one cell, whose contestants took turns; `ratio` is the time over that
of the first contestant. A contestant whose one call takes longer than --patience seconds is timed once, and left out
of longer sequences.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest import KimiLinearConfig, KimiLinearForCausalLM, kda, kda_step_
from palimpsest.files import write_json
from palimpsest.generate import generate
from palimpsest.machine import Facts, machine

SHAPES = ((4, 64), (8, 128))  # heads, channels of key and value
LENGTHS = (256, 1024, 4096, 16384)
BATCHES = (1, 4, 16)  # of decoding
HERE = Path(__file__).parent / "results" / "cpu"


# ---- who runs ----


def draw(B: int, T: int, H: int, D: int) -> tuple[Tensor, ...]:
    """q, k, v, log_decay, beta with unit keys and the decays of a newly initialised Kimi layer."""
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=rng)
    step = torch.exp(torch.empty(H, D).uniform_(-6.9, -2.3, generator=rng))
    rate = torch.empty(H, 1).uniform_(1, 16, generator=rng)
    log_decay = -rate * F.softplus(normal(B, T, H, D) + step + torch.log(-torch.expm1(-step)))
    q, k = F.normalize(normal(B, T, H, D), dim=-1), F.normalize(normal(B, T, H, D), dim=-1)
    return q, k, normal(B, T, H, D), log_decay, normal(B, T, H).sigmoid()


def whole_sequences() -> dict[str, Callable[..., Tensor]]:
    """Contestants that take q, k, v, log_decay, beta and return the output."""
    named = lambda backend: lambda *x: kda(*x, backend=backend).output
    contestants = {"C kernel": named("cpu"), "torch form": named("chunked"), "token loop": named("reference")}
    if model := optional("transformers.models.kimi_linear.modeling_kimi_linear"):
        contestants["transformers"] = lambda *x: model.chunk_kimi_delta_attention(*x, output_final_state=True)[0]
    if naive := optional("fla.ops.kda.naive"):
        contestants["FLA naive chunk"] = lambda *x: naive.naive_chunk_kda(*x, output_final_state=True)[0]
    attend = lambda *x: F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in x[:3]), is_causal=True)
    return {**contestants, "SDPA (softmax)": attend}


def one_token(B: int, H: int, D: int) -> dict[str, Callable[[], Tensor]]:
    q, k, v, log_decay, beta = (x[:, 0] for x in draw(B, 1, H, D))
    memories = {name: torch.zeros(B, H, D, D) for name in ("cpu", "chunked", "reference", "transformers")}
    named = lambda name: lambda: kda_step_(q, k, v, log_decay, beta, memories[name], backend=name)
    contestants = {"C kernel": named("cpu"), "torch form": named("chunked")}
    if model := optional("transformers.models.kimi_linear.modeling_kimi_linear"):
        sequence = [x[:, None] for x in (q, k, v, log_decay, beta)]
        contestants["transformers"] = lambda: model.recurrent_kimi_delta_attention(
            *sequence, initial_state=memories["transformers"], output_final_state=True
        )[0]
    return contestants


def optional(module: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


# ---- how they are timed ----


def with_backward(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def run(*inputs: Tensor):
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = function(*leaves)
        return torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

    return run


def round_robin(contestants: dict[str, Callable[[], object]], rounds: int, patience: float) -> dict[str, list[float]]:
    """Seconds of each call; the first call of each is not counted unless it is the only one that patience allows."""
    samples: dict[str, list[float]] = {}
    for name, run in contestants.items():
        samples[name] = [timed(run)]
    quick = [name for name, first in samples.items() if first[0] <= patience]
    for name in quick:
        samples[name] = []
    for _ in range(rounds):
        for name in quick:
            samples[name].append(timed(contestants[name]))
    return samples


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_of(function: Callable[..., object], inputs: tuple[Tensor, ...]) -> float:
    """Megabytes that a call needs beyond its inputs, at its peak. For a process of its own."""
    function(*(x[:, :64] for x in inputs))  # load what is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
    before = _status("VmRSS")
    function(*inputs)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


# ---- the cells of the table ----


def cells(quick: bool) -> dict[str, tuple]:
    """Every cell by its name: (section, sizes ...)."""
    lengths = LENGTHS[:2] if quick else LENGTHS
    plan = [(section, T, H, D) for section in ("forward", "training") for H, D in SHAPES for T in lengths]
    plan += [("decode", B, H, D) for H, D in SHAPES for B in BATCHES]
    plan += [("memory", T, 8, 128) for T in (1024,) + (() if quick else (4096,))]
    plan += [("model", 2, 256 if quick else 512, 0)]
    return {" ".join(map(str, cell)): cell for cell in plan}


def measure(cell: tuple, rounds: int, patience: float, too_slow: set[tuple]) -> dict[str, list[float]]:
    section, size, H, D = cell
    if section == "decode":
        return round_robin(one_token(size, H, D), 100 * rounds, patience)
    if section in ("memory", "model"):
        return in_processes(cell)
    inputs, contestants = draw(1, size, H, D), whole_sequences()
    if section == "training":
        contestants = {name: with_backward(run) for name, run in contestants.items()}
    able = {name: run for name, run in contestants.items() if (section, H, D, name) not in too_slow}
    samples = round_robin({name: lambda run=run: run(*inputs) for name, run in able.items()}, rounds, patience)
    growth = {
        "token loop": 40,
        "FLA naive chunk": 40,
        "transformers": 12,
        "SDPA (softmax)": 16,
    }  # for 4 times the tokens
    for name, seconds in samples.items():
        if statistics.median(seconds) * growth.get(name, 4) > 10 * patience:
            too_slow.add((section, H, D, name))
    return samples


def in_processes(cell: tuple) -> dict[str, list[float]]:
    """Memory needs a fresh process; a model without the kernel is one that finds no compiler."""
    section, size, *_ = cell
    names = list(whole_sequences()) if section == "memory" else ["C kernel", "torch form"]
    if section == "memory" and size > 1024:
        names = names[:2]
    results = {}
    for name in names:
        environment = dict(os.environ)
        if section == "model" and name == "torch form":
            environment |= {"PATH": "", "CC": "", "PYTHONWARNINGS": "ignore"}
        command = [
            sys.executable,
            "-m",
            "benchmarks.cpu",
            "--cell",
            json.dumps([name, *cell]),
            "--threads",
            str(torch.get_num_threads()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode == 0:
            results[name] = json.loads(done.stdout)
    return results


def alone(name: str, section: str, size: int, H: int, D: int) -> list[float]:
    """What a process of in_processes does."""
    if section == "memory":
        return [peak_of(with_backward(whole_sequences()[name]), draw(1, size, H, D))]
    torch.manual_seed(0)
    config = KimiLinearConfig.tiny("KKKM", hidden_size=256, linear_num_heads=4, linear_head_dim=64)
    model, ids = KimiLinearForCausalLM(config), torch.randint(0, 256, (size, H))
    optimizer = torch.optim.AdamW(model.parameters())

    def train():
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        optimizer.step()

    def read():
        with torch.no_grad():
            model(ids)

    def write():
        generate(model, [ids[0, :16].tolist()], max_new_tokens=32)

    seconds = []
    for run in (train, read, write):
        run()
        seconds.append(statistics.median(timed(run) for _ in range(7)))
    return [x / y * 1e3 for x, y in zip(seconds, (1, 1, 32))]


# ---- what is written ----


def table(results: dict[str, dict[str, list[float]]]) -> str:
    lines = []
    for section, unit in (("forward", "ms"), ("training", "ms"), ("decode", "us")):
        for H, D in SHAPES:
            mine = {k: v for k, v in results.items() if k.startswith(section) and k.endswith(f" {H} {D}")}
            if not mine:
                continue
            names = list(dict.fromkeys(name for cell in mine.values() for name in cell))
            sizes = [cell.split()[1] for cell in mine]
            what = {"forward": "forward", "training": "forward and backward", "decode": "one token, by batch"}[section]
            lines += ["", f"**{what}, {H} heads of {D}** (median {unit} · tokens/s · ratio)", ""]
            lines += ["| | " + " | ".join(sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
            for name in names:
                row = []
                for key, cell in mine.items():
                    if name not in cell:
                        row.append("–")
                        continue
                    seconds, first = statistics.median(cell[name]), statistics.median(next(iter(cell.values())))
                    scale = 1e3 if unit == "ms" else 1e6
                    rate = int(key.split()[1]) / seconds / 1e3
                    row.append(f"{seconds * scale:.3g} · {rate:.3g}k · {seconds / first:.1f}×")
                lines.append(f"| {name} | " + " | ".join(row) + " |")
    for key, cell in results.items():
        if key.startswith("memory"):
            lines += [
                "",
                f"**Peak memory beyond the inputs, forward and backward, T={key.split()[1]}, 8 heads of 128**",
                "",
            ]
            lines += [f"- {name}: {value[0]:.0f} MB" for name, value in cell.items()]
        if key.startswith("model"):
            _, batch, tokens, _ = key.split()
            lines += [
                "",
                f"**A small model (KKKM, width 256, 4 heads of 64), {batch} × {tokens} tokens: before is the torch form**",
                "",
            ]
            for i, what in enumerate(("training step", "reading", "writing a token")):
                after, before = cell["C kernel"][i], cell["torch form"][i]
                lines.append(f"- {what}: {before:.1f} ms before, {after:.1f} ms after, {before / after:.1f}×")
    return "\n".join(lines).strip() + "\n"


def plot(results: dict[str, dict[str, list[float]]], folder: Path) -> None:
    plt = importlib.import_module("matplotlib.pyplot")
    figure, axes = plt.subplots(2, len(SHAPES), figsize=(11, 8), sharex=True, constrained_layout=True)
    for row, section in enumerate(("forward", "training")):
        for axis, (H, D) in zip(axes[row], SHAPES):
            mine = [(k, v) for k, v in results.items() if k.startswith(section) and k.endswith(f" {H} {D}")]
            for name in dict.fromkeys(name for _, cell in mine for name in cell):
                points = [(int(k.split()[1]), statistics.median(cell[name])) for k, cell in mine if name in cell]
                axis.loglog(*zip(*[(T, T / s) for T, s in points]), "o-", label=name)
            axis.set_title(f"{'forward' if row == 0 else 'forward and backward'}, {H} heads of {D}")
            axis.set_ylabel("tokens/s")
            axis.set_xlabel("tokens")
            axis.set_xticks(sorted({int(k.split()[1]) for k, _ in mine}), minor=False)
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.xaxis.set_minor_formatter("")
    axes[-1][0].legend(fontsize="small")
    figure.savefig(folder / "cpu.png", dpi=120)
    plt.close(figure)


def facts_now() -> Facts:
    """The machine, what was measured beside us, and the day."""
    versions = {name: module.__version__ for name in ("transformers", "fla") if (module := optional(name))}
    return machine() | versions | {"date": str(date.today())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--only", choices=("forward", "training", "decode", "memory", "model"), help="one section")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contestant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a busy machine use 1")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="tokens of the longest sequence")
    parser.add_argument("--patience", type=float, default=2.5, help="seconds; a slower call is timed once")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the folder already")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cell:
        print(json.dumps(alone(*json.loads(options.cell))))
        return

    options.out.mkdir(parents=True, exist_ok=True)
    file, facts = options.out / "cpu.json", facts_now()
    stored = json.loads(file.read_text()) if file.exists() else {}
    same = {k: v for k, v in stored.get("machine", {}).items() if k != "date"} == {
        k: v for k, v in facts.items() if k != "date"
    }
    results = stored["results"] if same else {}
    plan = {k: v for k, v in cells(options.quick).items() if options.only in (None, v[0]) and v[1] <= options.longest}
    todo = {k: v for k, v in plan.items() if options.fresh or k not in results}
    too_slow, began = set(), time.monotonic()
    for n, (key, cell) in enumerate(todo.items()):
        samples = measure(cell, options.rounds, options.patience, too_slow)
        results[key] = {name: [float(f"{x:.4g}") for x in some] for name, some in samples.items()}
        results = {k: results[k] for k in cells(False) | cells(True) | results if k in results}
        write_json(file, {"machine": facts, "results": results}, indent=None)
        spent = time.monotonic() - began
        left = spent / (n + 1) * (len(todo) - n - 1)
        print(f"{n + 1}/{len(todo)} {key}: {spent:.0f} s, about {left:.0f} s left", file=sys.stderr, flush=True)
    heading = f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}; `python -m benchmarks.cpu`"
    text = f"{heading}\n\n{table(results)}"
    (options.out / "cpu.md").write_text(text)
    plot(results, options.out)
    print(text)


if __name__ == "__main__":
    main()
