"""palimpsest explain, as it is typed."""

import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from palimpsest.explainer.server import listen


def explain(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "palimpsest", "explain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "no/such/folder"], "there is no folder 'no/such/folder'"),
        (["--model", "{tmp}"], "has no config.json"),
        (["--port", "99999"], "expected 0 to 65535"),
        (["--export", "/proc/site"], "cannot be written"),
        (["--export", "{tmp}/a/b"], "does not exist"),
        (["--model", "{tmp}/foreign", "--export", "{tmp}/site"], "model_type 'llama'"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(tmp_path, arguments, says):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "llama"}')
    done = explain(*(a.format(tmp=tmp_path) for a in arguments))
    assert done.returncode == 1
    assert done.stdout == ""
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_busy_port_is_a_sentence():
    with listen() as taken:
        done = explain("--no-browser", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "leave --port out" in done.stderr


def test_the_page_is_up_and_ends_with_ctrl_c():
    command = [sys.executable, "-u", "-m", "palimpsest", "explain"]
    environment = os.environ | {"BROWSER": "no-such-browser", "PATH": ""}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        url = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert url is not None
        with urllib.request.urlopen(url[0], timeout=60) as answer:
            assert b"Palimpsest" in answer.read()
        assert "No browser could be opened" in process.stdout.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.wait(120)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_serving_the_page_loads_no_torch():
    code = "import sys, palimpsest.explainer.server as s; s.build_app(s.Library(), 1); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
