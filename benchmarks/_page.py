"""The explainer's page in a browser: what its benchmark and its tests share."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from palimpsest.explainer.server import Library, listen, serve

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def browser() -> str | None:
    """The program that shows the page, if one is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def served(library: Library) -> Iterator[str]:
    """The address of a server that answers in a thread of this process."""
    listener, ready = listen(), threading.Event()
    address = []

    def up(url: str) -> None:
        address.append(url)
        ready.set()

    threading.Thread(target=serve, args=(listener, library, up), daemon=True).start()
    assert ready.wait(120)
    yield address[0]


def settled(page) -> None:
    """Waits until the page has heard what was done to it, and computed and drawn all that follows."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    page.wait_for_selector("html:not([data-busy])")
