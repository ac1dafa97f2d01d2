"""Every example runs: docstrings of the package, Python blocks of the README and of the documentation; every command that
they show is one; every `file::name` that they point at is there.
"""

import ast
import doctest
import re
import shlex
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in (ROOT / "palimpsest").rglob("*.py")
    if ">>>" in path.read_text() and not {"triton", "hopper", "static"} & set(path.parts)
)
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
COMMAND = re.compile(r"(?:^|(?<=`)|(?<=^    )|-m )(palimpsest (?!import)[^`#\n|]+|palimpsest$)", re.MULTILINE)
POINTER = re.compile(r"`((?:palimpsest|tests|benchmarks|recipes|course|docs|web|results)/[\w./-]+)(?:::(\w+))?`")
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)")


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    failed, tried = doctest.testmod(import_module(module), extraglobs={"torch": torch})
    assert tried
    assert not failed


def test_the_glossary_names_what_exists():
    """The first column of its last table: files and folders of the package."""
    table = (ROOT / "docs" / "concepts.md").read_text().split("## Files of the main path")[1]
    rows = re.findall(r"^\| `([\w/.]+)` \|(.*)\|$", table, re.MULTILINE)
    assert len(rows) > 10
    for place, words in rows:
        assert (ROOT / "palimpsest" / place).exists(), place
        if place.endswith("/"):
            for name in re.findall(r"`([\w.]+\.\w+)`", words):
                assert (ROOT / "palimpsest" / place / name).exists(), f"{place}{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs_and_its_links_lead_somewhere(page, tmp_path, monkeypatch):
    text = page.read_text()
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    missing = [link for link in LINK.findall(prose) if not (page.parent / link).exists()]
    assert not missing
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"torch": torch}  # the blocks of one page are one program
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)):
        if ">>>" in block:
            example = doctest.DocTestParser().get_doctest(block, names, f"{page.name}, block {number}", str(page), 0)
            runner = doctest.DocTestRunner()
            runner.run(example, clear_globs=False)
            names.update(example.globs)
            assert not runner.failures
        else:
            exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_the_readme_shows_what_it_prints(capsys):
    """The shapes in the README's comments are those that its lines print."""
    block = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    exec(block[1], {})
    printed = capsys.readouterr().out.splitlines()
    assert printed == re.findall(r"^print\(.*\)\s+# (.*)$", block[1], re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if "palimpsest " in p.read_text()], ids=lambda p: p.name)
def test_commands_can_be_run(page, tmp_path):
    """Options, values and names are those of the command line; what reads only is run, what takes long is not."""
    typer = pytest.importorskip("typer", reason="commands need the cli extra")
    from palimpsest import cli
    from palimpsest.commands.recipes import known
    from palimpsest.lab.framework.experiment import NAMES, load_experiment

    whole = typer.main.get_command(cli.app)
    prose = re.sub(r"^```(?:python|pycon|text)\n.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for line in map(str.strip, COMMAND.findall(prose)):
        words = shlex.split(line)[1:]
        if "--plugin" in words:  # is run while the command's words are read
            place = words.index("--plugin") + 1
            words[place] = str(tmp_path / words[place])
            Path(words[place]).touch()
        command, context, name = whole, None, "palimpsest"
        while hasattr(command, "resolve_command"):
            context = command.make_context(name, list(words), parent=context, resilient_parsing=not words)
            if not words or words[0].startswith("-"):
                break
            name, command, words = command.resolve_command(context, words)
        else:
            if words:  # a command that is only named needs nothing
                command.make_context(name, list(words), parent=context)
        if name == "info" and words and not words[0].isupper():
            assert cli.run(["info", *words]) == 0, line
        if name == "train" and words:
            assert (
                (ROOT / words[0].partition(":")[0]).is_file()
                or words[0].partition(":")[0] in known()
                or words[0] == "recipes/yours.py:debug"
            ), line
        if name == "run" and words and not words[0].endswith(".py") and words[0] != "NAME":
            assert words[0] in NAMES, line
            if "--scale" in words:
                assert words[words.index("--scale") + 1] in load_experiment(words[0]).scales, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_at_is_there(page):
    for path, name in POINTER.findall(page.read_text()):
        if path.startswith("recipes/yours"):
            continue
        assert (ROOT / path).exists(), path
        assert not name or name in _defined(ROOT / path), f"{path}::{name}"


@cache
def _defined(path: Path) -> set[str]:
    """Names of functions, classes and module variables."""
    tree = ast.parse(path.read_text())
    defined = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assigned = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
    assigned += [n.target for n in tree.body if isinstance(n, ast.AnnAssign)]
    return defined | {t.id for t in assigned if isinstance(t, ast.Name)}
