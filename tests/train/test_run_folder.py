"""The folder of a run: its own names alone, one run at a time, safe from kills and from what others put there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from palimpsest.files import LockedError, write_json
from palimpsest.train.plots import draw_loss_curve
from palimpsest.train.run_folder import RunFolder, best, checkpoints_of, finite, is_run, latest, read_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def begun(tmp_path, recipe):
    """A folder in which a run has begun, and stopped."""
    run = RunFolder(tmp_path / "run", recipe, "digest")
    with run.held():
        run.start()
    return run


def put(run, step, bits=None):
    """A checkpoint of this step, as far as the folder is concerned."""
    half = run.half(step)
    half.mkdir()
    write_json(half / "training.json", {"progress": {"latest_heldout_bits": bits}})
    return run.keep(half, step)


def steps(run):
    return [int(path.name.removeprefix("step-")) for path in checkpoints_of(run.path)]


def test_only_names_that_the_program_writes_are_its_own(begun):
    mine = ["step-00000050-best", "step-backup", "step-9", "step-00000001.bak", "old"]
    for name in mine:
        (begun.checkpoints / name).mkdir()
    (begun.checkpoints / "step-99999999").write_text("a file")
    for step in (10, 20, 30, 123_456_789):
        put(begun, step)
    assert steps(begun) == [30, 123_456_789]
    assert latest(begun.path).name == "step-123456789"
    assert {path.name for path in begun.checkpoints.iterdir()} >= {*mine, "step-99999999"}


def test_the_best_by_heldout_bits_is_never_rotated_away(begun):
    for step, bits in ((10, None), (20, 3.0), (30, 2.0), (40, 2.0), (50, 9.0), (60, 9.5), (70, None)):
        put(begun, step, bits)
    assert steps(begun) == [30, 60, 70]
    assert best(begun.path).name == "step-00000030"
    put(begun, 80, 1.0)
    put(begun, 90, 8.0)
    put(begun, 100, 8.0)
    assert steps(begun) == [80, 90, 100]


@pytest.mark.parametrize("content", ["[]", "{", '{"progress": 3}', '{"progress": {"latest_heldout_bits": "low"}}'])
def test_a_checkpoint_whose_state_is_damaged_is_not_the_best(begun, content):
    place = put(begun, 10, 0.5)
    put(begun, 20, 3.0)
    (place / "training.json").write_text(content)
    assert best(begun.path).name == "step-00000020"


def test_two_runs_cannot_be_in_one_folder(begun, recipe):
    other = RunFolder(begun.path, recipe, "digest", resume=True)
    busy = pytest.raises(LockedError, match="another run is at work in folder")
    with begun_again(begun, recipe).held(), busy, other.held():
        pass
    with other.held():
        pass


def begun_again(run, recipe):
    return RunFolder(run.path, recipe, "digest", resume=True)


def test_a_killed_run_blocks_nobody(begun, recipe):
    code = """
import sys, time
from palimpsest.files import locked
with locked(sys.argv[1], "busy"):
    print(flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code, str(begun.path)], stdout=subprocess.PIPE, cwd=ROOT)
    holder.stdout.readline()
    with pytest.raises(LockedError), begun_again(begun, recipe).held():
        pass
    holder.kill()
    holder.communicate()
    with begun_again(begun, recipe).held():
        pass


def test_a_run_that_came_meanwhile_is_seen_under_the_lock(tmp_path, recipe):
    first, second = (RunFolder(tmp_path / "run", recipe, "digest") for _ in range(2))
    with first.held():
        first.start()
    with pytest.raises(ValueError, match=r"holds a run already; .*--resume.*--overwrite.*--out"), second.held():
        pass


@pytest.mark.parametrize("left", [[], [".run.json.0123456789abcdef.partial/"], ["checkpoints/"], [".DS_Store"]])
def test_a_kill_before_run_json_leaves_a_folder_that_may_be_used(tmp_path, recipe, left):
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).mkdir() if name.endswith("/") else (tmp_path / "run" / name).write_text("")
    for overwrite in (False, True):
        with (run := RunFolder(tmp_path / "run", recipe, "digest", overwrite=overwrite)).held():
            pass
    with run.held():
        run.start()
    assert is_run(run.path)
    assert not list(run.path.glob("*.partial"))


def test_overwriting_removes_what_the_program_wrote_and_nothing_else(begun, recipe):
    put(begun, 10)
    begun.record({"event": "train", "step": 1})
    (begun.path / "result.json").write_text("{}")
    (begun.path / "notes.md").write_text("precious")
    (begun.checkpoints / "step-00000010-best").mkdir()
    (begun.checkpoints / ".saving-step-00000020").mkdir()
    run = RunFolder(begun.path, recipe, "other", overwrite=True)
    assert steps(run) == [10], "nothing is removed before the run starts"
    with run.held():
        run.start()
    assert {p.relative_to(run.path).as_posix() for p in run.path.rglob("*")} == {
        "run.json", "notes.md", "checkpoints", "checkpoints/step-00000010-best",
    }  # fmt: skip
    assert read_run(run.path)["data"] == "other"


def test_a_checkpoint_that_is_a_link_loses_the_link_alone(begun, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "weights").write_text("precious")
    (begun.checkpoints / "step-00000001").symlink_to(tmp_path / "far")
    for step in (10, 20, 30):
        put(begun, step)
    assert steps(begun) == [20, 30]
    assert (tmp_path / "far" / "weights").read_text() == "precious"


@pytest.mark.parametrize(
    "content", ["{}", "[]", "", "{", "null", '{"recipe": [], "data": "x"}', '{"recipe": {}, "data": 3}']
)
def test_a_malformed_run_json_is_a_sentence(begun, recipe, content):
    (begun.path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json' (is damaged|is not JSON|holds a JSON)"):
        RunFolder(begun.path, recipe, "digest", resume=True)
    RunFolder(begun.path, recipe, "digest", overwrite=True)


def test_a_run_of_an_earlier_release_is_the_same_recipe(begun, recipe):
    saved = read_run(begun.path)
    saved["recipe"]["keep"] = saved["recipe"].pop("output")
    write_json(begun.path / "run.json", saved)
    RunFolder(begun.path, recipe, "digest", resume=True)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"finished": true}', '{"finished": true, "step": "10"}', '{"finished": false, "step": 10}']
)
def test_a_result_that_is_damaged_is_none(begun, content):
    put(begun, 10)
    (begun.path / "result.json").write_text(content)
    assert begun.result() is None
    (begun.path / "result.json").write_text('{"finished": true, "step": 10}')
    assert begun.result() is not None
    put(begun, 20)
    assert begun.result() is None, "of another step than the newest checkpoint"


def test_metrics_hold_json_and_survive_what_is_none(begun):
    begun.record({"event": "train", "step": 1, "loss": float("nan"), "rates": [float("inf"), 1.0]})
    begun.record({"event": "evaluate", "step": 2, "final": True})
    begun.record({"event": "train", "step": 3})
    with open(begun.metrics, "ab") as file:
        file.write(
            b'[1]\n3\n{"step": 1}\n{"step": "x", "event": "train"}\n\xff\xfe\n' + b"[" * 10_000 + b"\n" + b'{"ev'
        )
    assert [record["step"] for record in begun.records()] == [1, 2, 3]
    assert begun.records()[0] == {"event": "train", "step": 1, "loss": None, "rates": [None, 1.0]}
    begun.rewind(2)
    assert [record["step"] for record in begun.records()] == [1]
    assert begun.metrics.read_text().count("\n") == 1
    assert json.dumps(finite({"a": (1.0, float("-inf"))}), allow_nan=False) == '{"a": [1.0, null]}'


def test_what_is_not_finite_is_not_drawn(tmp_path):
    records = [
        {"event": "train", "step": 1, "tokens": 10, "bits_per_byte": None},
        {"event": "train", "step": 2, "tokens": 20, "bits_per_byte": 1e300},
        {"event": "evaluate", "step": 2, "tokens": 20, "heldout_bits_per_byte": None},
        {"event": "evaluate", "step": 3, "tokens": 30, "heldout_bits_per_byte": 1e300},
    ]
    assert all(file.stat().st_size for file in draw_loss_curve(records, {}, tmp_path))


def test_looking_at_a_folder_needs_no_accelerate():
    code = """
import sys
sys.modules["accelerate"] = None
from palimpsest.train import Recipe, latest, load_recipe
from palimpsest.train.run_folder import is_run
print(is_run("."), latest("."))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout == "False None\n", done.stderr
