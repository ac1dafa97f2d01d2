"""A checkpoint's chat template: from messages to the text that the model was trained to read.

Templates are Jinja, from chat_template.jinja or tokenizer_config.json. They come from strangers, so they run in Jinja's
sandbox: no attribute of Python's own, nothing changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from palimpsest.checks import shown
from palimpsest.files import read_bytes, read_object

FILE = "chat_template.jinja"
LARGEST = 1 << 20
MARKS = ("bos_token", "eos_token", "pad_token", "unk_token")
Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """How messages are written for a model.

    Attributes:
        source: the template, in Jinja.
        marks: the special tokens that it may name, such as "eos_token".
        name: where it is from, for what is said when it refuses.

    >>> template = ChatTemplate("{% for m in messages %}[{{ m.role }}] {{ m.content }}\\n{% endfor %}")
    >>> template.render([{"role": "user", "content": "Hello."}])
    '[user] Hello.\\n'
    """

    source: str
    marks: Mapping[str, str] = field(default_factory=dict)
    name: str = "the template"

    def render(self, messages: Sequence[Message], *, reply: bool = False, **more: Any) -> str:
        """The text of messages.

        Args:
            messages: each with "role" and "content".
            reply: with the head of the reply that the model is to write.
            more: what else the template asks for, such as tools.

        Raises:
            ValueError: the template is none, or refuses these messages; ImportError: jinja2 is not installed.
        """
        try:
            import jinja2
        except ImportError as error:
            raise ImportError("a chat template needs jinja2: pip install palimpsest-kda[cli]") from error
        try:
            template = _environment().from_string(self.source)
            return template.render(messages=list(messages), add_generation_prompt=reply, **self.marks, **more)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{self.name} is no chat template: {error.message} in line {error.lineno}") from error
        except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
            roles = ", ".join(dict.fromkeys(str(message.get("role")) for message in messages))
            hint = "; it may know no system role: leave the system message out" if "system" in roles else ""
            raise ValueError(
                f"{self.name} refuses messages of {roles}: {error or type(error).__name__}{hint}"
            ) from error


def chat_template_of(folder: str | Path) -> ChatTemplate | None:
    """The chat template of a checkpoint's folder; None if it has none, as a model that was never taught to chat.

    Raises:
        ValueError: its files cannot be read.
    """
    folder = Path(folder)
    config = read_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    text = lambda mark: mark.get("content") if isinstance(mark, dict) else mark
    marks = {name: mark for name in MARKS if isinstance(mark := text(config.get(name)), str)}
    if (folder / FILE).is_file():
        source, name = read_bytes(folder / FILE, limit=LARGEST).decode("utf-8", errors="replace"), str(folder / FILE)
    else:
        source, name = config.get("chat_template"), str(folder / "tokenizer_config.json")
        if isinstance(source, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default", next(iter(named.values()), None))
        if source is None:
            return None
        if not isinstance(source, str):
            raise ValueError(f"{name!r} has the chat template {shown(source)}; expected text")
    return ChatTemplate(source, marks, repr(name))


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateRuntimeError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: where trainers find the replies; here only what stands inside."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise TemplateRuntimeError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
