"""What several commands take, how their help shows it, and what they make of it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

INTERRUPTED = 130  # exit code
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors, no progress.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output, for programs.")]


class PlainHelp:
    """Help as it is usual: a flag without a type, an argument in capitals and without braces."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if param.metavar is None and param.param_type_name == "argument":
                param.metavar = param.name.upper()
            elif param.metavar is None and param.is_flag:
                param.metavar = ""
        return params

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]  # type: ignore[misc]


class Command(PlainHelp, TyperCommand):
    """A command with plain help."""


class Group(PlainHelp, TyperGroup):
    """Commands under one name, with plain help."""


def checkpoint_of(folder: str) -> Path:
    """The folder with the weights: itself, or a run's newest checkpoint."""
    path = Path(folder)
    if (path / "run.json").is_file():
        newest = sorted(p for p in (path / "checkpoints").glob("step-*") if p.is_dir())
        if not newest:
            raise ValueError(f"the run in {folder!r} has no checkpoint yet; train further, or wait for the first")
        return newest[-1]
    if not path.is_dir():
        raise ValueError(f"{folder!r} is no folder; give a run's folder, or one with config.json and safetensors")
    return path
