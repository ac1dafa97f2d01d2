"""`palimpsest doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import warnings
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from palimpsest.commands.info import print_machine
from palimpsest.commands.options import Json
from palimpsest.display import size

EXTRAS = {  # extra -> the modules that it brings, and what is lacking without them
    "hf": ("safetensors", "checkpoints and saved states"),
    "cli": ("typer rich jinja2", "commands and chat templates"),
    "train": ("accelerate numpy matplotlib tokenizers", "training, and tokenizers other than bytes"),
    "triton": ("triton", "the kernels for a GPU"),
    "lab": ("numpy matplotlib", "experiments and their plots"),
    "cluster": ("submitit", "lab sweeps through Slurm"),
    "explain": ("starlette uvicorn", "the explainer's page"),
    "transformers": ("transformers", "transformers' own models on these kernels, and ours in its tools"),
    "finetune": ("peft trl datasets", "LoRA, SFT and GRPO"),
    "gguf": ("gguf", "files for llama.cpp"),
    "harness": ("lm_eval", "lm-evaluation-harness"),
}
MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[red]broken[/]"}
ENOUGH = 1e-4  # of the largest number: kernels in float32 err a thousandth of that


class Finding(NamedTuple):
    """What was looked at.

    Attributes:
        what: its name.
        state: "ok", "note" where something could be better, "broken" where results or commands fail.
        said: what was found.
        remedy: what to do about it; "" where nothing need be done.
    """

    what: str
    state: str
    said: str
    remedy: str = ""


def doctor(
    deep: Annotated[bool, typer.Option(help="Also compute with every kernel, and compare with the law.")] = True,
    as_json: Json = False,
) -> int:
    """What works on this machine, what would run, and what to install for the rest.

    Each kernel that can run is compared with the reference in float64. Exit code 1 means that something is broken.

    Example: `palimpsest doctor`
    """
    import torch

    from palimpsest.machine import machine
    from palimpsest.models.kimi_linear import card

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the kernels warn of is said below, with the remedy
        answers = card.answers()
        findings = [_torch(), *_cpu_kernel(answers), *_gpu(answers), *(_extras())]
        if deep:
            findings += _compared(device)
    if as_json:
        told = {"machine": machine(device), "backends": answers, "findings": [f._asdict() for f in findings]}
        typer.echo(json.dumps(told))
    else:
        _print(findings, machine(device) | {"device": device, "backends": answers})
    return 1 if any(finding.state == "broken" for finding in findings) else 0


def _torch() -> Finding:
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 9):
        return Finding("torch", "broken", f"{torch.__version__}, too old", "pip install 'torch>=2.9'")
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} processors"
    return Finding("torch", "ok", f"{torch.__version__}, {threads}")


def _cpu_kernel(answers: dict[str, dict[str, str]]) -> list[Finding]:
    from palimpsest.ops import backends

    facts = backends.facts().get("cpu", {})
    problem = backends.Problem("kda", "kda", "cpu", _float32(), 128, 128, 4096, sequences=1, heads=32, value_heads=32)
    said = dict(line.split(maxsplit=1) for line in backends.explain(problem).splitlines())["cpu"]
    if said != "ok":
        remedy = "install gcc or clang, then run this again; until then the PyTorch form runs, some 100 times slower"
        return [Finding("C kernel", "note", said, remedy)]
    where = "; ".join(f"{name} {value}" for name, value in facts.items())
    return [Finding("C kernel", "ok", f"compiled and loaded ({where})")]


def _float32() -> Any:
    import torch

    return torch.float32


def _gpu(answers: dict[str, dict[str, str]]) -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if not torch.version.cuda else "torch sees no CUDA device"
        return [Finding("GPU", "ok", f"none: {why}; everything runs on the CPU")]
    found = []
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        free = torch.cuda.mem_get_info(i)[0]
        said = f"{about.name}, capability {about.major}.{about.minor}, {size(free)} of {size(about.total_memory)} free"
        found.append(Finding(f"GPU {i}", "ok", said))
    ran = answers["kda, bfloat16"]
    if all(answer != "ok" for name, answer in ran.items() if name in ("hopper", "triton")):
        reasons = "; ".join(f"{name} {ran[name]}" for name in ("hopper", "triton") if name in ran)
        found.append(Finding("GPU kernels", "broken", f"none runs: {reasons}", "pip install palimpsest-kda[triton]"))
    else:
        first = next(name for name, answer in ran.items() if answer == "ok")
        found.append(Finding("GPU kernels", "ok", f"KDA in bfloat16 runs in {first}"))
    return found


def _extras() -> list[Finding]:
    import torch

    found = []
    for extra, (modules, what) in EXTRAS.items():
        if extra == "triton" and not torch.cuda.is_available():
            continue
        missing = [name for name in modules.split() if importlib.util.find_spec(name) is None]
        if missing:
            remedy = f"pip install 'palimpsest-kda[{extra}]'"
            found.append(Finding(extra, "note", f"no {', '.join(missing)}: {what} cannot be used", remedy))
        else:
            versions = ", ".join(f"{name} {_version(name)}" for name in modules.split())
            found.append(Finding(extra, "ok", versions))
    return found


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:  # a name of its own
        return "installed"


def _compared(device: str) -> list[Finding]:
    """Every backend that runs a call of KDA, against the law: outputs, state and one gradient."""
    import torch

    from palimpsest import kda
    from palimpsest.ops import backends

    torch.manual_seed(0)
    q, k, v, logits = (torch.randn(1, 80, 2, 32) for _ in range(4))
    k = k / k.norm(dim=-1, keepdim=True)
    inputs = [q, k, v, -logits.exp(), torch.rand(1, 80, 2)]

    def run(name: str, where: str, dtype: torch.dtype) -> list[torch.Tensor]:
        ours = [x.to(where, dtype).requires_grad_() for x in inputs]
        output, state = kda(*ours, backend=name)
        (gradient,) = torch.autograd.grad(output.sum() + state.sum(), ours[2])
        return [x.detach().cpu().double() for x in (output, state, gradient)]

    law, found = run("reference", "cpu", torch.float64), []
    for name in backends.names():
        for where in dict.fromkeys(("cpu", device)):
            try:
                got = run(name, where, torch.float32)
            except ValueError:  # it refuses this call, which the table above says
                continue
            except Exception as error:
                remedy = "report this with the output of palimpsest doctor --json"
                found.append(Finding(f"{name} on {where}", "broken", f"{type(error).__name__}: {error}", remedy))
                continue
            error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, law))
            state, remedy = ("ok", "") if error < ENOUGH else ("broken", "do not trust its results; report this")
            found.append(Finding(f"{name} on {where}", state, f"agrees with the law to {error:.0e}", remedy))
    return found


def _print(findings: list[Finding], facts: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table("", "what", "found", show_lines=False)
    for finding in findings:
        remedy = f"\n[bold]{escape(finding.remedy)}[/]" if finding.remedy else ""
        table.add_row(MARKS[finding.state], finding.what, escape(finding.said) + remedy)
    console.print(table)
    print_machine(console, facts)
