"""Every example runs: docstrings of the package, Python blocks of the README and of the documentation."""

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in (ROOT / "palimpsest").rglob("*.py")
    if ">>>" in path.read_text() and not {"gpu", "static"} & set(path.parts)
)
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)")


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    failed, tried = doctest.testmod(import_module(module), extraglobs={"torch": torch})
    assert tried
    assert not failed


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
