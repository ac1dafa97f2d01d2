"""`palimpsest plan`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from palimpsest.commands.info import config_of
from palimpsest.commands.options import Json, Plugin


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="`official_48b` (or `48b`), `medium`, `small`, `tiny`, a run's folder, a checkpoint, or a recipe."
        ),
    ],
    gpus: Annotated[int, typer.Option("--gpus", "-n", min=1, help="GPUs of the job.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 8192,
    rows: Annotated[int, typer.Option(min=1, help="Rows a GPU and step.")] = 1,
    memory: Annotated[float, typer.Option(min=1, help="GB of a GPU.")] = 80,
    show: Annotated[int, typer.Option(min=1, help="Plans to print, the fastest on paper first.")] = 5,
    plugin: Plugin = None,
    as_json: Json = False,
) -> int:
    """Memory and traffic a token of each plan that fits, by the formulas of palimpsest/parallel/arithmetic.py: arithmetic,
    not measurement.

    Example: `palimpsest plan 48b --gpus 64`
    """
    from palimpsest.parallel.arithmetic import plans, sizes_of

    config = config_of(model)
    sizes = sizes_of(config)
    found = plans(config, gpus, length=length, rows=rows, memory=memory * 1e9)
    if as_json:
        for one in found[:show]:
            typer.echo(json.dumps(asdict(one) | {"memory": one.memory, "tokens_per_second": one.tokens_per_second}))
        return 0 if found else 1
    console = Console(highlight=False)
    total = sizes.alike + sizes.experts
    console.print(
        f"{total / 1e9:.2f} billion parameters, {sizes.active / 1e9:.2f} at work on a token; {gpus} GPUs of {memory:g} GB, "
        f"{rows} x {length:,} tokens a GPU and step. All of it is arithmetic: see docs/how-to/scale.md."
    )
    if not found:
        raise ValueError(
            f"no plan of {gpus} GPUs of {memory:g} GB holds this model; give more --gpus, or a shorter --length"
        )
    table = Table("plan", "states", "activations", "memory", "heard a token", "tokens/s a GPU")
    for one in found[:show]:
        p = one.plan
        fields = [f"kind={p.kind}", f"data={p.sizes(gpus)['data']}"]
        fields += [f"{name}={value}" for name, value in (("expert", p.expert), ("context", p.context)) if value > 1]
        heard = ", ".join(f"{what} {_bytes(b)}" for what, b in one.traffic.items()) or "nothing"
        sizes_gb = [f"{number / 1e9:.1f} GB" for number in (one.states, one.activations, one.memory)]
        name = " ".join(fields) + (" recompute" if one.recompute else "")
        table.add_row(name, *sizes_gb, heard, f"{one.tokens_per_second:,.0f}")
    console.print(table)
    best = found[0]
    sets = [f"parallel.kind={best.plan.kind}", f"parallel.data={best.plan.sizes(gpus)['data']}"]
    sets += [
        f"parallel.{name}={v}" for name, v in (("expert", best.plan.expert), ("context", best.plan.context)) if v > 1
    ]
    sets += ["recompute=true"] if best.recompute else []
    console.print("the first as settings: " + " ".join(f"--set {s}" for s in sets), soft_wrap=True)
    return 0


def _bytes(n: float) -> str:
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"
