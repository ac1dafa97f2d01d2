"""`palimpsest info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from palimpsest.commands.options import Json, Plugin, checkpoint_of
from palimpsest.display import size


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            help="`official_48b` (or `48b`), `medium`, `small`, `tiny`, a run's folder, a checkpoint's folder, or a recipe."
        ),
    ] = None,
    plugin: Plugin = None,
    as_json: Json = False,
) -> int:
    """What a model is made of and what it holds in memory; without a model, what this machine can run.

    Example: `palimpsest info 48b`
    """
    import torch

    from palimpsest.machine import machine
    from palimpsest.models.kimi_linear import card

    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts: dict[str, Any] = {"machine": machine(device) | {"device": device, "backends": card.answers()}}
    facts |= {} if model is None else {"model": card.describe(config_of(model))}
    if as_json:
        typer.echo(json.dumps(facts))
        return 0
    console = Console(highlight=False)
    if model is not None:
        _print_model(console, model, facts["model"])
    print_machine(console, facts["machine"])
    return 0


def config_of(name: str):
    from palimpsest.models.kimi_linear.checkpoint import read_config
    from palimpsest.models.kimi_linear.config import KimiLinearConfig

    presets = {"official_48b": KimiLinearConfig.official_48b, "tiny": KimiLinearConfig.tiny}
    presets |= {"small": KimiLinearConfig.small, "medium": KimiLinearConfig.medium}
    preset = {"48b": "official_48b"}.get(name.lower(), name.lower())
    if preset in presets:
        return presets[preset]()
    if name.partition(":")[0].endswith(".py"):
        from palimpsest.train import load_recipe

        return load_recipe(name).model
    if not Path(name).is_dir():
        raise ValueError(f"{name!r} is no model; give one of {', '.join(presets)}, a folder, or a recipe file")
    return read_config(checkpoint_of(name))


def _print_model(console: Console, name: str, card: dict[str, Any]) -> None:
    console.print(f"[bold]{escape(name)}[/]  layers {card['pattern']}  (K: constant memory, M: latent attention)")
    console.print(f"hidden size {card['hidden_size']}, vocabulary {card['vocab_size']:,}\n")
    table = Table()
    table.add_column("part")
    table.add_column("parameters", justify="right")
    sums = ("total", "active")
    for part, count in card["parameters"].items():
        if part not in sums:
            table.add_row(part, f"{count:,}")
    table.add_section()
    table.add_row("[bold]total[/]", f"[bold]{card['parameters']['total']:,}[/]")
    table.add_row("at work on a token", f"{card['parameters']['active']:,}")
    console.print(table)
    table = Table(title="memory of one sequence, bfloat16", title_justify="left")
    for column in ("tokens", "this model", "all latent attention", "share", "all keys and values"):
        table.add_column(column, justify="right")
    for row in card["memory"]:
        share = f"{row['state'] / row['latent']:.0%}"
        table.add_row(f"{row['tokens']:,}", size(row["state"]), size(row["latent"]), share, size(row["full"]))
    console.print(table)


def print_machine(console: Console, facts: dict[str, Any]) -> None:
    from palimpsest.machine import in_words

    console.print(f"this machine: {escape(in_words(facts))}", soft_wrap=True)
    calls = facts["backends"]
    table = Table("backend", *calls, title="backends: the first that runs a call is taken", title_justify="left")
    refusals = {}
    for name in next(iter(calls.values())):
        answers = [answers[name] for answers in calls.values()]
        table.add_row(name, *("ok" if answer == "ok" else "-" for answer in answers))
        refusals[name] = dict.fromkeys(answer for answer in answers if answer != "ok")
    console.print(table)
    for name, reasons in refusals.items():
        if reasons:
            console.print(f"{name} {'; '.join(reasons)}", soft_wrap=True)
