"""`palimpsest train`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from palimpsest.commands.options import INTERRUPTED, Json, Plugin, Quiet
from palimpsest.commands.recipes import place_of
from palimpsest.display import clock, display, notes, size


def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe by name, `demo` or `wikitext103:local`, or a file, `recipes/mine.py:large`.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run; `runs/NAME` by default.", show_default=False)
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="FIELD=VALUE", help="Change a field of the recipe, such as `optim.lr=3e-3`."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder, if there is one.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the run in the folder and start anew; other files there stay.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe with its settings and stop.")] = False,
    plugin: Plugin = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Train a model by a recipe.

    Ctrl-C saves a checkpoint and stops; the same command with `--resume` goes on from there.
    The folder gets metrics.jsonl, loss.png, loss.svg, result.json and checkpoints that `generate` reads.

    Example: `palimpsest train recipes/demo.py --set minutes=1`
    """
    from palimpsest.train import CheckpointError, NonFiniteError, load_recipe
    from palimpsest.train import train as run_recipe
    from palimpsest.train.processes import RefusedError
    from palimpsest.train.recipe import as_dict

    loaded = load_recipe(place_of(recipe), _settings(set or []))
    if show:
        typer.echo(json.dumps(as_dict(loaded), indent=2))
        return 0
    if resume and overwrite:
        raise ValueError("--resume and --overwrite were both given; choose one")
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started; one of them speaks
    path, _, function = recipe.partition(":")
    folder = out or Path("runs") / "-".join(filter(None, [Path(path).stem, function]))
    with display(
        Standing().status, _remarks, quiet=quiet or not first, as_json=as_json and first, silent="step"
    ) as report:
        try:
            result = run_recipe(loaded, folder, resume=resume, overwrite=overwrite, report=report)
        except (RefusedError, CheckpointError, NonFiniteError):  # all processes raise it, and the first one says it
            if first:
                raise
            return 1
    _leave_the_others()
    if not first:
        return 0 if result.finished else INTERRUPTED
    if not result.finished:
        notes.print(f"interrupted at step {result.progress.step} and saved; go on with --resume")
        return INTERRUPTED
    if not as_json:
        _print_result(result, folder)
    return 0


def _leave_the_others() -> None:
    import torch.distributed as processes

    if processes.is_available() and processes.is_initialized():
        processes.destroy_process_group()


def _settings(pairs: list[str]) -> dict[str, str]:
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {pair!r} is not FIELD=VALUE; write for example --set optim.lr=3e-3")
        settings[name.strip()] = value
    return settings


class Standing:
    """What a line of progress has to know between two events."""

    def __init__(self):
        self.heldout: float | None = None
        self.steps: list[tuple[float, float, float]] = []  # time, tokens, share of the last ones

    def status(self, event: dict[str, Any]) -> tuple[float, str] | None:
        """Of an event: the share that is done, and rate, loss, bits per byte and time left in words."""
        if event["event"] == "evaluate":
            self.heldout = event["heldout_bits_per_byte"]
        if event["event"] == "finished" or (event["event"] == "end" and event["finished"]):
            return 1.0, "finished"
        if event["event"] != "step":
            return None
        self.steps = [*self.steps[-40:], (time.monotonic(), event["tokens"], event["share"])]
        (t0, n0, s0), (t1, n1, s1) = self.steps[0], self.steps[-1]
        rate = (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0
        left = (1 - s1) * (t1 - t0) / (s1 - s0) if s1 > s0 else None
        parts = [f"step {event['step']}", f"{rate:,.0f} tok/s", f"loss {_decimals(event['loss'], 2)}"]
        parts.append(f"bits/byte {_decimals(event['bits_per_byte'], 2)}")
        if self.heldout is not None:
            parts.append(f"held out {self.heldout:.2f}")
        if event["skipped"]:
            parts.append(f"{event['skipped']} skipped")
        return s1, "  ".join([*parts, f"ETA {clock(left)}"])


def _remarks(event: dict[str, Any]) -> list[str]:
    if event["event"] == "start":
        where = "resumed at step {}".format(event["step"]) if event["resumed"] else "new run"
        return [
            f"{event['parameters']:,} parameters on {event['device']} x {event['processes']}; {where}",
            f"{event['documents']:,} documents, {size(event['bytes'])}; "
            f"held out {event['heldout_documents']:,}, {size(event['heldout_bytes'])}",
        ]
    if event["event"] == "evaluate":
        others = ", ".join(f"{name} {bits:.2f}" for name, bits in event["compressors"].items())
        bits, length = event["heldout_bits_per_byte"], size(event["heldout_bytes"])
        return [f"step {event['step']}: held-out {_decimals(bits, 3)} bits/byte on {length} ({others})"]
    if event["event"] == "interrupt":
        heard = "Ctrl-C" if event["signal"] == "SIGINT" else event["signal"]
        return [f"{heard} heard: step {event['step'] + 1} is being finished and saved; once more ends without saving"]
    if event["event"] == "finished":
        return [f"this run had finished at step {event['step']}: nothing was left to do"]
    return []


def _decimals(number: float | None, digits: int) -> str:
    return "not finite" if number is None else f"{number:.{digits}f}"


def _print_result(result, folder: Path) -> None:
    table = Table(title="held-out bits per byte", title_justify="left", show_header=False)
    table.add_row("this model", f"[bold]{_decimals(result.heldout_bits_per_byte, 3)}[/]")
    for name, bits in result.compressors.items():
        table.add_row({"unigram": "entropy of single bytes"}.get(name, name), f"{bits:.3f}")
    console = Console(highlight=False)
    console.print(table)
    progress = result.progress
    console.print(
        f"{progress.step:,} steps, {progress.tokens:,} tokens in {clock(progress.seconds)}; "
        f"loss curve {folder / 'loss.png'}; model {result.checkpoint}",
        soft_wrap=True,
    )
    if result.best is not None:
        console.print(f"held-out text was predicted best along the way by {result.best}", soft_wrap=True)
