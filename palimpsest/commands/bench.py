"""`palimpsest bench`."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from palimpsest.commands.generate import device_of
from palimpsest.commands.options import Json, Quiet
from palimpsest.display import notes

SLOW = 2.0  # seconds; a call beyond is timed once
Cell = tuple[str, str, Callable[[], None], float]  # what, by whom, the call, tokens in it


def bench(
    only: Annotated[
        str, typer.Option(help="Only rows whose name contains this: `forward`, `training`, `step`, `model`.")
    ] = "",
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of a sequence.")] = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contestant.")] = 5,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, or `auto`.")] = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """How fast this machine is: the memory by every backend that runs here, a small model's step and its tokens.

    Half a minute; contestants of a row take turns, and a row gives medians. The published tables come from commands of the
    repository, `python -m benchmarks.cpu` and its neighbours.

    Example: `palimpsest bench --only forward`
    """
    import torch

    from palimpsest.machine import in_words, machine

    place = device_of(device)
    torch.manual_seed(0)
    rows = []
    for group in (_memory(place, tokens), _model(place, min(tokens, 512))):
        cells = [cell for cell in group if only in cell[0]]
        for what in dict.fromkeys(cell[0] for cell in cells):
            contestants = [cell for cell in cells if cell[0] == what]
            if not quiet and not as_json:
                notes.print(f"{what}: {', '.join(cell[1] for cell in contestants)}", style="dim")
            seconds = _turns([cell[2] for cell in contestants], rounds, place)
            for (_, who, _, count), spent in zip(contestants, seconds):
                ms = statistics.median(spent) * 1000
                rows.append(
                    {"what": what, "by": who, "ms": ms, "tokens_per_second": count / ms * 1000, "rounds": len(spent)}
                )
    if not rows:
        raise ValueError(f"no row contains {only!r}; there are forward, training, step and model")
    facts = machine(place)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row | {"machine": facts}))
        return 0
    table = Table("", "by", "milliseconds", "tokens a second", title=in_words(facts), title_justify="left")
    for row in rows:
        table.add_row(row["what"], row["by"], f"{row['ms']:.3g}", f"{row['tokens_per_second']:,.0f}")
    Console(highlight=False).print(table)
    return 0


def _memory(device: str, tokens: int) -> list[Cell]:
    """One layer's memory, 4 heads of 64 channels: a sequence forward, with gradients, and one token."""
    import torch

    from palimpsest import kda, kda_step_
    from palimpsest.ops import backends

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    q, k, v, logits = (torch.randn(1, tokens, 4, 64) for _ in range(4))
    k = k / k.norm(dim=-1, keepdim=True)
    inputs = [x.to(device, dtype) for x in (q, k, v, -logits.exp(), torch.rand(1, tokens, 4))]
    wanting = [x.clone().requires_grad_() for x in inputs]
    q1, k1, v1, g1, b1 = (x[:, 0] for x in inputs)
    state = torch.zeros(1, 4, 64, 64, device=device)

    def forward(name: str) -> None:
        with torch.no_grad():
            kda(*inputs, backend=name)

    def training(name: str) -> None:
        kda(*wanting, backend=name).output.sum().backward()

    def step(name: str) -> None:
        with torch.no_grad():
            for _ in range(10):
                kda_step_(q1, k1, v1, g1, b1, state, backend=name)

    cells: list[Cell] = []
    calls: tuple[tuple[str, Callable[[str], None], int], ...] = (
        ("forward", forward, tokens),
        ("training", training, tokens),
        ("step", step, 10),
    )
    for what, call, count in calls:
        for name in backends.names():
            if name == "reference" and what != "step":
                continue  # the law, a token at a time: seconds
            try:
                call(name)
            except ValueError:  # it refuses, and palimpsest info says why
                continue
            cells.append(
                (
                    f"memory, {what}" if what == "step" else f"memory, {what}, {tokens:,} tokens",
                    name,
                    partial(call, name),
                    count,
                )
            )
    return cells


def _model(device: str, tokens: int) -> list[Cell]:
    """A hybrid with experts, in miniature: a training step without the optimiser's, and tokens of a continuation."""
    import torch

    from palimpsest import KimiLinearConfig, KimiLinearForCausalLM

    model = KimiLinearForCausalLM(
        KimiLinearConfig.tiny(hidden_size=128, linear_num_heads=4, linear_head_dim=32, num_experts=8)
    ).to(device)
    size = f"{sum(x.numel() for x in model.parameters()) / 1e6:.1f}M parameters"
    ids = torch.randint(0, 256, (1, tokens), device=device)

    def training() -> None:
        model.train()
        loss = model(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        model.zero_grad()

    def generating() -> None:
        model.eval().generate([1, 2, 3], max_new_tokens=64, end_tokens=())

    return [
        (f"model, training, {tokens:,} tokens", size, training, tokens),
        ("model, 64 new tokens", size, generating, 64),
    ]


def _turns(calls: list[Callable[[], None]], rounds: int, device: str) -> list[list[float]]:
    import torch

    def timed(call: Callable[[], Any]) -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - began

    spent = [[timed(call)] for call in calls]  # which also makes what is made at first use
    slow = [times[0] > SLOW for times in spent]
    for times, late in zip(spent, slow):
        if not late:
            times.clear()
    for _ in range(rounds):
        for call, times, late in zip(calls, spent, slow):
            if not late:
                times.append(timed(call))
    return spent
