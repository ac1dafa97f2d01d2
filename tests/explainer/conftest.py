"""A running explainer, and a reader of its page."""

import time
from pathlib import Path
from typing import Literal

import pytest

from benchmarks._page import served, settled
from palimpsest.explainer.server import Library

PICTURES = Path(__file__).parents[2] / "build" / "explainer"  # screenshots, to be looked at; never committed


@pytest.fixture(scope="session")
def run_server():
    return served


@pytest.fixture(scope="session")
def library() -> Library:
    return Library()


@pytest.fixture(scope="session")
def address(library):
    with served(library) as url:
        yield url


class Reader:
    """A page, what it complained about, and the few moves that tests make."""

    def __init__(self, browser, url: str, *, width: int = 1280, scheme: str = "light"):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.context.set_default_timeout(60_000)  # a machine under test may be busy with other things
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on(
            "console",
            lambda m: self.complaints.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None,
        )
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        home = (url.rpartition("/")[0], "data:")
        left = lambda r: r.url.startswith(home) or self.complaints.append(f"left the site: {r.url}")
        self.page.on("request", left)
        self.page.goto(url)
        self.page.wait_for_selector("html[data-ready], html[data-failed]")
        self.settled()

    def settled(self) -> None:
        settled(self.page)

    def choose(self, role: Literal["button", "radio"], name: str, within: str = "body") -> None:
        self.page.locator(within).get_by_role(role, name=name).click()
        self.settled()

    def watch_model(self) -> None:
        self.choose("radio", "A trained model")
        assert self.page.locator("#whiteboard").get_attribute("data-tokens") == "63"

    def press(self, *keys: str) -> None:
        self.page.locator("#whiteboard").focus()
        for key in keys:
            self.page.keyboard.press(key)

    def cells(self, rows: int, columns: int) -> list[list[str]]:
        """Every entry of the board as it is read out."""
        board = self.page.locator(".board canvas")
        board.blur()
        board.focus()
        self.page.keyboard.press("ArrowUp")  # from nowhere to the first entry
        read = []
        for row in range(rows):
            read.append([])
            for column in range(columns):
                said = self.page.locator(".board .readout").inner_text()
                assert said.startswith(f"S, row {row + 1}, column {column + 1}: "), said
                read[-1].append(said.split(": ")[1].split(",")[0])
                self.page.keyboard.press("ArrowRight")
            for key in ["ArrowDown"] + ["ArrowLeft"] * columns:
                self.page.keyboard.press(key)
        return read

    def slide(self, figure: str, name: str, value: float) -> None:
        slider = self.page.locator(f"{figure} .slider", has_text=name).locator("input")
        slider.evaluate("(input, value) => { input.value = value; input.dispatchEvent(new Event('input')) }", value)
        self.settled()

    def picture(self, name: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=PICTURES / f"{name}.png", full_page=True)

    def until(self, check, seconds: float = 60.0) -> None:
        """Waits until check() is true, of what the browser does in its own time: playing, focus, colours that fade."""
        end = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < end, "the page never showed it"
            self.page.wait_for_timeout(20)

    def close(self) -> None:
        self.context.close()
        assert self.complaints == []


@pytest.fixture
def open_page(chromium):
    """Opens pages, and holds each to its good manners when the test is over."""
    pages = []

    def open_it(url: str, **options) -> Reader:
        pages.append(Reader(chromium, url, **options))
        return pages[-1]

    yield open_it
    for page in pages:
        page.close()


@pytest.fixture
def reader(chromium, address):
    page = Reader(chromium, address)
    yield page
    page.close()
