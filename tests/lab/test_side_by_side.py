"""Models that learn beside each other learn what each would learn alone."""

from dataclasses import replace

import pytest

from palimpsest.cli import run as command
from palimpsest.lab.framework.experiment import InterruptedSweep, load_experiment
from palimpsest.lab.framework.results import read_records
from palimpsest.lab.framework.sweep import run
from palimpsest.lab.model_variants import MODEL_VARIANTS, Size
from palimpsest.lab.side_by_side import SideBySide, learn_together
from palimpsest.lab.tasks import MQAR, Palindrome
from palimpsest.lab.training import Training, learn

SIZE = Size(layers=1, hidden_size=16, heads=1, head_dim=8, mlp=16)
POINT = Training(
    who=MODEL_VARIANTS["kda"], train=(MQAR(length=16, vocab_size=16, pairs=3),), size=SIZE, steps=9, tokens_per_step=64,
    evaluate_every=3, test_batches=2, lr=1e-2,
)  # fmt: skip


def together(*points):
    found = {id(lesson): result for lesson, result in learn_together(points, "cpu")}
    return [found[id(point)] for point in points]


@pytest.mark.parametrize("task", [POINT.train[0], Palindrome(length=8, vocab_size=16)])
def test_beside_others_each_learns_what_it_would_alone(task):
    points = [
        replace(POINT, train=(task,), who=MODEL_VARIANTS[who], lr=lr)
        for who, lr in (("kda", 1e-2), ("gdn", 3e-3), ("softmax", 1e-2))
    ]
    for point, result in zip(points, together(*points)):
        alone = learn(point, "cpu", lambda *_: None)[0]
        assert [c["step"] for c in result["curve"]] == [3, 6, 9]
        for mine, other in zip(result["curve"], alone["curve"]):
            assert mine == pytest.approx(other, rel=2e-3, abs=1e-5)
        assert result["rows"][0]["accuracy"] == pytest.approx(alone["rows"][0]["accuracy"], abs=1e-6)
        assert result["rows"][0].keys() == alone["rows"][0].keys()


def test_lessons_of_several_materials_are_not_mixed():
    with pytest.raises(ValueError, match="several materials"):
        next(learn_together([POINT, replace(POINT, seed=1)], "cpu"))


def test_one_who_has_succeeded_leaves_and_the_others_go_on():
    early, late = replace(POINT, stop_at=1e-9, steps=30), replace(POINT, steps=30)
    first, second = together(early, late)
    assert first["rows"][0]["steps"] < 30
    assert second["rows"][0]["steps"] == 30


def test_one_whose_loss_is_no_number_does_not_spoil_the_others():
    bad, good = together(replace(POINT, lr=1e30, warmup=0.0), POINT)
    assert bad["rows"][0]["diverged"]
    assert not good["rows"][0]["diverged"]
    assert good == together(POINT)[0]


def test_a_sweep_runs_so_by_the_command(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--device", "cpu", "--only", "task mqar", "--side-by-side", "2"]
    assert command(["lab", "run", "fig4", "--scale", "tiny", *out]) == 0
    assert len(read_records(tmp_path / "out")) == 3
    assert "--side-by-side 2" in (tmp_path / "out" / "report.md").read_text()
    assert command(["lab", "run", "fig4", "--scale", "tiny", "--side-by-side", "2", "--workers", "2"]) == 1
    assert "give one of them" in capsys.readouterr().err


def test_an_interrupt_between_tests_keeps_what_is_done(tmp_path):
    experiment, seen = load_experiment("fig4"), []

    def stop(event):
        seen.append(event["event"])
        if seen.count("point") == 3:
            raise InterruptedSweep

    with pytest.raises(InterruptedSweep):
        run(experiment, "tiny", tmp_path / "out", device="cpu", runner=SideBySide(2), report=stop)
    assert len(read_records(tmp_path / "out")) == 3
    assert run(experiment, "tiny", tmp_path / "out", device="cpu", runner=SideBySide(8))
    assert len(read_records(tmp_path / "out")) == 9


def test_what_an_interrupt_stops_goes_on_as_if_nothing_had_been(tmp_path):
    points = [replace(POINT, who=MODEL_VARIANTS[who]) for who in ("kda", "gdn")]
    files = {id(point): tmp_path / f"{point.who.name}.pt" for point in points}

    def stop(lesson, share, word):
        if share > 0.5 and lesson is points[1]:
            raise InterruptedSweep

    with pytest.raises(InterruptedSweep):
        list(learn_together(points, "cpu", stop, unfinished=files))
    assert all(file.is_file() for file in files.values())
    asked = []
    again = list(learn_together(points, "cpu", lambda lesson, share, word: asked.append(share), unfinished=files))
    assert {lesson.who.name: result for lesson, result in again} == dict(zip(("kda", "gdn"), together(*points)))
    assert asked == []  # the last third alone was left
