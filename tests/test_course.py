"""Every lesson runs, draws its figure, accepts the right answers to its exercises and turns the wrong ones down."""

import importlib.util
import re
import sys
import time
from functools import cache
from pathlib import Path

import pytest

marimo = pytest.importorskip("marimo", reason="lessons are marimo notebooks: the docs extra")
COURSE = Path(__file__).parents[1] / "course"
LESSONS = sorted(COURSE.glob("[0-9][0-9]_*.py"))
SECONDS = 20  # what a reader waits at the most; half of it is usually the first import of torch


@cache
def run(path: Path):
    import matplotlib

    matplotlib.use("agg")
    sys.path.insert(0, str(COURSE))  # as `python course/...` does
    try:
        began = time.process_time()
        spec = importlib.util.spec_from_file_location(f"lesson_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        lesson = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(lesson)
        _, names = lesson.app.run()
        return names, time.process_time() - began
    finally:
        sys.path.remove(str(COURSE))


def test_there_are_twelve_lessons_in_order():
    assert [path.stem[:2] for path in LESSONS] == [f"{n:02}" for n in range(1, 13)]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_and_draws(path):
    names, seconds = run(path)
    assert hasattr(names["figure"], "savefig")
    assert seconds < SECONDS


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_exercises_know_right_from_wrong(path):
    names, _ = run(path)
    numbers = sorted(int(name[6:]) for name in names if re.fullmatch(r"check_\d", name))
    assert len(numbers) >= 2
    for n in numbers:
        check = names[f"check_{n}"]
        assert check(names[f"solution_{n}"]).startswith("Right"), n
        assert check(names[f"answer_{n}"]).startswith("Not yet"), n  # the stub that the learner fills in
        assert len(names[f"wrong_{n}"]) >= 2
        for wrong in names[f"wrong_{n}"]:
            assert check(wrong).startswith("Not yet"), n


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_has_its_parts(path):
    text = path.read_text()
    for part in (
        "After this lesson you can",
        "minutes",
        "## The idea",
        "## The mathematics",
        "## Exercises",
        "Where to look next",
    ):
        assert part in text, part
    links = re.findall(r"\]\((\d\d_\w+)\.md\)", text)
    assert all((COURSE / f"{link}.py").exists() for link in links), links
