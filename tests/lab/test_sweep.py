"""Sweeps: resumed, interrupted, refused; verdicts and comparisons that say how sure they are."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from palimpsest import cli
from palimpsest.lab.compare.comparison import versus
from palimpsest.lab.compare.seed_statistics import Spread, against, diverged, tuned
from palimpsest.lab.framework.executors import executor_of
from palimpsest.lab.framework.experiment import Experiment, Record, Verdict, load_experiment
from palimpsest.lab.framework.report import compare
from palimpsest.lab.framework.results import failures, read_lines, read_records, title
from palimpsest.lab.framework.sweep import InterruptedSweep, check_device, check_room, run
from palimpsest.lab.framework.worker import PATIENCE, Session

RECIPE = '''
"""An experiment whose points take no time, unless they wait for other processes, or for a file named go."""
import os, time
from dataclasses import dataclass
from pathlib import Path
from palimpsest.lab.framework.experiment import Experiment, Verdict
from palimpsest.lab.compare.plots import figure

@dataclass(frozen=True)
class Count:
    number: int
    seed: int = 0
    def label(self): return {"number": self.number, "seed": self.seed}
    def to_dict(self): return {"kind": "count", **vars(self)}
    def prepare(self):
        if self.number < 0: raise ValueError(f"number is {self.number}; give 0 or more")
    def work(self): return float(WORK(self))
    def bytes_needed(self): return 1
    def run(self, device, tell, unfinished):
        for i in range(4): tell(i / 4, f"{i}")
        (HERE / f"process-{os.getpid()}").touch()
        while len(list(HERE.glob("process-*"))) < PROCESSES: wait(tell)
        while self.number + POINTS * self.seed >= FREE and not (HERE / "go").exists(): wait(tell)
        if self.number == BROKEN: raise RuntimeError("a bad number")
        return {"rows": [{"square": float(self.number**2 + self.seed), "process": os.getpid()}]}

HERE = Path(__file__).parent
BROKEN, POINTS = None, 4
PROCESSES = 1  # that have begun a point before any ends one
FREE = 1000  # points of the plan that do not wait for the file
WORK = lambda point: 1

def wait(tell):
    tell(0.5, "")
    time.sleep(0.02)

def draw(records):
    found, (ax,) = figure()
    ax.plot([r.label["number"] for r in records], [r.rows[0]["square"] for r in records])
    return {"squares": found}

EXPERIMENT = Experiment(
    name="count", question="what are the squares?", claim="They grow.", scales={"tiny": "four numbers", "bad": "a bad one"},
    points=lambda scale: [Count(n, s) for s in (0, 1) for n in range(POINTS)] if scale == "tiny" else [Count(-1)],
    judge=lambda records: Verdict("measured", [f"{len(records)} points."]), draw=draw,
)
'''


def recipe(folder: Path, name: str = "count.py", **changes) -> Experiment:
    (folder / name).write_text("\n".join([RECIPE, *(f"{key} = {value}" for key, value in changes.items())]))
    return load_experiment(str(folder / name))


def test_a_sweep_leaves_results_csv_plots_and_a_report(tmp_path):
    events = []
    assert run(
        recipe(tmp_path),
        "tiny",
        tmp_path / "out",
        device="cpu",
        report=events.append,
        command="the command",
        note="a note",
    )
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"sweep.json", "results.jsonl", "results.csv", "squares.png", "report.md"}
    report = (tmp_path / "out" / "report.md").read_text()
    for words in (
        "what are the squares?",
        "Verdict: measured.",
        "8 points",
        "Seeds: 0, 1",
        "`the command`",
        "a note",
        "torch",
        "UTC",
    ):
        assert words in report
    rows = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert rows[0] == "point,number,seed,square,process,seconds"
    assert len(rows) == 9
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert kinds.count("point") == 8
    shares = [event["done"] for event in events if "done" in event]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert all(event["eta"] is None or event["eta"] >= 0 for event in events if "eta" in event)


def test_a_finished_sweep_runs_nothing_again(tmp_path):
    experiment = recipe(tmp_path)
    run(experiment, "tiny", tmp_path / "out", device="cpu")
    before = (tmp_path / "out" / "results.jsonl").read_text()
    events = []
    assert run(experiment, "tiny", tmp_path / "out", device="cpu", report=events.append)
    assert events[0]["left"] == 0
    assert (tmp_path / "out" / "results.jsonl").read_text() == before


def test_only_some_points_and_then_the_rest(tmp_path):
    experiment = recipe(tmp_path)
    assert not run(experiment, "tiny", tmp_path / "out", device="cpu", only="number 2")
    assert [r.label["number"] for r in read_records(tmp_path / "out")] == [2, 2]
    assert "6 of 8 points are not run yet" in (tmp_path / "out" / "report.md").read_text()
    assert run(experiment, "tiny", tmp_path / "out", device="cpu")
    assert len(read_records(tmp_path / "out")) == 8


def test_an_interrupt_keeps_what_is_done_and_loses_the_running_point_alone(tmp_path):
    experiment = recipe(tmp_path)

    def stop(event):
        if event["event"] == "progress" and event["point"].startswith("number 3") and event["share"] > 0.4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedSweep):
        run(experiment, "tiny", tmp_path / "out", device="cpu", report=stop)
    assert [r.label["number"] for r in read_records(tmp_path / "out")] == [0, 1, 2]
    assert (tmp_path / "out" / "report.md").is_file()
    assert run(experiment, "tiny", tmp_path / "out", device="cpu")
    numbers = [line["label"]["number"] for line in read_lines(tmp_path / "out" / "results.jsonl")]
    assert numbers == [0, 1, 2, 3, 0, 1, 2, 3]


def test_an_interrupted_training_is_taken_up_where_it_was(tmp_path):
    fig4, one = load_experiment("fig4"), "contestant kda, task mqar"
    run(fig4, "tiny", tmp_path / "whole", device="cpu", only=one)
    shares = []

    def stop(event):
        if event["event"] == "progress":
            shares.append(event["share"])
            if event["share"] == 0.75 and len(shares) == 3:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedSweep):
        run(fig4, "tiny", tmp_path / "halves", device="cpu", only=one, report=stop)
    assert len(list((tmp_path / "halves" / "unfinished").iterdir())) == 1
    assert run(fig4, "tiny", tmp_path / "halves", device="cpu", only=one, report=stop) is False  # of all nine points
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert not (tmp_path / "halves" / "unfinished").exists()
    whole, halves = (read_records(tmp_path / name)[0] for name in ("whole", "halves"))
    assert halves.result == whole.result


def test_a_recipe_that_grew_goes_on(tmp_path):
    run(recipe(tmp_path), "tiny", tmp_path / "out", device="cpu")
    events = []
    assert run(recipe(tmp_path, "more.py", POINTS=5), "tiny", tmp_path / "out", device="cpu", report=events.append)
    assert events[0]["left"] == 2


def test_a_line_cut_by_a_kill_is_run_again(tmp_path):
    experiment = recipe(tmp_path)
    run(experiment, "tiny", tmp_path / "out", device="cpu")
    file = tmp_path / "out" / "results.jsonl"
    file.write_text(file.read_text()[:-40])
    assert len(read_records(tmp_path / "out")) == 7
    assert run(experiment, "tiny", tmp_path / "out", device="cpu")
    assert len(read_records(tmp_path / "out")) == 8
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_a_point_that_fails_is_told_and_tried_again(tmp_path):
    broken = recipe(tmp_path, BROKEN=1)
    assert not run(broken, "tiny", tmp_path / "out", device="cpu")
    assert failures(tmp_path / "out") == [
        ("number 1, seed 0", "RuntimeError: a bad number"),
        ("number 1, seed 1", "RuntimeError: a bad number"),
    ]
    assert "RuntimeError: a bad number" in (tmp_path / "out" / "report.md").read_text()
    assert run(recipe(tmp_path, "mended.py"), "tiny", tmp_path / "out", device="cpu")
    assert failures(tmp_path / "out") == []


@pytest.mark.timeout(240)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_ends_in_its_time_and_goes_on(tmp_path, workers):
    """Points that would wait for ever do not keep it."""
    experiment = recipe(tmp_path, FREE=2)
    seconds = 2 if workers == 1 else 10
    assert not run(experiment, "tiny", tmp_path / "out", device="cpu", workers=workers, minutes=seconds / 60)
    assert len(read_records(tmp_path / "out")) <= 2
    (tmp_path / "go").touch()
    assert run(experiment, "tiny", tmp_path / "out", device="cpu", minutes=60)
    assert len(read_records(tmp_path / "out")) == 8


@pytest.mark.timeout(240)
def test_points_run_in_processes_side_by_side(tmp_path):
    assert run(recipe(tmp_path, PROCESSES=2), "tiny", tmp_path / "out", device="cpu", workers=2)
    records = read_records(tmp_path / "out")
    assert len(records) == 8
    processes = {r.rows[0]["process"] for r in records}
    assert os.getpid() not in processes
    assert len(processes) == 2


@pytest.mark.timeout(240)
def test_long_points_are_begun_first(tmp_path):
    run(recipe(tmp_path, WORK="lambda point: 1 + point.number"), "tiny", tmp_path / "out", device="cpu", workers=2)
    done: dict[int, list[int]] = {}
    for line in read_lines(tmp_path / "out" / "results.jsonl"):
        done.setdefault(line["result"]["rows"][0]["process"], []).append(line["label"]["number"])
    for numbers in done.values():  # whoever takes how many of them
        assert numbers == sorted(numbers, reverse=True)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("executor", ["processes", "submitit-local"])
def test_ctrl_c_ends_the_workers_too(tmp_path, executor):
    """As a terminal sends it, to all of them at once: the workers leave it to the sweep."""
    if executor != "processes":
        pytest.importorskip("submitit")
    experiment = recipe(tmp_path, FREE=2)
    code = (
        "from palimpsest.lab.framework.experiment import load_experiment\nfrom palimpsest.lab.framework.sweep import *\n"
        "from palimpsest.lab.framework.executors import executor_of\n"
        "if __name__ == '__main__':\n"
        "    try:\n        run(load_experiment('count.py'), 'tiny', 'out', device='cpu', workers=2,\n"
        f"            runner=executor_of({executor!r}, 2))\n"
        "    except InterruptedSweep:\n        raise SystemExit(130)\n"
    )
    (tmp_path / "main.py").write_text(code)
    root = str(Path(__file__).parents[2])
    child = subprocess.Popen(
        [sys.executable, "main.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": root}, start_new_session=True
    )
    results = tmp_path / "out" / "results.jsonl"
    try:
        while not (results.is_file() and len(read_lines(results)) >= 2):
            assert child.poll() is None
            time.sleep(0.1)
        os.killpg(child.pid, signal.SIGINT)
        began = time.monotonic()
        assert child.wait(200) == 130
        assert time.monotonic() - began < PATIENCE  # nobody had to be ended
    finally:
        child.kill()
    assert len(read_records(tmp_path / "out")) == 2
    (tmp_path / "go").touch()
    assert run(experiment, "tiny", tmp_path / "out", device="cpu")
    assert len(read_records(tmp_path / "out")) == 8


@pytest.mark.timeout(240)
@pytest.mark.parametrize("executor", ["processes", "submitit-local"])
def test_a_killed_worker_loses_nothing(tmp_path, executor):
    """Two workers at work on two points; one is killed in the middle of its own, which another then does."""
    if executor != "processes":
        pytest.importorskip("submitit")
    experiment = recipe(tmp_path, POINTS=1, PROCESSES=2, FREE=0)
    killed = []

    def kill(event):
        begun = list(tmp_path.glob("process-*"))
        if len(begun) == 2 and not killed:
            killed.append(int(begun[0].name.partition("-")[2]))
            os.kill(killed[0], signal.SIGKILL)
        if len(begun) == 3:  # its point has another worker
            (tmp_path / "go").touch()

    runner = executor_of(executor, 2)
    assert run(experiment, "tiny", tmp_path / "out", device="cpu", workers=2, report=kill, runner=runner)
    lines = read_lines(tmp_path / "out" / "results.jsonl")
    assert [line["label"]["seed"] for line in sorted(lines, key=lambda line: line["label"]["seed"])] == [0, 1]
    assert all("result" in line for line in lines)
    assert killed[0] not in {line["result"]["rows"][0]["process"] for line in lines}
    assert not (tmp_path / "out" / "running").exists()


CLUSTER = """
from concurrent.futures import Future, ThreadPoolExecutor

def pool(workers):
    return ThreadPoolExecutor(workers)

class Sinking:  # whoever takes the first point of the plan goes down with it
    calls = 0
    def submit(self, function, job):
        call, first = Future(), Sinking.calls == 0 or job.identity == Sinking.bad
        if Sinking.calls == 0: Sinking.bad = job.identity
        Sinking.calls += 1
        call.set_exception(OSError("the node went down")) if first else call.set_result(function(job))
        return call

def sinking(workers):
    return Sinking()
"""


@pytest.fixture
def threads():
    """As many as before: workers take one each."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_an_executor_of_ones_own_takes_a_sweep(tmp_path, threads, capsys):
    (tmp_path / "cluster.py").write_text(CLUSTER)
    recipe(tmp_path)
    command = [
        "lab",
        "run",
        str(tmp_path / "count.py"),
        "--scale",
        "tiny",
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "3",
    ]
    command += ["--executor", f"{tmp_path / 'cluster.py'}:pool"]
    assert cli.run(command) == 1
    assert "runs points on other machines, and --device is auto" in capsys.readouterr().err
    assert cli.run([*command, "--device", "cpu"]) == 0
    assert len(read_records(tmp_path / "out")) == 8
    assert "--executor" in (tmp_path / "out" / "report.md").read_text()


def test_a_point_that_takes_every_worker_down_is_told_and_tried_again(tmp_path, threads):
    (tmp_path / "cluster.py").write_text(CLUSTER)
    experiment = recipe(tmp_path)
    sinking = executor_of(f"{tmp_path / 'cluster.py'}:sinking", 1)
    assert not run(experiment, "tiny", tmp_path / "out", device="cpu", runner=sinking)
    told = failures(tmp_path / "out")
    assert [words for words, _ in told] == ["number 0, seed 0"]
    assert "lost 3 times (OSError: the node went down); use fewer workers" in told[0][1]
    assert len(read_records(tmp_path / "out")) == 7
    assert run(experiment, "tiny", tmp_path / "out", device="cpu")


def test_a_worker_stops_once_its_sweep_is_gone_or_another(tmp_path, monkeypatch):
    sweep, late = Session(tmp_path, "one"), Session(tmp_path, "one")
    sweep.beat()
    assert late.is_on()
    monkeypatch.setattr("palimpsest.lab.framework.worker.SILENCE", 0.0)
    late._asked = -1.0
    assert not late.is_on()  # no beat for so long
    monkeypatch.undo()
    assert Session(tmp_path, "one").is_on()
    assert not Session(tmp_path, "another").is_on()
    sweep.end()
    assert not Session(tmp_path, "one").is_on()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("slrum", "executor 'slrum' is unknown; give 'processes', 'slurm'"),
        ("processes:2", "is unknown"),
        ("submitit-local:timeout", "'timeout' is not SETTING=VALUE"),
        ("none.py:pool", "executor 'none.py' is not a file"),
    ],
)
def test_an_executor_that_is_none_is_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        executor_of(text, 2)


def test_submitits_own_refusal_is_a_sentence(tmp_path):
    pytest.importorskip("submitit")
    runner = executor_of("submitit-local:colour=red", 1)
    with pytest.raises(ValueError, match="submitit refuses local with .*colour"):
        run(recipe(tmp_path), "tiny", tmp_path / "out", device="cpu", runner=runner)


def test_runs_outside_the_main_thread(tmp_path):
    experiment, found = recipe(tmp_path), []
    thread = threading.Thread(target=lambda: found.append(run(experiment, "tiny", tmp_path / "out", device="cpu")))
    thread.start()
    thread.join()
    assert found == [True]


def test_bad_input_is_refused_before_anything_runs(tmp_path):
    experiment = recipe(tmp_path)
    run(experiment, "tiny", tmp_path / "out", device="cpu")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    other = recipe(tmp_path, "other.py", POINTS=3)
    cases = {
        "holds 'count' with other settings": lambda: run(other, "tiny", tmp_path / "out", device="cpu"),
        "holds 'count' at scale 'tiny', not 'fig4'": lambda: run(
            load_experiment("fig4"), "tiny", tmp_path / "out", device="cpu"
        ),
        "holds no results of the lab": lambda: run(experiment, "tiny", tmp_path / "full", device="cpu"),
        "is a file; give a folder": lambda: run(experiment, "tiny", tmp_path / "file", device="cpu"),
        "has no scale 'huge'; choose one of tiny, bad": lambda: run(experiment, "huge", tmp_path / "new"),
        "number is -1; give 0 or more": lambda: run(experiment, "bad", tmp_path / "new"),
        "workers is 0": lambda: run(experiment, "tiny", tmp_path / "new", device="cpu", workers=0),
        "give 'cpu', 'cuda', or 'cuda:1'": lambda: run(experiment, "tiny", tmp_path / "new", device="tpu"),
        "device is 'cuda:x'": lambda: run(experiment, "tiny", tmp_path / "new", device="cuda:x"),
        "minutes is 0; give a number above 0": lambda: run(experiment, "tiny", tmp_path / "new", minutes=0),
        "minutes is nan": lambda: run(experiment, "tiny", tmp_path / "new", minutes=math.nan),
        "no point of 'count' matches 'number 9'": lambda: run(
            experiment, "tiny", tmp_path / "new", device="cpu", only="number 9"
        ),
        "experiment 'fig5' is unknown": lambda: load_experiment("fig5"),
        "is not a file": lambda: load_experiment(str(tmp_path / "none.py")),
    }
    for sentence, call in cases.items():
        with pytest.raises(ValueError, match=sentence) as error:
            call()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"


def test_a_folder_is_for_one_run_at_a_time(tmp_path):
    experiment, said = recipe(tmp_path), []

    def again(event):
        if event["event"] == "point" and not said:
            with pytest.raises(ValueError, match="is in use by another run; wait for it") as error:
                run(experiment, "tiny", tmp_path / "out", device="cpu")
            said.append(error)

    assert run(experiment, "tiny", tmp_path / "out", device="cpu", report=again)
    assert said
    assert len(read_lines(tmp_path / "out" / "results.jsonl")) == 8


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"experiment": "count"}', "no JSON"])
def test_a_folder_whose_sheet_is_broken_is_refused(tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match="holds no results of the lab"):
        run(recipe(tmp_path), "tiny", tmp_path / "out", device="cpu")
    assert (tmp_path / "out" / "sweep.json").read_text() == text


def test_what_is_no_point_is_refused(tmp_path):
    for points, sentence in (([], "no point at scale 'tiny'"), (["kda"], "point 'kda' without label, to_dict")):
        experiment = replace(recipe(tmp_path), points=lambda scale, points=points: points)
        with pytest.raises(ValueError, match=sentence):
            run(experiment, "tiny", tmp_path / "new", device="cpu")
    assert not (tmp_path / "new").exists()


def test_recipes_that_do_not_run_say_why(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="does not run: ZeroDivisionError"):
        load_experiment(str(tmp_path / "broken.py"))
    with pytest.raises(ValueError, match="defines no EXPERIMENT"):
        load_experiment(str(tmp_path / "empty.py"))


def test_a_gpu_too_small_for_the_sweep_is_told_how_many_workers_fit():
    largest = lambda needed: {"x": SimpleNamespace(bytes_needed=lambda: needed, label=lambda: {"name": "x"})}
    check_room(largest(1 << 30), 8 << 30, 4)
    with pytest.raises(ValueError, match="give at most 1 workers"):
        check_room(largest(5 << 30), 8 << 30, 4)
    with pytest.raises(ValueError, match="smaller scale or on a larger GPU"):
        check_room(largest(50 << 30), 8 << 30, 1)


def test_a_gpu_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU"):
        run(recipe(tmp_path), "tiny", tmp_path / "out", device="cuda")


def test_a_gpu_that_is_one_too_many_is_said(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    check_device("cuda:0")
    with pytest.raises(ValueError, match="has 1 GPUs"):
        check_device("cuda:1")


def record(who: str, seed: int, accuracy: float, lr: float = 1e-3) -> Record:
    label = {"contestant": who, "task": "t", "length": 8, "lr": lr, "seed": seed}
    return Record(label, {"rows": [{"best_accuracy": accuracy}]}, 1.0)


def test_the_best_rate_is_chosen_by_its_mean_over_seeds():
    found = tuned(
        [record("kda", 0, 0.9), record("kda", 1, 0.1), record("kda", 0, 0.6, 1e-2), record("kda", 1, 0.6, 1e-2)],
        ("contestant",),
    )
    assert found["kda",] == (Spread((0.6, 0.6)), 1e-2)


def test_a_difference_within_the_seeds_is_called_so():
    assert "less than their seeds do" in against("A", Spread((0.5, 0.9)), "B", Spread((0.6, 0.7)))
    assert "in every seed" in against("A", Spread((0.8, 0.9)), "B", Spread((0.6, 0.7)))
    assert "in one seed" in against("A", Spread((0.9,)), "B", Spread((0.1,)))
    assert "both solve it" in against("A", Spread((0.99, 1.0)), "B", Spread((1.0, 1.0)))


def test_runs_that_diverged_are_told():
    ended = lambda who, seed, lost: replace(record(who, seed, 0.5), result={"rows": [{"diverged": lost}]})
    runs = [ended("kda", 0, False), ended("bare", 0, True), ended("bare", 1, False)]
    assert diverged(runs) == ["Diverged: bare on t 8 (1 of 2 runs)."]
    assert diverged(runs[:1]) == []


def test_compare_puts_common_points_side_by_side(tmp_path):
    experiment = recipe(tmp_path)
    for name in ("a", "b"):
        run(experiment, "tiny", tmp_path / name, device="cpu")
    tables = compare([tmp_path / "a", tmp_path / "b"])
    square = next(t for t in tables if t.title == "square")
    assert square.rows[3] == ["number 3", "9.5 (9 to 10)", "9.5 (9 to 10)", "+0 (within the spread)"]
    with pytest.raises(ValueError, match="at least two"):
        compare([tmp_path / "a"])
    with pytest.raises(ValueError, match=r"holds no results\.csv"):
        compare([tmp_path / "a", tmp_path])
    for name in ("sweep.json", "results.jsonl"):  # what is published has neither
        (tmp_path / "b" / name).unlink()
    assert compare([tmp_path / "a", tmp_path / "b"]) == tables
    assert cli.run(["lab", "show", str(tmp_path / "b")]) == 0


PUBLISHED = Path(__file__).parents[2] / "results" / "lab"


@pytest.mark.parametrize("name", [folder.name for folder in sorted(PUBLISHED.glob("*")) if folder.is_dir()])
def test_what_is_published_can_be_compared_and_is_report_plots_and_numbers(name):
    folder = PUBLISHED / name
    for table in compare([folder, folder]):
        assert table.rows
        assert all((row[1] == row[2] and row[3].startswith("+0")) or "nan" in row[3] for row in table.rows)
    plots = re.findall(r"\]\((.+\.png)\)", (folder / "report.md").read_text())
    assert {file.name for file in folder.iterdir()} == {"report.md", "results.csv", *plots}


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "point,a\n,1\n", "\0", "point\n" + '"x' * 70000])
def test_a_table_that_is_no_results_is_refused(tmp_path, text):
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(ValueError, match=r"holds no results\.csv of the lab|no point in common|no finished point"):
        compare([tmp_path, tmp_path])


def test_a_title_reads_as_a_line():
    assert title({"a": 1, "b": "x"}) == "a 1, b x"
    assert Verdict("shown", ()).tables == ()


def test_a_test_that_nobody_passes_is_said_in_three_words():
    rows = [
        {"test_task": "needle", "test_length": 8, "exact": 0.0, "parameters": 1, "state_numbers": 1, "diverged": False}
    ]
    runs = [replace(record(who, seed, 0.0), result={"rows": rows}) for who in ("a", "b") for seed in (0, 1)]
    runs = [replace(r, label=r.label | {"task": "needle"}) for r in runs]
    verdict = versus("a", {"b": "the other"})(runs)
    assert verdict.outcome == "undecided"
    assert verdict.because[0] == "needle 8: nobody has any right."
