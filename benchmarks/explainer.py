"""How soon the explainer's page is there, and how quickly it follows its reader, in the browser of this machine.

    python -m benchmarks.explainer

Needs playwright and Chromium. Writes explainer.json (every sample) and explainer.md to benchmarks/results/explainer.
"""

import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks._samples import publish
from palimpsest import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.explainer.server import STATIC, Library, listen, serve

REPEATS = 10
SENTENCES = (
    "The lamp is gold, then the lamp is blue. Say it again, the lamp?",
    "The door is red, then the door is blue. Say it again, the door?",
)
STEP = """() => {
    const begun = performance.now();
    document.querySelector("#whiteboard").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
    document.querySelector(".board canvas").getContext("2d").getImageData(0, 0, 1, 1); // waits until it is drawn
    return performance.now() - begun;
}"""


def until_the_page_answers() -> float:
    """Milliseconds from the command to the page's first byte to its last, in a process of its own."""
    command = [sys.executable, "-u", "-m", "palimpsest", "explain", "--no-browser"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        address = re.search(r"http://\S+/", process.stdout.readline())
        assert address is not None, "palimpsest explain did not say where it is"
        with urllib.request.urlopen(address[0]) as answer:
            answer.read()
        seconds = time.perf_counter() - began
        process.terminate()
    return 1e3 * seconds


@contextmanager
def reading(library: Library) -> Iterator:
    """A page of this library, open in a browser."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        sys.exit("the page is timed in Chromium, and none is installed: apt-get install chromium")
    address, ready = [], threading.Event()
    up = lambda url: (address.append(url), ready.set())
    threading.Thread(target=serve, args=(listen(), library, up), daemon=True).start()
    ready.wait()
    with sync_playwright() as run:
        browser = run.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"], env=dict(os.environ)
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
        page.goto(address[0])
        page.wait_for_selector("html[data-ready]:not([data-busy])", timeout=60_000)
        page.get_by_role("radio", name="A trained model").click()
        page.wait_for_selector("#whiteboard[data-tokens='63']")
        page.wait_for_selector("html:not([data-busy])")
        yield page
        browser.close()


def sentences(progress: tqdm) -> list[float]:
    """Milliseconds from a sentence to its memory, traced, sent and drawn."""
    samples = []
    with reading(Library()) as page:
        box = page.get_by_label("Your sentence")
        for i in range(REPEATS + 1):
            text = SENTENCES[i % 2]
            box.fill(text)
            box.press("Enter")
            page.wait_for_selector(f"#whiteboard[data-tokens='{len(text)}']")
            page.wait_for_selector("html:not([data-busy])")
            samples.append(float(page.locator("#whiteboard").get_attribute("data-milliseconds")))
            progress.update()
    return samples[1:]


def steps(progress: tqdm) -> list[float]:
    """Milliseconds of one step of a board of 128 x 128, its sentences and labels included."""
    config = KimiLinearConfig.tiny("K", linear_head_dim=128, linear_num_heads=1, num_experts=0)
    with tempfile.TemporaryDirectory() as folder:
        KimiLinearForCausalLM(config).save_pretrained(folder)
        with reading(Library(Path(folder))) as page:
            page.locator("#whiteboard").focus()
            page.keyboard.press("Home")
            samples = []
            for _ in range(6 * REPEATS):
                samples.append(page.evaluate(STEP))
                progress.update()
    return samples


def main() -> None:
    torch.manual_seed(0)
    with tqdm(total=REPEATS + REPEATS + 1 + 6 * REPEATS, unit=" moves", file=sys.stderr) as progress:
        up = []
        for _ in range(REPEATS):
            up.append(until_the_page_answers())
            progress.update()
        samples = {
            "the page answers, after the command": up,
            "64 tokens traced and drawn": sentences(progress),
            "one step of a 128 x 128 board": steps(progress),
        }
    packed = lambda path: len(path.read_bytes() if path.suffix == ".woff2" else gzip.compress(path.read_bytes()))
    weight = sum(packed(path) for path in STATIC.rglob("*") if path.is_file())
    publish("explainer", "milliseconds", samples, f"All files of the page, compressed: {weight / 1e6:.2f} MB.")


if __name__ == "__main__":
    main()
