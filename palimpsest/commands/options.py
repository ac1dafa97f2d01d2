"""What several commands take, how their help shows it, and what they make of it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

INTERRUPTED = 130  # exit code
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors, no progress.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output, for programs.")]


def _run_first(files: list[Path] | None) -> None:
    from palimpsest.python_files import load_file

    for file in files or []:
        load_file(file, "plugin")


Plugin = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        metavar="FILE.py",
        callback=_run_first,
        help="Run a Python file of yours first, such as one that registers a layer; may be given several times.",
        show_default=False,
    ),
]

CHECKPOINTS_OWN = "by default what the checkpoint says"


def _choice(*names: str, help: str) -> Any:
    return typer.Option(*names, help=f"{help} ({CHECKPOINTS_OWN}).", show_default=False)


Temperature = Annotated[float | None, _choice("--temperature", "-t", help="0 always takes the likeliest token")]
TopK = Annotated[int | None, _choice(help="Choose among the k likeliest tokens")]
TopP = Annotated[float | None, _choice(help="Choose among the likeliest that reach this probability")]
MinP = Annotated[float | None, _choice(help="Leave out tokens less likely than this share of the likeliest")]
RepetitionPenalty = Annotated[float | None, _choice(help="More than 1 discourages repetition")]


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
    from palimpsest.models.kimi_linear import checkpoint_place

    path = Path(folder)
    if not path.is_dir():
        if folder.lower() in ("48b", "official_48b", "tiny", "small", "medium"):
            raise ValueError(
                f"{folder!r} names a configuration, which has no weights; fetch the checkpoint, such as "
                "moonshotai/Kimi-Linear-48B-A3B-Instruct, and give its folder"
            )
        raise ValueError(f"{folder!r} is no folder; give a run's folder, or one with config.json and safetensors")
    return checkpoint_place.checkpoint_of(path)


def sampling_of(
    folder: Path,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> Any:
    """How a checkpoint's generation_config.json says to choose tokens, and what was asked for instead."""
    from palimpsest.generate import Sampling
    from palimpsest.models.kimi_linear.generation_config import sampling_defaults

    asked = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty,
    }  # fmt: skip
    return Sampling(
        **{**sampling_defaults(folder), **{name: value for name, value in asked.items() if value is not None}}
    )
