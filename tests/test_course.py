"""Every lesson runs, draws its figure, accepts the right answers to its exercises and turns the wrong ones down; and each opens
in a browser as `marimo run` shows it, where links lead on, sliders move and answers can be typed.
"""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
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


def test_the_lessons_are_in_order():
    assert [path.stem[:2] for path in LESSONS] == [f"{n:02}" for n in range(1, 16)]


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


@pytest.fixture(scope="module")
def address():
    """The folder of lessons, as readers who do not write code open it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "marimo",
        "-q",
        "run",
        str(COURSE),
        "--headless",
        "--no-token",
        "--port",
        str(port),
    ]
    environment = os.environ | {"PYTHONPATH": str(COURSE.parent), "MPLBACKEND": "agg"}
    server = subprocess.Popen([*command, "--no-check"], env=environment, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/").close()
                break
            except OSError:
                assert server.poll() is None, "marimo did not start"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait()


def test_every_lesson_works_in_a_browser(address, chromium):
    page = chromium.new_page(viewport={"width": 900, "height": 900})
    page.set_default_timeout(120_000)
    for path in LESSONS:
        page.goto(f"{address}?file={path.name}")
        page.get_by_role("heading", name="Where to look next").first.wait_for()
        page.get_by_text("Solution 1", exact=True).wait_for()
        assert page.get_by_text("internal error").count() == 0, path.stem
        assert page.get_by_text("Not yet").count() >= 2, path.stem
        sliders = path.read_text().count("mo.ui.slider(")
        assert page.locator("[role=slider]").count() >= sliders, path.stem
        link = page.locator("a[href^='?file=']").last
        assert (COURSE / (link.get_attribute("href") or "").removeprefix("?file=")).is_file(), path.stem
    page.goto(f"{address}?file=06_the_equation.py")
    page.get_by_text("after, beta").or_(page.get_by_text("Not yet").first).first.wait_for()
    picture = lambda: [image.get_attribute("src") for image in page.locator("img").all()]
    page.locator("[role=slider]").first.wait_for()
    before = picture()
    page.locator("[role=slider]").first.press("ArrowRight")
    for _ in range(600):
        if picture() != before:
            break
        page.wait_for_timeout(100)
    assert picture() != before  # the slider moved the board
    page.locator(".cm-content").nth(1).click()
    page.keyboard.press("Control+a")
    page.keyboard.type("def answer_2(): return 'v'")
    page.locator("h1").first.click()  # leaving the editor hands the answer in
    page.get_by_text("Right: ").wait_for()
    page.close()
