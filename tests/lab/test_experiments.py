"""A tiny version of every experiment, end to end: points, verdict, plots, report, the command."""

import re

import pytest

from palimpsest import display
from palimpsest.cli import run as command
from palimpsest.lab.framework.experiment import NAMES, load_experiment
from palimpsest.lab.framework.results import read_records
from palimpsest.lab.measure.context_cost import Decode, Shape
from palimpsest.lab.training import Training


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_version_runs_end_to_end(name, tmp_path, capsys):
    assert command(["lab", "run", name, "--scale", "tiny", "--out", str(tmp_path / name), "--device", "cpu"]) == 0
    folder = tmp_path / name
    report = (folder / "report.md").read_text()
    assert "failed" not in report
    assert "**Verdict" in report
    assert len(read_records(folder)) == len(load_experiment(name).plan("tiny"))
    plots = sorted(folder.glob("*.png"))
    assert plots
    assert all(plot.stat().st_size > 5000 for plot in plots)
    assert all(f"]({plot.name})" in report for plot in plots)
    assert "Verdict: " in capsys.readouterr().out
    assert command(["lab", "show", str(folder)]) == 0
    assert "# " + name in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_every_scale_is_possible_before_it_is_run(name):
    experiment = load_experiment(name)
    for scale in experiment.scales:
        plan = experiment.plan(scale)
        assert plan
        assert all(point.work() > 0 and point.bytes_needed() >= 0 for point in plan.values())
        labels = [tuple(point.label().items()) for point in plan.values()]
        assert len(set(labels)) == len(labels), f"{name} {scale}: two points have one description"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_judged_from_nothing(name):
    assert load_experiment(name).judge([]).outcome in ("undecided", "measured", "shown", "not shown")


def test_the_sheets_of_the_command(capsys):
    assert command(["lab", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(word in listed for word in (*NAMES, "mamba2", "palindrome"))
    assert command(["lab", "show", "fig4", "--scale", "tiny"]) == 0
    assert "contestant kda, task palindrome, length 16" in capsys.readouterr().out


BAD = {
    "experiment": (["run", "fig5"], "unknown"),
    "scale": (["run", "fig4", "--scale", "huge"], "has no scale 'huge'"),
    "folder": (["show", "."], "holds no results"),
    "name": (["show", "no-such-thing"], "unknown"),
    "minutes": (["run", "fig4", "--scale", "tiny", "--device", "cpu", "--minutes", "-1"], "minutes is -1"),
    "timing": (["run", "cost", "--scale", "tiny", "--device", "cpu", "--workers", "2"], "measures time"),
    "compare one": (["compare", "."], "at least two"),
    "device": (["run", "fig4", "--scale", "tiny", "--device", "tpu"], "'cpu', 'cuda'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_use_ends_in_a_sentence(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, sentence = BAD[case]
    assert command(["lab", *arguments]) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_progress_can_be_read_in_a_log(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(display, "EVERY", 0.0)
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert command(["lab", "run", "fig4", "--scale", "tiny", "--only", "task mqar", *out]) == 0
    said = capsys.readouterr().err
    assert "3 of 9 points to run on cpu, 1 at once" in said
    assert re.search(r" 33%  \d:\d\d, ETA \d:\d\d  contestant kda, task mqar, .*: step 4, loss ", said)
    assert re.search(r"100%  contestant mamba2, .*: best_accuracy ", said)
    assert re.search(r" \d+%  .*contestant gdn, .*: 75%", said)  # also where there is no word to say
    assert "some points are left, and the same command goes on" in said


def test_points_that_fail_end_in_an_exit_code_of_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Training, "run", lambda *_: 1 / 0)
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert command(["lab", "run", "fig4", "--scale", "tiny", "--only", "task mqar", *out]) == 1
    said = capsys.readouterr()
    assert said.err.count("ZeroDivisionError") == 3
    assert "3 points failed; the same command tries them again" in said.err
    assert said.out == ""


def test_what_compiles_at_first_is_measured_as_often_as_the_rest(monkeypatch):
    taken: list[int] = []

    def timed(call, count, device):
        taken.append(count)
        return 9.0 if len(taken) == 1 else 1e-3

    monkeypatch.setattr("palimpsest.lab.measure.context_cost.timed", timed)
    shape = Shape(hidden_size=16, heads=1, head_dim=8, latent=8, positions=4)
    found = Decode(layer="kda", shape=shape, contexts=(64, 256), rounds=2, steps=50).run("cpu", lambda *_: None)
    assert taken == [3, 3, 3, 3, 50, 50, 50, 50]
    assert [row["milliseconds"] for row in found["rows"]] == [1.0, 1.0]
