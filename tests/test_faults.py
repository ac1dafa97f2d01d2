"""The table of faults counts what it should: survived, wrong, crashed and hung."""

import subprocess
import sys
from pathlib import Path

from benchmarks.faults import __main__ as faults
from benchmarks.faults import refused

ROOT = Path(__file__).parents[1]
MODULE = """
import os
import signal
import time
import os, signal, time
from benchmarks.faults import Campaign, Trial

def trials(folder):
    yield Trial("fine", lambda: None)
    yield Trial("wrong", lambda: "lost a file")
    yield Trial("trace", lambda: 1 / 0)
    yield Trial("crash", lambda: os.kill(os.getpid(), signal.SIGSEGV))
    yield Trial("hang", lambda: time.sleep(600))
    yield Trial("fine again", lambda: None)

CAMPAIGNS = [Campaign("all that may happen", "", trials, patience=2.0)]
"""


def test_crashes_and_hangs_are_counted_and_the_rest_goes_on(tmp_path):
    copy = tmp_path / "root"
    (copy / "benchmarks" / "faults").mkdir(parents=True)
    for name in ("__init__.py", "__main__.py"):
        (copy / "benchmarks" / "faults" / name).write_text((ROOT / "benchmarks" / "faults" / name).read_text())
    (copy / "benchmarks" / "faults" / "mine.py").write_text(MODULE)
    (copy / "palimpsest").symlink_to(ROOT / "palimpsest")
    code = "from benchmarks.faults.__main__ import campaigns, run; print(run(campaigns()['all that may happen']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=copy)
    assert "tried=6, survived=2" in done.stdout, done.stderr
    for words in ("wrong: lost a file", "trace: ZeroDivisionError", "crash: ended the process (-11)", "hang: hung"):
        assert words in done.stdout


def test_a_refusal_is_a_readable_sentence():
    def raises(error):
        raise error

    assert refused(lambda: raises(ValueError("x is 3; it must be 4"))) is None
    assert "trace" in refused(lambda: raises(KeyError("x")))
    assert "says only" in refused(lambda: raises(ValueError("bad")))
    assert "characters" in refused(lambda: raises(ValueError("no no no " * 1000)))
    assert "accepted" in refused(lambda: 3)


def test_the_page_adds_up():
    stored = {
        "date": "today",
        "machine": {"cpu": "8086", "threads": 1, "torch": "2", "python": "3"},
        "campaigns": {
            "a": {"about": "x", "tried": 1000, "survived": 1000, "failures": []},
            "b": {"about": "y", "tried": 30, "survived": 29, "failures": ["one: lost"]},
        },
    }
    text = faults.page(stored)
    assert "**1,030 faults tried, 1,029 survived.**" in text
    assert "- b, one: lost" in text
