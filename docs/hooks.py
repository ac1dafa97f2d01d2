"""What the site adds to docs/: each lesson of course/ as a page, run on the spot; the lab's reports, the benchmarks and the
changelog from where they lie; the explainer, exported; mathematics as MathML; doctests as code.

A lesson is a marimo notebook. Its page shows the notebook's text, code, values and figures, with every control where it
starts; the notebook itself is for playing. Nothing is written into the repository.
"""

import contextlib
import html
import importlib.util
import io
import os
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
COURSE, LAB, BENCHMARKS = ROOT / "course", ROOT / "results" / "lab", ROOT / "benchmarks" / "results"
PAGE = ROOT / "palimpsest" / "explainer" / "static"  # the explainer's; the site shares its type
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
LINK = re.compile(r"(?<!`)\[((?:[^\[\]]|`[^`]*`)*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")
_pages: dict[tuple[str, str], tuple[str, dict[str, bytes]]] = {}  # (name, source) -> page, figures: for `mkdocs serve`


class Doctests(griffe.Extension):
    """The examples in docstrings, as code: without a fence, Markdown takes their brackets for links."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^>>> .*(?:\n.+)*", r"```pycon\n\g<0>\n```", obj.docstring.value, flags=re.MULTILINE
            )


def lessons() -> list[Path]:
    return sorted(COURSE.glob("[0-9][0-9]_*.py"))


def on_config(config):
    """In the navigation, the line "course/*.md" stands for all lessons."""
    for group in config.nav:
        for pages in group.values():
            if "course/*.md" in pages:
                place = pages.index("course/*.md")
                pages[place : place + 1] = [f"course/{path.stem}.md" for path in lessons()]
    return config


def on_files(files, config):
    for path in lessons():
        page, figures = _page(path)
        files.append(File.generated(config, f"course/{path.stem}.md", content=page))
        for name, content in figures.items():
            files.append(File.generated(config, f"course/{name}", content=content))
    for path, uri in published().items():
        if path.suffix != ".py":
            content = path.read_text() if path.suffix == ".md" else path.read_bytes()
            files.append(File.generated(config, uri, content=content))
    return files


@cache
def published() -> dict[Path, str]:
    """Files outside of docs/ that the site has: where they lie, and where they are on the site."""
    found = {ROOT / "CHANGELOG.md": "changelog.md"}
    found |= {path: f"course/{path.stem}.md" for path in lessons()}
    found |= {path: f"gallery/{path.parent.name}.md" for path in LAB.glob("*/report.md")}
    found |= {path: f"gallery/{path.parent.name}-{path.name}" for path in LAB.glob("*/*.png")}  # their names recur
    found |= {path: f"benchmarks/{path.name}" for path in BENCHMARKS.glob("*/*.*") if path.suffix in (".md", ".png")}
    found |= {path: f"styles/{path.name}" for path in (PAGE / "assets").glob("*-latin-wght-normal.woff2")}
    return found


def on_page_markdown(markdown, page, config, files):
    place = page.file.src_uri
    home = next((path.parent for path, uri in published().items() if uri == place), (ROOT / "docs" / place).parent)
    if place == "gallery.md":
        home, table = LAB, (LAB / "README.md").read_text().partition("| results |")
        markdown = markdown.replace("](../results/lab/", "](").replace("<!-- results -->", "".join(table[1:]))
    if place == "lab/index.md":
        verdicts = "\n".join(map(verdict, sorted(LAB.glob("*/report.md"))))
        home, markdown = LAB, markdown.replace("<!-- verdicts -->", verdicts)
    if place == "course/index.md":
        markdown = markdown.replace("<!-- lessons -->", "\n".join(map(_line_of_index, lessons())))
    markdown = re.sub(r"^```python\n(?=>>>)", "```pycon\n", markdown, flags=re.MULTILINE)  # prompts are no code
    return LINK.sub(lambda x: _link(x[1], x[2], x[3] or "", home, place), markdown)


def verdict(report: Path) -> str:
    """What a report says, short: its question, its verdict and first plot, what it took, and the command."""
    text, name = report.read_text(), report.parent.name
    found = {
        key: re.search(pattern, text, re.MULTILINE)
        for key, pattern in {
            "question": r"^# [^:]+: (.*)$",
            "verdict": r"^\*\*Verdict: (.*)$",
            "plot": r"^!\[.*\]\((.*)\)$",
            "took": r"Seeds: (.*?)\. Time, summed over points: (.*?)\.$",
            "command": r"^- (.*?): `(.*?)` on (.*)$",
        }.items()
    }
    if found["question"] is None or found["verdict"] is None or found["command"] is None:
        raise PluginError(f"{report} has no question, verdict or command; write it again with palimpsest lab")
    outcome, _, because = found["verdict"][1].partition("**")
    seeds = f" Seeds {found['took'][1]}; {found['took'][2]} of points in all." if found["took"] else ""
    lines = [f"## {found['question'][1][0].upper()}{found['question'][1][1:]}", ""]
    lines += [f"**{outcome.rstrip('.').capitalize()}** ([{name}]({name}/report.md)).{because}", ""]
    lines += [f"![{name}]({name}/{found['plot'][1]})", ""] if found["plot"] else []
    date, command, machine = found["command"].groups()
    return "\n".join([*lines, f"`{command}`, {date}, on {machine}.{seeds}", ""])


def _link(text: str, target: str, anchor: str, home: Path, place: str) -> str:
    """A link to a file of the repository: to its page where it has one; else the text, and where the file lies."""
    path = (home / target).resolve()
    if path in published():
        return f"[{text}]({os.path.relpath(published()[path], Path(place).parent)}{anchor})"
    if not path.exists() or (ROOT / "docs") in path.parents:
        return f"[{text}]({target}{anchor})"
    name = path.relative_to(ROOT).as_posix()
    return text if name in text else f"{text} (`{name}`)"


def on_page_content(content, page, config, files):
    return FORMULA.sub(lambda found: mathml(html.unescape(found[3]), block=found[2] == "["), content)


def on_post_build(config):
    from palimpsest.explainer.export import export
    from palimpsest.explainer.server import Library

    export(Path(config.site_dir) / "explainer", Library())


def mathml(tex: str, block: bool) -> str:
    """The formula as MathML, which browsers draw by themselves.

    Raises:
        PluginError: something in it was not understood; the converter would have printed it as text.
    """
    tex = re.sub(r"\{(aligned|align|gathered)\}", "{align*}", tex.strip())
    result = convert(tex, display="block" if block else "inline")
    if leftover := re.findall(r"<m[io]>(\\\w+|&amp;|&)</m[io]>", result):
        raise PluginError(f"formula not understood at {leftover[0]!r}: {tex}")
    return result


def _page(path: Path) -> tuple[str, dict[str, bytes]]:
    key = path.stem, path.read_text()
    if key not in _pages:
        try:
            _pages[key] = _run(path)
        except Exception as error:
            raise PluginError(f"course/{path.name} does not run: {type(error).__name__}: {error}") from error
    return _pages[key]


def _run(path: Path) -> tuple[str, dict[str, bytes]]:
    import matplotlib

    matplotlib.use("agg")
    spec = importlib.util.spec_from_file_location(f"lesson_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    lesson = importlib.util.module_from_spec(spec)
    if str(COURSE) not in sys.path:
        sys.path.insert(0, str(COURSE))  # lessons share style.py, which stands beside them
    spec.loader.exec_module(lesson)
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "path"}):
        with contextlib.redirect_stdout(Printed()) as printed:
            values, _ = lesson.app.run()
        cells = [c for c in lesson.app._cell_manager.cell_data() if c.cell_id != "setup"]
        return _written(path.stem, cells, values, printed.by_cell)


class Printed(io.TextIOBase):
    """What each cell prints. A cell is known by the file name that marimo gives its code."""

    def __init__(self):
        self.by_cell: dict[str, str] = {}

    def write(self, text: str) -> int:
        frame = sys._getframe()
        while frame is not None:
            if found := re.search(r"__marimo__cell_(\w+?)_\.py$", frame.f_code.co_filename):
                self.by_cell[found[1]] = self.by_cell.get(found[1], "") + text
                break
            frame = frame.f_back
        return len(text)


def _written(stem: str, cells, values, printed) -> tuple[str, dict[str, bytes]]:
    blocks, early, figures, titled = [], [], {}, False
    for cell, value in zip(cells, values, strict=True):
        text = getattr(value, "_markdown_text", None)
        if text is not None and not titled:
            titled = True
            play = f"*This page is `course/{stem}.py`. To play with it: `marimo edit course/{stem}.py`.*"
            blocks += [textwrap.dedent(text).strip(), play, *early]
            continue
        here = blocks if titled else early
        asked = re.search(r"def (check|solution)_1|verdict\(|exercise\(", cell.code)
        if not asked and (text is None or not re.match(r"(mo\.md|text)\(", cell.code)):
            here.append(_code(cell))
        if "verdict(" in cell.code:  # of a stub; what it would say of an answer is for the notebook
            continue
        if text := printed.get(cell.cell_id, "").strip():
            here.append(f"```text\n{text}\n```")
        if value is not None:
            here.append(_value(value, f"{stem}-{len(figures) + 1}.svg", figures))
    return "\n\n".join(blocks) + "\n", figures


def _code(cell) -> str:
    fence = f"```python\n{cell.code.strip()}\n```"
    if not cell.config.hide_code:
        return fence
    return f'??? note "Code"\n\n{textwrap.indent(fence, "    ")}'


def _value(value, name: str, figures: dict[str, bytes]) -> str:
    if hasattr(value, "savefig"):
        drawn = io.BytesIO()
        value.savefig(drawn, format="svg", metadata={"Date": None}, bbox_inches="tight")
        figures[name] = drawn.getvalue()
        return f"![Figure]({name})"
    if hasattr(value, "_markdown_text"):
        return textwrap.dedent(value._markdown_text).strip()
    if hasattr(value, "_labels") and hasattr(value, "_tabs"):  # an accordion
        parts = [(a._markdown_text, textwrap.dedent(b._markdown_text)) for a, b in zip(value._labels, value._tabs)]
        return "\n\n".join(f'??? note "{label}"\n\n{textwrap.indent(text, "    ")}' for label, text in parts)
    if hasattr(value, "_initial_value"):  # a control
        label = re.sub(r"<[^>]+>", "", value._args.label or "a control")
        return f"*In the notebook, `{label}` can be changed here; on this page it is {value.value}.*"
    if hasattr(value, "_mime_"):  # a layout of marimo's own, which needs its front end
        return ""
    return f"```text\n{value}\n```"


def _line_of_index(path: Path) -> str:
    page, _ = _page(path)
    title = re.search(r"^# (.*)$", page, re.MULTILINE)
    minutes = re.search(r"(\d+) minutes", page)
    if title is None:
        raise PluginError(f"course/{path.name} has no title; its first text starts with '# '")
    return f"- [{title[1]}]({path.stem}.md)" + (f", {minutes[1]} minutes" if minutes else "")
