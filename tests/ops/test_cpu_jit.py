"""Compiling on first use, when all goes well and when it does not: always a working call or a clear sentence."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from palimpsest.ops import backends
from palimpsest.ops.cpu import jit, register
from palimpsest.ops.variants import kda

pytestmark = pytest.mark.skipif(jit.refusal() is not None, reason=f"the kernel {jit.refusal()}")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A compiled library, for compilers that only pretend."""
    return jit.compile_source(jit.find_compiler(), tmp_path_factory.mktemp("built"))


@pytest.fixture
def pretend(tmp_path, built):
    """Make a compiler out of a line of shell; $out is where its result belongs, $built a good one."""

    def make(line: str, name: str = "cc") -> Path:
        script = tmp_path / name
        script.write_text(
            f'#!/bin/sh\necho called >> {tmp_path}/calls\nwhile [ "$1" != -o ]; do shift; done\n'
            f"out=$2\nbuilt={built}\n{line}\n"
        )
        script.chmod(0o755)
        return script

    return make


@pytest.fixture
def forgetful():
    """Within the test this process has not yet tried to compile; afterwards it has again."""
    jit.library.cache_clear(), jit._refusal.cache_clear()
    yield
    jit.library.cache_clear(), jit._refusal.cache_clear()


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


def works(library) -> bool:
    """The library computes: one token written with beta 1 into an empty memory and read back."""
    q = k = torch.tensor([[[[0.0, 1.0]]]])
    v, log_decay, beta = torch.tensor([[[[5.0, 7.0]]]]), torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1)
    inputs = (q, k, v, log_decay, None, beta, torch.zeros(1, 1, 2, 2), None, None)
    out, end = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2, 2)
    call = register._call(inputs, None, 1.0, "none", 0.0)
    call.out, call.end_state = register._array(out), end.data_ptr()
    assert library.delta_memory_forward(register.ctypes.byref(call)) == 0
    return out.flatten().tolist() == [5.0, 7.0]


def test_compiled_once_then_found(tmp_path, pretend):
    compiler, cache = pretend('cp "$built" "$out"'), tmp_path / "cache"
    assert works(jit.load(compiler, cache))
    assert works(jit.load(compiler, cache))
    assert (tmp_path / "calls").read_text() == "called\n"
    assert len(libraries(cache)) == 1
    assert list(cache.iterdir()) == libraries(cache), "nothing else is left behind"


def test_another_source_flag_processor_or_compiler_is_another_library(tmp_path, pretend, monkeypatch):
    source = tmp_path / "source.c"
    source.write_text("1")
    compiler = pretend('cp "$built" "$out"')
    keys = [jit._key(compiler, source)]
    source.write_text("2")
    keys.append(jit._key(compiler, source))
    keys.append(jit._key(pretend("", name="other"), source))
    monkeypatch.setattr(jit, "FLAGS", ((),))
    keys.append(jit._key(compiler, source))
    monkeypatch.setattr(jit, "_processor", lambda: "another")
    keys.append(jit._key(compiler, source))
    assert len(set(keys)) == 5


@pytest.mark.parametrize("damage", ["cut short", "altered", "empty"])
def test_a_damaged_library_is_never_opened(tmp_path, pretend, damage, monkeypatch):
    compiler, cache = pretend('cp "$built" "$out"'), tmp_path / "cache"
    jit.load(compiler, cache)
    (path,) = libraries(cache)
    good = path.read_bytes()
    bad = {"cut short": good[: len(good) // 2], "altered": good[:5000] + b"!" + good[5001:], "empty": b""}[damage]
    path.unlink()  # a new file: this process still holds the old one open
    path.write_bytes(bad)
    opened = []
    really_open = jit._open
    monkeypatch.setattr(jit, "_open", lambda path: opened.append(path.read_bytes()) or really_open(path))
    assert works(jit.load(compiler, cache))
    assert opened == [good]
    assert (tmp_path / "calls").read_text() == "called\n" * 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("echo 'x.c:1: error: no luck' >&2; exit 1", "did not compile: .* said `x.c:1: error: no luck`"),
        ("exit 3", "did not compile: .* said `exit status 3`"),
        ("exit 0", "did not compile"),
        ('echo garbage > "$out"', "could not be built or opened"),
        ('printf "" > "$out"', "could not be built or opened"),
        ("sleep 5", "took more than 0.2 s"),
    ],
)
def test_a_broken_compiler_is_a_sentence(tmp_path, pretend, line, says, monkeypatch):
    if "sleep" in line:
        monkeypatch.setattr(jit, "PATIENCE", 0.2)
    with pytest.raises(jit.CannotCompileError, match=says):
        jit.load(pretend(line), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_grumbles_is_heard_by_nobody(tmp_path, pretend, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert works(jit.load(pretend('echo "warning: odd" >&2; cp "$built" "$out"'), tmp_path / "cache"))
    assert capfd.readouterr() == ("", "")


def test_flags_that_a_compiler_does_not_know_are_left_out(tmp_path, pretend):
    compiler = pretend('cp "$built" "$out"')
    text = compiler.read_text().replace(
        "while", 'case "$*" in *openmp*|*mcpu*) echo error: what? >&2; exit 1;; esac\nwhile', 1
    )
    compiler.write_text(text)
    assert works(jit.load(compiler, tmp_path / "cache"))
    assert (tmp_path / "calls").read_text() == "called\n" * 2


@pytest.mark.parametrize("fault", ["no folder", "full", "forbidden"])
def test_without_a_cache_each_process_compiles_for_itself(tmp_path, pretend, fault, monkeypatch):
    compiler, cache = pretend('cp "$built" "$out"'), tmp_path / "cache"
    if fault == "no folder":  # a file stands where the folder should be
        cache.write_text("")
    else:
        cache.mkdir()
    if fault == "full":
        compiler.write_text(compiler.read_text().replace("cp ", f'case "$out" in {cache}*) exit 1;; esac\ncp '))
        usage = type("usage", (), {"free": 0})
        monkeypatch.setattr(jit.shutil, "disk_usage", lambda path: usage)
    if fault == "forbidden":
        monkeypatch.setattr(jit.os, "replace", lambda *paths: (_ for _ in ()).throw(PermissionError("no")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert works(jit.load(compiler, cache))
    assert not libraries(cache) if cache.is_dir() else cache.read_text() == ""
    assert works(jit.load(compiler, None))


def test_many_at_once(tmp_path, pretend):
    compiler, cache, found = pretend('sleep 0.0$(( $$ % 10 )); cp "$built" "$out"'), tmp_path / "cache", []
    threads = [threading.Thread(target=lambda: found.append(works(jit.load(compiler, cache)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    assert list(cache.iterdir()) == libraries(cache)
    assert len(libraries(cache)) == 1


LOAD = "import sys; from pathlib import Path; from palimpsest.ops.cpu import jit; jit.load(*map(Path, sys.argv[1:]))"


def test_a_process_killed_while_it_compiles_leaves_no_trace_that_matters(tmp_path, pretend):
    cache = tmp_path / "cache"
    slow = pretend('head -c 1000 "$built" > "$out"; sleep 60', name="slow")
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD, slow, cache], cwd=Path(jit.__file__).parents[3], process_group=0
    )
    until = time.monotonic() + 60
    while not list(cache.glob("build-*/delta_memory.so")) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (left,) = cache.iterdir()
    assert left.name.startswith("build-")
    fresh = pretend('cp "$built" "$out"')
    assert works(jit.load(fresh, cache))
    assert left.exists(), "it may belong to a process that is still alive"
    os.utime(left, (1, 1))
    libraries(cache)[0].unlink()
    assert works(jit.load(fresh, cache))
    assert not left.exists()


def inputs():
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, generator=rng)
    return draw(1, 20, 1, 4), draw(1, 20, 1, 4) / 2, draw(1, 20, 1, 4), -draw(1, 20, 1, 4), draw(1, 20, 1)


def test_no_compiler_is_one_warning_and_the_torch_form(forgetful, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        results = [kda(*inputs()) for _ in range(3)]
    (warning,) = heard
    assert re.search(
        "slower PyTorch form .* needs a C compiler and found none; install gcc or clang", str(warning.message)
    )
    expected = kda(*inputs(), backend="chunked")
    assert all(torch.equal(result.output, expected.output) for result in results)
    facts = {"op": "kda", "variant": "kda", "device": "cpu", "dtype": torch.float32, "key_dim": 4, "value_dim": 4}
    problem = backends.Problem(**facts, tokens=20, sequences=1, heads=1, value_heads=1)
    assert re.search("cpu +needs a C compiler and found none", backends.explain(problem))
    with pytest.raises(ValueError, match="backend 'cpu' cannot run this call: it needs a C compiler and found none"):
        kda(*inputs(), backend="cpu")


def test_where_it_looks(monkeypatch, tmp_path, pretend):
    mine = pretend("exit 0", name="mine")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "mine")
    assert jit.find_compiler() == mine
    monkeypatch.delenv("CC")
    with pytest.raises(jit.CannotCompileError):
        jit.find_compiler()
    other = pretend("exit 0", name="clang")
    assert jit.find_compiler() == other
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert jit.cache_folder() == tmp_path / "palimpsest"
