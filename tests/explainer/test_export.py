"""The static site holds what the library computed, and is written whole or not at all."""

import base64
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from palimpsest.explainer import scenes
from palimpsest.explainer.export import export
from palimpsest.explainer.scene_file import from_safetensors


def inside(site: Path) -> dict[str, bytes]:
    """The files in data.js, by their names."""
    script = (site / "data.js").read_text()
    packed = json.loads(script.removeprefix("globalThis.PALIMPSEST = ").rstrip(";\n"))
    return {name: base64.b64decode(content) for name, content in packed.items()}


SENTENCES = ("The door is red. Now the door is blue.",)


def test_the_site_is_whole(tmp_path, library):
    steps = []
    files = export(tmp_path / "site", library, SENTENCES, lambda done, total: steps.append((done, total)))
    site = tmp_path / "site"
    assert 'content="export"' in (site / "index.html").read_text()
    assert steps[-1] == (12, 12)
    assert all(file.is_file() for file in files)
    assert [p.name for p in tmp_path.iterdir()] == ["site"]  # nothing half-done is left beside it
    about = json.loads(inside(site)["data/about.json"])
    assert about["examples"] == list(SENTENCES)
    model = library.get()[1]
    kept = from_safetensors(inside(site)["data/sentence-0-2-1.safetensors"])
    expected = scenes.sentence(model, SENTENCES[0], 2, 1)
    for name in ("q", "k", "v", "alpha", "beta", "read", "final", "norms"):
        assert kept[name].dtype == torch.float64
        assert kept[name].equal(expected[name].double())
    assert "written" not in kept


@pytest.fixture
def quick(monkeypatch, library):
    """Exports whose traces take no time: the files around them are what is tested."""
    calls = iter(range(1000))
    scene = lambda *arguments: {"next": [], "call": next(calls)}
    for name in ("order", "answers", "heads", "sentence", "hybrid"):
        monkeypatch.setattr(scenes, name, scene)
    return lambda folder, sentences=SENTENCES: export(folder, library, sentences)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_export_is_replaced(tmp_path, quick):
    site = tmp_path / "site"
    quick(site, (*SENTENCES, "Another one."))
    before = inside(site)
    assert "data/order-1.safetensors" in before
    quick(site)
    after = inside(site)
    assert before.keys() - after.keys() == {
        *(f"data/{name}-1.safetensors" for name in ("order", "answers", "heads")),
        *(f"data/{x}-1-{i}-{j}.safetensors" for x in ("sentence", "inside") for i in range(3) for j in range(4)),
        "data/next-1.json",
    }
    assert before["data/hybrid.safetensors"] != after["data/hybrid.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["site"]


def foreign(site: Path, kind: str) -> None:
    """Something in the folder that no export wrote."""
    match kind:
        case "git":
            (site / ".git").mkdir()
            (site / ".git" / "HEAD").write_text("ref: refs/heads/main")
        case "page of one's own":
            (site / "assets" / "mine.json").write_text("{}")
        case "changed":
            (site / "index.html").write_text("my own words")
        case "link":
            (site / "assets" / "law.js").unlink()
            (site / "assets" / "law.js").symlink_to("/etc/passwd")
        case "linked folder":
            (site / "more").symlink_to(site.parent)
        case "pipe":
            os.mkfifo(site / "pipe")
        case "no manifest":
            (site / "export.json").unlink()
        case "another manifest":
            (site / "export.json").write_text('["export"]')
        case "half a manifest":
            (site / "export.json").write_bytes((site / "export.json").read_bytes()[:500])


@pytest.mark.parametrize(
    "kind",
    [
        "git", "page of one's own", "changed", "link", "linked folder", "pipe", "no manifest", "another manifest",
        "half a manifest",
    ],
)  # fmt: skip
def test_what_no_export_wrote_is_never_replaced(tmp_path, quick, kind):
    site = tmp_path / "site"
    quick(site)
    foreign(site, kind)
    before = contents(site)
    with pytest.raises(ValueError, match="give a new or empty folder"):
        quick(site)
    assert contents(site) == before
    assert [p.name for p in tmp_path.iterdir()] == ["site"]


def test_a_manifest_cannot_name_files_elsewhere(tmp_path, quick):
    site, precious = tmp_path / "site", tmp_path / "thesis.tex"
    precious.write_text("precious")
    quick(site)
    manifest = json.loads((site / "export.json").read_text())
    manifest["files"]["../thesis.tex"] = [hashlib.sha256(b"precious").hexdigest()]
    manifest["files"][str(precious)] = manifest["files"]["../thesis.tex"]
    (site / "export.json").write_text(json.dumps(manifest))
    quick(site)
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("there", ["empty", "an export"])
def test_it_can_be_written_into_the_folder_one_is_in(tmp_path, quick, monkeypatch, there):
    site = tmp_path / "site"
    if there == "empty":
        site.mkdir()
    else:
        quick(site)
    monkeypatch.chdir(site)
    files = quick(Path("."))
    assert (Path.cwd() / "index.html").is_file()
    assert Path("index.html").is_file()
    assert len(files) == len(contents(site)) > 20
    assert [p.name for p in tmp_path.iterdir()] == ["site"]


def test_an_export_that_was_interrupted_can_be_made_again(tmp_path, quick, monkeypatch):
    site, moves = tmp_path / "site", []
    quick(site)
    replace = Path.replace

    def stumble(path, target):
        moves.append(target)
        if len(moves) == 20:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stumble)
    with pytest.raises(KeyboardInterrupt):
        quick(site)
    assert [p.name for p in tmp_path.iterdir()] == ["site"]
    quick(site)
    assert len(contents(site)) > 20


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, library):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        export(file, library, SENTENCES)
    with pytest.raises(ValueError, match="does not exist"):
        export(tmp_path / "a" / "b", library, SENTENCES)
    if Path("/proc").is_dir():
        with pytest.raises(ValueError, match="cannot be written"):
            export(Path("/proc/explainer"), library, SENTENCES)


def test_a_bad_sentence_leaves_nothing_behind(tmp_path, library):
    with pytest.raises(ValueError, match="empty"):
        export(tmp_path / "site", library, ("",))
    assert list(tmp_path.iterdir()) == []
