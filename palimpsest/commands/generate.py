"""`palimpsest generate`."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from palimpsest.commands.options import (
    Json,
    MinP,
    Plugin,
    Quiet,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    checkpoint_of,
    sampling_of,
)
from palimpsest.display import notes

LONGEST_PROMPT = 256 << 20  # bytes


def generate(
    model: Annotated[str, typer.Argument(help="A run's folder, or any folder with a Kimi Linear checkpoint.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; may be given several times.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read one prompt from a file; `-` is standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most this many tokens each.")] = 200,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given several times.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="`bytes` or a tokenizer.json; by default what the folder says.", show_default=False),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Save what was read and written, to go on later.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on from a file written by --save.")] = None,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, or `auto`.")] = "auto",
    plugin: Plugin = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Continue text with a trained model, token by token.

    How tokens are chosen travels with the checkpoint, in its generation_config.json; options here come first.

    Example: `palimpsest generate runs/demo --prompt "def read_lines(path):"`
    """
    from palimpsest.generate import DecodeState
    from palimpsest.models.kimi_linear import KimiLinearForCausalLM
    from palimpsest.text import tokenizer_of

    folder = checkpoint_of(model)
    sampling = sampling_of(folder, temperature, top_k, top_p, min_p, repetition_penalty)
    prompts = list(prompt or []) + ([_read_prompt(prompt_file)] if prompt_file else [])
    if load is not None and len(prompts) > 1:
        raise ValueError(f"{len(prompts)} prompts were given with --load, which continues one text; give one or none")
    if save is not None and len(prompts) > 1:
        raise ValueError(f"{len(prompts)} prompts were given with --save, which keeps one text's state; give one")
    if save is not None and not save.absolute().parent.is_dir():
        raise ValueError(f"--save {str(save)!r} is in no folder that exists; make it first, or give another place")
    if load is None and not prompts:
        raise ValueError("no prompt was given; use --prompt TEXT, --prompt-file FILE or --load FILE")
    network = KimiLinearForCausalLM.from_pretrained(folder, device=device_of(device))
    words = tokenizer_of(folder, tokenizer)
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
    if str(file) == "-" and sys.stdin is None:
        raise ValueError("--prompt-file - reads standard input, which is closed; give a file, or --prompt TEXT")
    if file.is_char_device() and not file.samefile("/dev/stdin"):  # a pipe ends, a device may not
        raise ValueError(f"prompt file {str(file)!r} is a device; give a file, or - for standard input")
    with nullcontext(sys.stdin.buffer) if str(file) == "-" else open(file, "rb") as opened:
        content = opened.read(LONGEST_PROMPT + 1)
    if len(content) > LONGEST_PROMPT:
        raise ValueError(f"prompt file {str(file)!r} is longer than {LONGEST_PROMPT} bytes; give less of it")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompt file {str(file)!r} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error


def device_of(name: str) -> str:
    """The device that --device names."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if name != "cpu" and (kind != "cuda" or not (number.isdecimal() or name == "cuda")):
        raise ValueError(f"--device {name!r} is unknown; use cpu, cuda, cuda:1 and the like, or auto")
    count = torch.cuda.device_count()
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name!r}, but this machine has no CUDA device; use cpu or auto")
    if kind == "cuda" and int(number or 0) >= count:
        raise ValueError(
            f"--device {name!r}, but this machine has {count} CUDA devices, counted from 0; use one of them"
        )
    return name
