"""What the lessons share beside their look: text with links, results, exercises.

A lesson has four homes: `marimo edit`, where code is changed in place; `marimo run`, where it is not shown, so that
exercises bring an editor of their own; the site, where it has run already; and plain Python, which prints.
"""

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import marimo as mo


def in_browser() -> bool:
    return mo.app_meta().mode in ("edit", "run")


def tell(*parts: Any) -> None:
    """A result, as a line below the cell; printed where there is no cell."""
    line = " ".join(map(str, parts))
    if in_browser():
        mo.output.append(mo.md(f"```text\n{line}\n```"))
    else:
        print(line)


def text(markdown: str) -> mo.Html:
    """Markdown whose links to other lessons, `](02_name.md)`, lead there in each home."""
    if in_browser():
        markdown = re.sub(r"\[([^\]]+)\]\((\w+)\.md\)", lambda link: _link(link[1], link[2]), textwrap.dedent(markdown))
    return mo.md(markdown)


def exercise(number: int, function: Callable) -> Any:
    """Exercise `number`, in the words of the stub's docstring; with an editor where code is not shown."""
    asked = f"**Exercise {number}.** {inspect.cleandoc(function.__doc__ or '')}"
    if mo.app_meta().mode != "run":
        return mo.md(asked)
    return mo.ui.code_editor(textwrap.dedent(inspect.getsource(function)), label=asked, debounce=True)


def yours(place: Any, function: Callable) -> Callable:
    """What the reader wrote: in the editor at `place` if there is one, else the function in the cell."""
    if not isinstance(place, mo.ui.code_editor):
        return function
    names = dict(function.__globals__)
    try:
        exec(compile(place.value, "your answer", "exec"), names)
        return names[function.__name__]
    except Exception as error:
        problem = error  # the name `error` ends with this block
        return lambda *_, **__: _again(problem)


def verdict(check: Callable[[Callable], str], function: Callable) -> Any:
    """What the check says of the function: a callout, or a line where there is no browser."""
    try:
        said = check(function)
    except Exception as error:
        said = f"Not yet: it ended with {type(error).__name__}: {error}"
    if not in_browser():
        print(f"{check.__name__.replace('check_', 'Exercise ')}. {said}")
        return None
    return mo.callout(mo.md(said), kind="success" if said.startswith("Right") else "neutral")


def solutions(*functions: Callable) -> Any:
    """One solution an exercise, folded."""
    code = (textwrap.dedent(inspect.getsource(function)) for function in functions)
    return mo.accordion({f"Solution {n}": mo.md(f"```python\n{x.strip()}\n```") for n, x in enumerate(code, 1)})


def _link(title: str, stem: str) -> str:
    request = mo.app_meta().request
    opened = None if request is None else request.query_params.get("file")
    if opened:  # marimo was given the folder
        folder = (opened if isinstance(opened, str) else opened[0]).rpartition("/")[0]
        return f"[{title}](?file={folder + '/' if folder else ''}{stem}.py)"
    return f"{title}: `marimo {mo.app_meta().mode} course/{stem}.py`"


def _again(problem: Exception) -> Any:
    raise problem
