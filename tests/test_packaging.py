"""What goes into a package: links that survive an index, kernels for machines without a compiler, results beside recipes."""

import ctypes
import importlib.util
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("palimpsest_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_survives_an_index_page(setup):
    text = (ROOT / "README.md").read_text()
    assert setup.RELATIVE.search(text)
    home = "https://example.org/palimpsest/blob/main/"
    with_home, without = setup.for_index(text, home), setup.for_index(text, "")
    assert not setup.RELATIVE.search(with_home)
    assert not setup.RELATIVE.search(without)
    assert f"]({home}docs/quickstart.md)" in with_home
    assert f"]({home}docs/pictures/palimpsest.png?raw=true)" in with_home
    assert "![" not in without
    assert "quickstart" in without
    rest = lambda s: re.sub(r"!?\[[^\]]*\]\([^)]*\)", "", s)
    assert rest(with_home) == rest(text)


def test_recipes_and_results_are_installed(setup):
    placed = dict(setup.data_files())
    assert "recipes/demo.py" in placed["share/palimpsest/recipes"]
    for folder in (path.parent for path in (ROOT / "results" / "lab").glob("*/report.md")):
        files = placed[f"share/palimpsest/results/lab/{folder.name}"]
        assert {Path(file).name for file in files} >= {"report.md"}
        assert all((ROOT / file).is_file() for file in files)


def test_a_machine_without_a_compiler_runs_what_came_with_the_package(tmp_path, monkeypatch):
    from palimpsest.ops.cpu import jit

    try:
        compiler = jit.find_compiler()
    except jit.CannotCompileError:
        pytest.skip("needs a C compiler")
    monkeypatch.setattr(jit, "READY", tmp_path / "prebuilt")
    built = jit.prebuild(compiler, tmp_path / "prebuilt")
    assert len(built) in (1, 2, 4)
    found = jit.prebuilt()
    assert set(found) <= set(built)
    assert "single" in found[-1].name
    monkeypatch.setattr(jit, "_flags", lambda: ["sse2"])  # an older processor
    assert all("-any-" in path.name for path in jit.prebuilt())
    monkeypatch.setattr(jit, "_flags", lambda: sorted(jit.WIDE))
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    opened = jit.library.__wrapped__()
    assert isinstance(opened, ctypes.CDLL)
    assert opened._name.startswith(str(tmp_path / "prebuilt"))
    assert "prebuilt" not in jit.facts()
    assert "came with the package" in jit.facts()
    if len(found) > 1:  # one that cannot be opened: the next is taken
        shutil.copytree(tmp_path / "prebuilt", tmp_path / "second")
        monkeypatch.setattr(jit, "READY", tmp_path / "second")
        (tmp_path / "second" / found[0].name).write_bytes(b"no library")
        assert jit.library.__wrapped__()._name == str(tmp_path / "second" / found[1].name)
    monkeypatch.setattr(jit, "_of_source", lambda: "another source")
    with pytest.raises(jit.CannotCompileError, match="needs a C compiler and found none"):
        jit.library.__wrapped__()
