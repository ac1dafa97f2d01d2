"""The command line, put together from `palimpsest.commands`. torch is loaded inside a command, not before.

Exit codes  0 done, 1 something the user can change (said in one sentence), 2 wrong usage, 130 interrupted.
Streams     standard output carries what was asked for; progress and remarks go to standard error.
"""

import os
import sys
from typing import Annotated

import typer
from rich.markup import escape

from palimpsest.commands.bench import bench
from palimpsest.commands.chat import chat
from palimpsest.commands.convert import convert, validate
from palimpsest.commands.doctor import doctor
from palimpsest.commands.eval import evaluate
from palimpsest.commands.explain import explain
from palimpsest.commands.generate import generate
from palimpsest.commands.info import info
from palimpsest.commands.lab import app as lab
from palimpsest.commands.options import INTERRUPTED, Command, Group
from palimpsest.commands.plan import plan
from palimpsest.commands.recipes import recipes
from palimpsest.commands.train import train
from palimpsest.display import notes

USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
)  # the library's own refusals; anything else is a bug and shows its trace

app = typer.Typer(
    name="palimpsest",
    cls=Group,
    help="Train, run and inspect Kimi Linear: language models whose memory keeps its size, however long the text.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: what is said goes nowhere, and no file takes its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as the process lives
    try:
        code = app(arguments, standalone_mode=False)
        sys.stdout.flush()  # while what goes wrong can still be said
        return code if isinstance(code, int) else 0
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort):
        notes.print("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        return 0
    except USER_ERRORS as error:
        notes.print(f"[bold red]error:[/] {escape(str(error) or type(error).__name__)}", soft_wrap=True)
        return 1
    except Exception as error:
        show = getattr(error, "show", None)  # wrong usage shows itself; its class lives in whichever click typer brings
        if show is None:
            raise
        show()
        return getattr(error, "exit_code", 2)


def _version(wanted: bool) -> None:
    if wanted:
        from palimpsest import __version__

        typer.echo(f"palimpsest {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    pass


for command in (train, recipes, plan, generate, chat, info, explain, convert, validate, doctor, bench):
    app.command(cls=Command)(command)
app.command(name="eval", cls=Command)(evaluate)
app.add_typer(lab)
