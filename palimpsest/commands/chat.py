"""`palimpsest chat`."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from palimpsest.commands.generate import device_of
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
from palimpsest.display import notes, size

HELP = """\
/undo          take the last turn back
/retry         the last reply again, with other chances
/fork NAME     keep the conversation as it stands under a name
/go NAME       go on from there; the conversation left is kept under its last name, or as `main`
/forks         what is kept
/save FILE     write words and state to a file
/load FILE     go on from such a file
/state         tokens read, and what the state takes
/quit          leave; so does the end of the input
A line that ends in \\ goes on in the next; Ctrl-C ends a reply."""


def chat(
    model: Annotated[str, typer.Argument(help="A run's folder, or any folder with a Kimi Linear checkpoint.")],
    system: Annotated[
        str | None, typer.Option(help="What the model is told first; needs a chat template.", show_default=False)
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Read lines as they stand and continue them; no chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most this many a reply.")] = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Annotated[list[str] | None, typer.Option(help="End a reply before this text; may be given again.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed and words give the same replies.")] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="`bytes` or a tokenizer.json; by default what the folder says.", show_default=False),
    ] = None,
    load: Annotated[Path | None, typer.Option(help="Go on from a file written by /save.")] = None,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, or `auto`.")] = "auto",
    plugin: Plugin = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Talk with a model. Its state is kept between turns: none is read twice, and any can be taken back, forked and saved.

    A checkpoint with a chat template is spoken to through it; another continues what you type, as it stands.
    Lines of standard input are turns too, without a terminal. /help says what else can be typed.

    Example: `palimpsest chat runs/demo`
    """
    from palimpsest.generate import Conversation
    from palimpsest.models.kimi_linear import KimiLinearForCausalLM
    from palimpsest.text import chat_template_of, tokenizer_of

    folder = checkpoint_of(model)
    sampling = sampling_of(folder, temperature, top_k, top_p, min_p, repetition_penalty)
    template = None if plain else chat_template_of(folder)
    if system is not None and template is None:
        raise ValueError(
            "--system was given, and the model has no chat template to say it with; leave it out, or put it in the first line"
        )
    if system is not None and template is not None:
        template.render([{"role": "system", "content": system}, {"role": "user", "content": "?"}], reply=True)
    words = tokenizer_of(folder, tokenizer)
    network = KimiLinearForCausalLM.from_pretrained(folder, device=device_of(device))
    begun = Conversation(() if system is None else ({"role": "system", "content": system},))
    talk = Talk(begun if load is None else Conversation.load(load, network), network)
    options = {"tokenizer": words, "template": template, "max_new_tokens": max_new_tokens, "sampling": sampling}
    options |= {"stop": tuple(stop or ())}
    shown = sys.stdin is not None and sys.stdin.isatty() and not as_json
    if shown:
        with suppress(ImportError):  # the keys of a shell, where Python has them: input() uses it
            importlib.import_module("readline")
    if shown and not quiet:
        how = "through its chat template" if template is not None else "as it stands, to be continued"
        notes.print(f"what you type is read {how}; /help says what else there is", style="dim")
    while (line := _line(shown)) is not None:
        try:
            if line.startswith("/") and not line.startswith("//"):
                again = talk.obey(line, _tell(as_json))
                if again is None:
                    continue
                if again is QUIT:
                    break
                line = again
            elif not line:
                continue
            else:
                line = line.removeprefix("/") if line.startswith("//") else line
                line += "" if template is not None else "\n"
            talk.turns += 1
            _answer(talk, line, seed + talk.turns, options, as_json)
        except ValueError as error:  # of this line alone; the conversation stands
            if not shown:
                raise
            notes.print(f"[bold red]error:[/] {error}", soft_wrap=True, markup=True)
    return 0


QUIT = "\0quit"


class Talk:
    """What a session at the terminal holds: the conversation, those kept by name, and a count of turns for the seeds."""

    def __init__(self, conversation: Any, network: Any):
        self.conversation, self.network, self.turns = conversation, network, 0
        self.name, self.kept = "main", {}

    def obey(self, line: str, tell: Callable[[str], None]) -> str | None:
        """Do what a line with a slash says. Returns words to say again, QUIT, or None.

        Raises:
            ValueError: there is no such command, or it cannot be done.
        """
        from palimpsest.generate import Conversation

        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("quit", "exit", "q"):
            return QUIT
        if name in ("help", "?"):
            tell(HELP)
        elif name == "undo":
            self.conversation = self.conversation.undo()
            tell(f"taken back; {_count(self.conversation)}")
        elif name == "retry":
            words = next((m["content"] for m in reversed(self.conversation.messages) if m["role"] == "user"), None)
            self.conversation = self.conversation.undo()
            return words
        elif name == "fork":
            self.kept[_given(rest, line, "a name")] = self.conversation
            self.name = rest
            tell(f"kept as {rest}")
        elif name == "go":
            if rest not in self.kept:
                raise ValueError(
                    f"{rest!r} is not kept; there are {', '.join(self.kept) or 'none'}: /fork NAME keeps one"
                )
            self.kept[self.name if self.name != rest else "main"] = self.conversation
            self.conversation, self.name = self.kept[rest], rest
            tell(f"at {rest}; {_count(self.conversation)}")
        elif name == "forks":
            tell("\n".join(f"{name:12} {_count(kept)}" for name, kept in self.kept.items()) or "none")
        elif name == "save":
            self.conversation.save(Path(_given(rest, line, "a file")), self.network)
            tell(f"saved; {_count(self.conversation)}")
        elif name == "load":
            self.conversation = Conversation.load(Path(_given(rest, line, "a file")), self.network)
            tell(f"loaded; {_count(self.conversation)}")
        elif name == "state":
            tell(_count(self.conversation))
        else:
            raise ValueError(f"/{name} is unknown; /help lists what there is, and // begins a line with a slash")
        return None


def _given(rest: str, line: str, what: str) -> str:
    if not rest:
        raise ValueError(f"{line!r} needs {what}")
    return rest


def _count(conversation: Any) -> str:
    turns = sum(message["role"] == "assistant" for message in conversation.messages)
    held = 0 if conversation.state is None else conversation.state.state.nbytes
    return f"{turns} turns, {conversation.num_tokens:,} tokens, a state of {size(held)}"


def _answer(talk: Talk, line: str, seed: int, options: dict[str, Any], as_json: bool) -> None:
    from palimpsest.generate import reply

    pieces = reply(talk.network, talk.conversation, line, seed=seed, **options)
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            talk.conversation = end.value
            break
        if not as_json:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    if as_json:
        last = talk.conversation
        told = {"reply": last.messages[-1]["content"], "reason": last.reason, "tokens": last.num_tokens}
        typer.echo(json.dumps(told))
    else:
        typer.echo(" [ended]" if talk.conversation.reason == "interrupted" else "")


def _tell(as_json: bool) -> Callable[[str], None]:
    return lambda line: notes.print(line, style="dim", markup=False, soft_wrap=True)


def _line(shown: bool) -> str | None:
    """The next turn; None at the end of the input."""
    if sys.stdin is None:
        raise ValueError("standard input is closed; type at a terminal, or send lines through a pipe")
    parts: list[str] = []
    while True:
        try:
            line = input("> " if not parts else ". ") if shown else sys.stdin.readline()
        except EOFError:
            typer.echo()
            line = ""
            shown = False  # the end, not an empty line
        if not shown and not line:
            return "\n".join(parts) or None
        line = line.rstrip("\r\n")
        if not line.endswith("\\"):
            return "\n".join([*parts, line])
        parts.append(line[:-1])
