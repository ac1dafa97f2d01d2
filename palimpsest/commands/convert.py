"""`palimpsest convert` and `palimpsest validate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from palimpsest.commands.options import Json, Quiet, checkpoint_of
from palimpsest.display import notes, size


def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint's folder, a run's folder, or a .gguf file.")],
    target: Annotated[Path, typer.Argument(help="A folder without a model, or a new .gguf file.")],
    to: Annotated[str, typer.Option("--to", help="`official`, `native` (transformers), `fla`, or `gguf` (llama.cpp).")],
    shard_bytes: Annotated[int, typer.Option(help="Split safetensors files beyond this many bytes.")] = 2 * 10**9,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Write a checkpoint in another layout, a piece of a tensor at a time. A call that was cut short goes on.

    Example: `palimpsest convert runs/demo demo.gguf --to gguf`
    """
    from palimpsest.convert import convert as run

    progress = (
        (lambda share, file: None) if quiet or as_json else (lambda share, file: notes.print(f"{share:4.0%} {file}"))
    )
    report = run(_place(source), target, to, shard_bytes=shard_bytes, progress=progress)
    for remark in report.remarks:
        notes.print(remark, soft_wrap=True)
    told = {"from": report.layout_from, "to": report.layout_to, "tensors": len(report.tensors), "bytes": report.nbytes}
    if as_json:
        typer.echo(json.dumps(told))
    else:
        typer.echo(f"{told['tensors']:,} tensors, {size(told['bytes'])}, from {told['from']} to {told['to']}: {target}")
    return 0


def validate(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, a run's folder, or a .gguf file.")],
    layout: Annotated[
        str | None,
        typer.Option(
            help="`official`, `native`, `fla` or `gguf`; by default what the names look like.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Check a checkpoint against a layout: what is missing, extra or misshapen, by name.

    Example: `palimpsest validate runs/demo`
    """
    from palimpsest.convert import detect
    from palimpsest.convert import validate as check

    place = _place(model)
    seen = detect(place) if layout is None else layout
    findings = check(place, seen)
    if as_json:
        typer.echo(json.dumps({"layout": seen, "findings": [finding._asdict() for finding in findings]}))
    else:
        for finding in findings:
            typer.echo(f"{finding.kind}: {finding.sentence}")
        typer.echo(f"{len(findings)} findings" if findings else f"a whole {seen} checkpoint")
    return 1 if findings else 0


def _place(name: str) -> Path:
    return Path(name) if name.endswith(".gguf") else checkpoint_of(name)
