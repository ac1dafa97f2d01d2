"""The static site holds what the library computed, and is written whole or not at all."""

import json
from pathlib import Path

import pytest
import torch

from palimpsest.explainer import scenes
from palimpsest.explainer.export import export
from palimpsest.explainer.scene_file import from_safetensors

SENTENCES = ("The door is red. Now the door is blue.",)


def test_the_site_is_whole(tmp_path, library):
    steps = []
    files = export(tmp_path / "site", library, SENTENCES, lambda done, total: steps.append((done, total)))
    site = tmp_path / "site"
    assert 'content="export"' in (site / "index.html").read_text()
    assert steps[-1] == (12, 12)
    assert all(file.is_file() for file in files)
    assert [p.name for p in tmp_path.iterdir()] == ["site"]  # nothing half-done is left beside it
    about = json.loads((site / "data" / "about.json").read_text())
    assert about["examples"] == list(SENTENCES)
    model = library.get()[1]
    kept = from_safetensors((site / "data" / "sentence-0-2-1.safetensors").read_bytes())
    expected = scenes.sentence(model, SENTENCES[0], 2, 1)
    for name in ("q", "k", "v", "alpha", "beta", "read", "final", "norms"):
        assert kept[name].dtype == torch.float64
        assert kept[name].equal(expected[name].double())
    assert "written" not in kept


def test_an_earlier_export_is_replaced_and_anything_else_refused(tmp_path, library):
    site = tmp_path / "site"
    export(site, library, SENTENCES)
    (site / "data" / "old.safetensors").write_bytes(b"old")
    export(site, library, SENTENCES)
    assert not (site / "data" / "old.safetensors").exists()
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no earlier export"):
        export(other, library, SENTENCES)
    assert (other / "notes.txt").read_text() == "mine"


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
