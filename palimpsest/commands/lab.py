"""`palimpsest lab`: list, show, run and compare experiments. torch is loaded inside the commands, not before."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from palimpsest.checks import check
from palimpsest.commands.options import INTERRUPTED, Command, Group, Json
from palimpsest.display import clock, display, notes

app = typer.Typer(
    name="lab",
    cls=Group,
    help="Claims about these memories, measured again: a sweep, plots and a one-page report by one command.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.command("list", cls=Command)
def list_(as_json: Json = False) -> int:
    """The experiments, contestants and tasks there are, and the results: those that come with the package, and those of runs/lab.

    Example: `palimpsest lab list`
    """
    from palimpsest.lab.framework.experiment import NAMES, load_experiment
    from palimpsest.lab.model_variants import ABOUT, MODEL_VARIANTS
    from palimpsest.lab.tasks import TASKS

    loaded = [load_experiment(name) for name in NAMES]
    tasks = {name: (sys.modules[task.__module__].__doc__ or "").partition("\n")[0] for name, task in TASKS.items()}
    if as_json:
        experiments = [{"name": e.name, "question": e.question, "scales": dict(e.scales)} for e in loaded]
        told = {"experiments": experiments, "contestants": ABOUT, "tasks": tasks, "results": _results()}
        typer.echo(json.dumps(told))
        return 0
    console = Console(highlight=False)
    table = Table(
        "experiment", "question", "scales", title="palimpsest lab run NAME --scale SCALE", title_justify="left"
    )
    for e in loaded:
        table.add_row(e.name, e.question, ", ".join(e.scales))
    console.print(table)
    table = Table("contestant", "what it is", "layers")
    for name, words in ABOUT.items():
        table.add_row(name, words, MODEL_VARIANTS[name].pattern)
    table.add_row("KKKM, ...", "any pattern of layers, capital letters", "")
    console.print(table)
    table = Table("task", "what is asked")
    for name, words in tasks.items():
        table.add_row(name, words.partition(": ")[2])
    console.print(table)
    if results := _results():
        table = Table("results", "verdict", "because", title="palimpsest lab show FOLDER", title_justify="left")
        for result in results:
            because = result["because"].replace("\n", " ")
            table.add_row(
                result["folder"], result["verdict"], escape(because if len(because) < 100 else because[:100] + " ...")
            )
        console.print(table)
    return 0


def _results() -> list[dict[str, str]]:
    """Every finished result there is, with its verdict."""
    from palimpsest.commands.recipes import shipped
    from palimpsest.lab.framework.report import verdict_of

    found = []
    for place in (*shipped("results"), Path("runs")):
        for folder in sorted(path.parent for path in (place / "lab").glob("*/report.md")):
            outcome, because = verdict_of(folder)
            found.append({"folder": _short(folder), "verdict": outcome, "because": because})
    return found


def _short(folder: Path) -> str:
    """From here, where it is below."""
    return str(folder.resolve().relative_to(Path.cwd())) if folder.resolve().is_relative_to(Path.cwd()) else str(folder)


@app.command(cls=Command)
def show(
    target: Annotated[str, typer.Argument(help="An experiment's name, a recipe file, or a folder with results.")],
    scale: Annotated[str | None, typer.Option(help="Which scale's points to describe.", show_default=False)] = None,
) -> int:
    """What an experiment asks and runs, or what its results say.

    Example: `palimpsest lab show fig4`, `palimpsest lab show results/lab/fig4-small`
    """
    console = Console(highlight=False)
    if Path(target).is_dir():
        from palimpsest.files import read_bytes
        from palimpsest.lab.framework.results import read_sweep

        report = Path(target) / "report.md"
        if not (report.is_file() and (Path(target) / "results.csv").is_file()):
            read_sweep(Path(target))
            raise ValueError(f"folder {target!r} has no finished point yet; run the experiment further")
        text = read_bytes(report).decode("utf-8", errors="replace")
        console.print(Markdown(text)) if console.is_terminal else typer.echo(text)
        return 0
    from palimpsest.lab.framework.experiment import load_experiment
    from palimpsest.lab.framework.results import title

    experiment = load_experiment(target)
    console.print(f"[bold]{escape(experiment.name)}[/]: {escape(experiment.question)}\n", soft_wrap=True)
    console.print(f"Claim. {escape(experiment.claim)}\n", soft_wrap=True)
    if experiment.setting:
        console.print(f"How. {escape(experiment.setting)}\n", soft_wrap=True)
    table = Table("scale", "points", "what runs")
    for name, words in experiment.scales.items():
        table.add_row(name, str(len(experiment.plan(name))), words)
    console.print(table)
    if scale is not None:
        for point in experiment.plan(scale).values():
            typer.echo(title(point.label()))
    return 0


@app.command(cls=Command)
def run(
    experiment: Annotated[
        str, typer.Argument(help="A name from `lab list`, or a Python file that defines EXPERIMENT.")
    ],
    scale: Annotated[
        str | None,
        typer.Option(help="How much; by default `small` on a CPU, else `quick` or `full`.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder of the results; `runs/lab/NAME-SCALE` by default.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`, or `auto`.")] = "auto",
    workers: Annotated[
        int, typer.Option("--workers", "-w", help="Points run at once, a process each; several small ones share a GPU.")
    ] = 1,
    side_by_side: Annotated[
        int,
        typer.Option(
            help="Models that learn beside each other on one GPU, in one process: many small ones in little time."
        ),
    ] = 1,
    executor: Annotated[
        str | None,
        typer.Option(
            help="Who runs the points, --workers at once: `slurm`, `slurm:timeout_min=60,gpus_per_node=1`, `submitit-local`, "
            "or `FILE.py:function` for an executor of your own; by default processes of this machine.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[str, typer.Option(help="Only points whose description contains this, such as `task mqar`.")] = "",
    minutes: Annotated[
        float | None,
        typer.Option(help="Stop after so many minutes; the same command goes on.", show_default=False),
    ] = None,
    note: Annotated[str, typer.Option(help="What a reader should know of the machine, for the report.")] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> int:
    """Run an experiment, or go on with it; then write CSV, plots and the report.

    Ctrl-C and --minutes keep what is done, and the same command goes on. A folder with another sweep is refused.

    Example: `palimpsest lab run fig4 --scale quick --workers 4`
    """
    import torch

    from palimpsest.lab.framework.executors import executor_of
    from palimpsest.lab.framework.experiment import load_experiment
    from palimpsest.lab.framework.sweep import InterruptedSweep
    from palimpsest.lab.framework.sweep import run as run_sweep
    from palimpsest.lab.side_by_side import SideBySide

    loaded = load_experiment(experiment)
    runner: Any = executor_of(executor, workers) if executor is not None else None
    check(
        device != "auto" or runner is None or not runner.elsewhere,
        f"--executor {executor} runs points on other machines, and --device is auto; give --device cpu or cuda",
    )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if scale is None:
        wanted = ("small", "full") if device == "cpu" else ("quick", "full")
        scale = next((name for name in wanted if name in loaded.scales), next(iter(loaded.scales)))
    folder = out or Path("runs") / "lab" / f"{loaded.name}-{scale}"
    command = f"palimpsest lab run {shlex.quote(experiment)} --scale {scale} --out {shlex.quote(str(folder))}"
    command += f" --device {device}" + (f" --workers {workers}" if workers > 1 else "")
    command += f" --side-by-side {side_by_side}" if side_by_side > 1 else ""
    command += f" --executor {shlex.quote(executor)}" if executor else ""
    check(side_by_side >= 1, f"--side-by-side is {side_by_side}; give at least 1")
    check(
        workers == 1 or side_by_side == 1,
        f"--workers is {workers} and --side-by-side {side_by_side}; give one of them: models beside each other share a process",
    )
    check(
        executor is None or side_by_side == 1,
        f"--executor {executor} and --side-by-side {side_by_side} were both given; choose one",
    )
    if side_by_side > 1:
        drawing = 0 if device == "cpu" else max(min((os.cpu_count() or 2) // 2, 12), 1)  # processes that make sequences
        runner = SideBySide(side_by_side, drawing)
    last: dict[str, Any] = {}
    try:
        with display(_status, _remarks, quiet=quiet, as_json=as_json) as show_event:
            run_sweep(
                loaded, scale, folder, device=device, workers=workers, only=only, minutes=minutes, command=command,
                note=note, runner=runner,
                report=lambda event: (last.update(event), show_event(event))[1],
            )  # fmt: skip
    except InterruptedSweep:
        notes.print(
            f"interrupted; finished points are in {escape(str(folder))}, and the same command goes on", soft_wrap=True
        )
        return INTERRUPTED
    if not as_json:
        _conclude(folder, last)
    return 1 if last["failed"] else 0


def _conclude(folder: Path, end: dict[str, Any]) -> None:
    """The verdict on standard output, and where its report is."""
    page = folder / "report.md"
    if page.is_file():
        lines = page.read_text(encoding="utf-8").splitlines()
        typer.echo(next((line for line in lines if line.startswith("**Verdict")), "").replace("**", ""))
        rest = "" if end["complete"] else "; some points are left, and the same command goes on"
        notes.print(f"report {escape(str(page))}{rest}", soft_wrap=True)
    elif not end["failed"]:
        notes.print("no point is finished yet; the same command goes on", soft_wrap=True)


@app.command(cls=Command)
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders with results of one experiment, two or more.")],
    metric: Annotated[str, typer.Option(help="Only metrics whose name contains this.")] = "",
    as_json: Json = False,
) -> int:
    """Results side by side: the same points, their spread over seeds, and whether the difference is beyond it.

    Example: `palimpsest lab compare results/lab/fig4-small runs/lab/fig4-small --metric accuracy`
    """
    from palimpsest.lab.framework.report import compare as side_by_side

    tables = [t for t in side_by_side(folders) if metric in t.title]
    if not tables:
        raise ValueError(f"no metric of these results contains {metric!r}; leave --metric out to see all")
    console = Console(highlight=False)
    for side in tables:
        if as_json:
            rows = [dict(zip(side.header, row)) for row in side.rows]
            typer.echo(json.dumps({"metric": side.title, "rows": rows}))
            continue
        table = Table(*map(str, side.header), title=side.title, title_justify="left")
        for row in side.rows:
            table.add_row(*map(str, row))
        console.print(table)
    return 0


def _status(event: dict[str, Any]) -> tuple[float, str] | None:
    if event["event"] not in ("progress", "point"):
        return None
    word = event.get("word") or f"{event.get('share', 1.0):.0%}"
    return event["done"], f"{clock(event['elapsed'])}, ETA {clock(event['eta'])}  {event['point']}: {word}"


def _remarks(event: dict[str, Any]) -> list[str]:
    if event["event"] == "start":
        return [f"{event['left']} of {event['points']} points to run on {event['device']}, {event['workers']} at once"]
    if event["event"] == "point":
        if "error" in event:
            return [f"[red]failed[/] {escape(event['point'])}: {escape(event['error'])}"]
        row = event["result"]["rows"][0]
        words = [
            f"{name} {row[name]:.4g}"
            for name in ("best_accuracy", "bits", "relative_error", "milliseconds")
            if name in row
        ]
        return [escape(f"{event['done']:4.0%}  {event['point']}: {', '.join(words)}, {clock(event['seconds'])}")]
    if event["event"] == "end" and event["failed"]:
        return [f"[red]{event['failed']} points failed[/]; the same command tries them again"]
    return []
