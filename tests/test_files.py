"""Files: whole or absent, on the disk before they count, locked by one, read without hanging."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from palimpsest import files
from palimpsest.files import LockedError, locked, put, read_bytes, read_object, replacing, write_json, write_text
from tests.disk import Journal

ROOT = Path(__file__).parents[1]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    journal = Journal(monkeypatch)
    write_json(tmp_path / "a.json", {"x": 1})
    write_text(tmp_path / "a.json", "new")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "b").write_text("b")
    put(tmp_path / "half", tmp_path / "whole")
    assert (tmp_path / "a.json").read_text() == "new"
    assert names(tmp_path) == ["a.json", "whole"]
    assert not journal.lost
    assert not journal.moved


@pytest.mark.parametrize("what", ["flush", "flush_list"])
def test_the_journal_notices_what_is_not_forced_to_the_disk(tmp_path, monkeypatch, what):
    journal = Journal(monkeypatch)
    monkeypatch.setattr(files, what, lambda path: None)
    write_text(tmp_path / "a", "x")
    assert journal.lost or journal.moved


def test_an_error_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_the_mode_is_the_umasks(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
        with replacing(tmp_path / "b") as partial:
            safetensors.torch.save_file({"x": torch.ones(3)}, partial)  # which leaves a file to its owner
        (tmp_path / "half").mkdir()
        safetensors.torch.save_file({"x": torch.ones(3)}, tmp_path / "half" / "c")
        put(tmp_path / "half", tmp_path / "whole")
    finally:
        os.umask(before)
    for name in ("a", "b", "whole/c"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640, name


def child(code, *arguments):
    """A process that has come to its first line of output."""
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_killed_writers_rest_is_removed_and_a_living_ones_is_not(tmp_path):
    code = """
import sys, time
from palimpsest.files import replacing
with replacing(sys.argv[1]) as partial:
    partial.write_text("half")
    print(flush=True)
    time.sleep(60)
"""
    writer = child(code, tmp_path / "a")
    write_text(tmp_path / "a", "mine")
    assert len(names(tmp_path)) == 2
    writer.kill()
    writer.communicate()
    (tmp_path / ".a.partial").write_text("a user's own")
    (tmp_path / ".a.0123456789abcdef.partial").write_text("no folder")
    write_text(tmp_path / "other", "x")
    assert len(names(tmp_path)) == 5
    write_text(tmp_path / "a", "mine")
    assert names(tmp_path) == [".a.0123456789abcdef.partial", ".a.partial", "a", "other"]


def test_a_lock_is_held_by_one_and_ends_with_its_holder(tmp_path):
    code = """
import sys, time
from palimpsest.files import locked
with locked(sys.argv[1], "busy"):
    print(flush=True)
    time.sleep(60)
"""
    holder = child(code, tmp_path)
    with pytest.raises(LockedError, match="in use"), locked(tmp_path, "in use"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with locked(tmp_path, "in use"), pytest.raises(LockedError), locked(tmp_path, "twice in one process"):
        pass
    with locked(tmp_path, "in use"):
        pass
    assert not names(tmp_path)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    began = time.monotonic()
    with pytest.raises(ValueError, match="is a pipe, not a regular file"):
        read_bytes(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a device"):
        read_bytes(tmp_path / "endless")
    with pytest.raises((ValueError, OSError)):
        read_bytes(tmp_path)
    assert time.monotonic() - began < 5
    (tmp_path / "long").write_bytes(b"x" * 100)
    assert read_bytes(tmp_path / "long", limit=100) == b"x" * 100
    with pytest.raises(ValueError, match="longer than 99 bytes"):
        read_bytes(tmp_path / "long", limit=99)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "holds a JSON list; expected an object"),
        (b"null", "holds a JSON NoneType"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_json_object_is_refused_in_a_sentence(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        read_object(tmp_path / "a.json")
    assert "a.json" in str(error.value)
    assert len(str(error.value)) < 300
