"""The command line: train, generate, info. A command is one function here; torch is loaded inside it, not before.

Exit codes  0 done, 1 something the user can change (said in one sentence), 2 wrong usage, 130 interrupted.
Streams     standard output carries what was asked for; progress and remarks go to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from palimpsest.explainer.command import explain
from palimpsest.lab.command import app as lab

INTERRUPTED = 130
USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
)  # the library's own refusals; anything else is a bug and shows its trace

app = typer.Typer(
    name="palimpsest",
    help="Train, run and inspect Kimi Linear: language models whose memory keeps its size, however long the text.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
notes = Console(stderr=True, highlight=False)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors, no progress.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output, for programs.")]


def run(arguments: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    try:
        code = app(arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort):
        notes.print("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has enough
        sys.stderr.close()
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


# --- train ------------------------------------------------------------------------------------------------------------


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or one of its functions: `recipes/demo.py`, `recipes/mine.py:large`.")
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
        bool, typer.Option("--overwrite", help="Remove the run in the folder and start anew.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe with its settings and stop.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Train a model by a recipe.

    Ctrl-C saves a checkpoint and stops; the same command with `--resume` goes on from there.
    The folder gets metrics.jsonl, loss.png, loss.svg, result.json and checkpoints that `generate` reads.

    Example: `palimpsest train recipes/demo.py --set minutes=1`
    """
    import shutil

    from palimpsest.train import load_recipe
    from palimpsest.train import train as run_recipe
    from palimpsest.train.checkpoints import is_run
    from palimpsest.train.recipe import as_dict

    loaded = load_recipe(recipe, _settings(set or []))
    if show:
        typer.echo(json.dumps(as_dict(loaded), indent=2))
        return 0
    if resume and overwrite:
        raise ValueError("--resume and --overwrite were both given; choose one")
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started; one of them speaks
    path, _, function = recipe.partition(":")
    folder = out or Path("runs") / "-".join(filter(None, [Path(path).stem, function]))
    if overwrite and is_run(folder) and first:
        shutil.rmtree(folder)
    with _training_display(quiet, as_json or not first) as report:
        result = run_recipe(loaded, folder, resume=resume, report=report)
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


@contextmanager
def _training_display(quiet: bool, as_json: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    if as_json:
        yield lambda event: None if event["event"] == "step" else print(json.dumps(event), flush=True)
    elif quiet:
        yield lambda event: None
    elif notes.is_terminal:
        with _Bar() as bar:
            yield bar
    else:
        yield _Lines()


@dataclass
class _Standing:
    """What a display has to know between two events."""

    rate: float = 0.0  # tokens a second, smoothed
    heldout: float | None = None
    steps: list[tuple[float, float, float]] = field(default_factory=list)  # time, tokens, share

    def take(self, event: dict[str, Any]) -> None:
        if event["event"] == "evaluate":
            self.heldout = event["heldout_bits_per_byte"]
        if event["event"] == "step":
            self.steps = [*self.steps[-40:], (time.monotonic(), event["tokens"], event["share"])]
            (t0, n0, _), (t1, n1, _) = self.steps[0], self.steps[-1]
            self.rate = (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds to the end, by how fast the share of the last steps grew."""
        if len(self.steps) < 2:
            return None
        (t0, _, s0), (t1, _, s1) = self.steps[0], self.steps[-1]
        return (1 - s1) * (t1 - t0) / (s1 - s0) if s1 > s0 else None

    def words(self, event: dict[str, Any]) -> str:
        parts = [f"{self.rate:,.0f} tok/s", f"loss {event['loss']:.2f}"]
        parts.append(f"bits/byte {event['bits_per_byte']:.2f}")
        if self.heldout is not None:
            parts.append(f"held out {self.heldout:.2f}")
        if event["skipped"]:
            parts.append(f"{event['skipped']} skipped")
        return "  ".join([*parts, f"ETA {_clock(self.remaining)}"])


class _Bar:
    """A live line: bar, rate, loss, bits per byte, time left. Evaluations stay above it."""

    def __init__(self):
        columns = (BarColumn(bar_width=None), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=notes, expand=True)  # the words first, the bar in what room is left
        self.task = self.progress.add_task("starting", total=1.0)
        self.standing = _Standing()

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *_):
        self.progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        self.standing.take(event)
        if event["event"] == "step":
            self.progress.update(self.task, completed=event["share"], description=self.standing.words(event))
        elif event["event"] == "end" and event["finished"]:
            self.progress.update(self.task, completed=1.0)
        for line in _remarks(event):
            self.progress.console.print(line)


class _Lines:
    """The same for a log file: a line every few seconds."""

    def __init__(self, every: float = 10.0):
        self.every, self.last, self.standing = every, 0.0, _Standing()

    def __call__(self, event: dict[str, Any]) -> None:
        self.standing.take(event)
        if event["event"] == "step" and time.monotonic() - self.last > self.every:
            self.last = time.monotonic()
            notes.print(f"{event['share']:4.0%}  step {event['step']}  {self.standing.words(event)}", soft_wrap=True)
        for line in _remarks(event):
            notes.print(line, soft_wrap=True)


def _remarks(event: dict[str, Any]) -> list[str]:
    if event["event"] == "start":
        where = "resumed at step {}".format(event["step"]) if event["resumed"] else "new run"
        return [
            f"{event['parameters']:,} parameters on {event['device']} x {event['processes']}; {where}",
            f"{event['documents']:,} documents, {_size(event['bytes'])}; "
            f"held out {event['heldout_documents']:,}, {_size(event['heldout_bytes'])}",
        ]
    if event["event"] == "evaluate":
        others = ", ".join(f"{name} {bits:.2f}" for name, bits in event["compressors"].items())
        bits, size = event["heldout_bits_per_byte"], _size(event["heldout_bytes"])
        return [f"step {event['step']}: held-out {bits:.3f} bits/byte on {size} ({others})"]
    return []


def _print_result(result, folder: Path) -> None:
    table = Table(title="held-out bits per byte", title_justify="left", show_header=False)
    table.add_row("this model", f"[bold]{result.heldout_bits_per_byte:.3f}[/]")
    for name, bits in result.compressors.items():
        table.add_row({"unigram": "entropy of single bytes"}.get(name, name), f"{bits:.3f}")
    console = Console(highlight=False)
    console.print(table)
    progress = result.progress
    console.print(
        f"{progress.step:,} steps, {progress.tokens:,} tokens in {_clock(progress.seconds)}; "
        f"loss curve {folder / 'loss.png'}; model {result.checkpoint}",
        soft_wrap=True,
    )


# --- generate ---------------------------------------------------------------------------------------------------------


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A run's folder, or any folder with a Kimi Linear checkpoint.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; may be given several times.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read one prompt from a file; `-` is standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most this many tokens each.")] = 200,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0 always takes the likeliest token.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens.", show_default=False)] = None,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest that reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Leave out tokens less likely than this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="More than 1 discourages repetition.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given several times.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="`bytes` or a tokenizer.json; by default what the folder says.", show_default=False),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Save what was read and written, to go on later.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on from a file written by --save.")] = None,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, or `auto`.")] = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Continue text with a trained model, token by token.

    Example: `palimpsest generate runs/demo --prompt "def read_lines(path):"`
    """
    from palimpsest.generate import DecodeState, Sampling
    from palimpsest.models.kimi_linear import KimiLinearForCausalLM

    folder = _checkpoint_of(model)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts = list(prompt or []) + ([_read_prompt(prompt_file)] if prompt_file else [])
    if load is not None and len(prompts) > 1:
        raise ValueError(f"{len(prompts)} prompts were given with --load, which continues one text; give one or none")
    if load is None and not prompts:
        raise ValueError("no prompt was given; use --prompt TEXT, --prompt-file FILE or --load FILE")
    network = KimiLinearForCausalLM.from_pretrained(folder, device=_device(device))
    words = _tokenizer_of(folder, tokenizer)
    start = None if load is None else DecodeState.load(load, network)
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": tuple(stop or ()), "tokenizer": words}
    began, count, last = time.monotonic(), 0, None
    for i, text in enumerate(prompts or [""]):
        last = _continue(network, text, start, i, seed + i, options, quiet, as_json)
        count += len(last.tokens[0])
    if save is not None and last is not None:
        last.decode_state.save(save, network)
    if not quiet and not as_json:
        seconds = time.monotonic() - began
        notes.print(f"\n{count} tokens, {count / max(seconds, 1e-9):,.0f} tok/s", style="dim")
    return 0


def _continue(network, text: str, start, number: int, seed: int, options: dict[str, Any], quiet: bool, as_json: bool):
    """Streams one continuation to standard output and returns the generation."""
    from palimpsest.generate import stream

    if start is None or text:
        pieces = stream(network, text, state=None if start is None else start.state, seed=seed, **options)
    else:
        pieces = stream(network, start, seed=seed, **options)
    if not as_json and not quiet:
        if number:
            typer.echo("\n")
        Console(highlight=False).print(Text(text, style="dim"), end="")
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            generation = end.value
            break
        if not as_json:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    if as_json:
        told = {"prompt": text, "text": generation.texts[0], "tokens": generation.tokens[0]}
        print(json.dumps(told | {"reason": generation.reasons[0]}), flush=True)
    else:
        typer.echo()
    return generation


def _read_prompt(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompt file {str(file)!r} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error


def _checkpoint_of(folder: str) -> Path:
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


def _tokenizer_of(folder: Path, name: str | None):
    from palimpsest.text import load_tokenizer

    if name is not None:
        return load_tokenizer(name)
    if (folder / "palimpsest.json").is_file():
        name = json.loads((folder / "palimpsest.json").read_text(encoding="utf-8")).get("tokenizer", "bytes")
        return load_tokenizer("bytes" if name == "bytes" else folder / str(name))
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    raise ValueError(f"folder {str(folder)!r} does not say which tokenizer it needs; give --tokenizer bytes or a file")


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name!r}, but this machine has no CUDA device; use cpu or auto")
    try:
        return str(torch.device(name))
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is unknown; use cpu, cuda or auto") from error


# --- info -------------------------------------------------------------------------------------------------------------


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(help="`48b`, `tiny`, a run's folder, a checkpoint's folder, or a recipe.")
    ] = None,
    as_json: Json = False,
) -> int:
    """What a model is made of and what it holds in memory; without a model, what this machine can run.

    Example: `palimpsest info 48b`
    """
    from palimpsest.models.kimi_linear import card

    facts = {"machine": card.machine()} | ({} if model is None else {"model": card.describe(_config_of(model))})
    if as_json:
        typer.echo(json.dumps(facts))
        return 0
    console = Console(highlight=False)
    if model is not None:
        _print_model(console, model, facts["model"])
    _print_machine(console, facts["machine"])
    return 0


def _config_of(name: str):
    from palimpsest.models.kimi_linear.checkpoint import read_config
    from palimpsest.models.kimi_linear.config import KimiLinearConfig

    presets = {"48b": KimiLinearConfig.official_48b, "tiny": KimiLinearConfig.tiny}
    if name.lower() in presets:
        return presets[name.lower()]()
    if name.partition(":")[0].endswith(".py"):
        from palimpsest.train import load_recipe

        return load_recipe(name).model
    if not Path(name).is_dir():
        raise ValueError(f"{name!r} is no model; give one of {', '.join(presets)}, a folder, or a recipe file")
    return read_config(_checkpoint_of(name))


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
        table.add_row(f"{row['tokens']:,}", _size(row["state"]), _size(row["latent"]), share, _size(row["full"]))
    console.print(table)


def _print_machine(console: Console, facts: dict[str, Any]) -> None:
    device = facts.get("gpu") or f"CPU, {facts['threads']} threads"
    console.print(f"this machine: {device}; torch {facts['torch']}, Python {facts['python']}")
    calls = facts["backends"]
    table = Table(title="backends: the first ok runs", title_justify="left")
    table.add_column("call")
    for name in next(iter(calls.values())):
        table.add_column(name, overflow="fold")
    for call, answers in calls.items():
        table.add_row(call, *answers.values())
    console.print(table)


app.command()(explain)
app.add_typer(lab)


# --- words ------------------------------------------------------------------------------------------------------------


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "--:--"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
