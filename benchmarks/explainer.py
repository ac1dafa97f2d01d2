"""How soon the explainer's page is there, and how quickly it follows its reader, in the browser of this machine.

    python -m benchmarks.explainer

Needs playwright and Chromium. Writes explainer.json (every sample) and explainer.md to benchmarks/results/explainer.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks._page import FLAGS, browser, served, settled
from benchmarks._samples import publish
from palimpsest import KimiLinearConfig, KimiLinearForCausalLM
from palimpsest.explainer.server import Library

REPEATS = 10
SENTENCES = (
    "The lamp is gold, then the lamp is blue. Say it again, the lamp?",
    "The door is grey, then the door is blue. Say it again, the door?",
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
    """A page of this library, open in a browser at its trained model."""
    from playwright.sync_api import sync_playwright

    program = browser()
    if program is None:
        sys.exit("the page is timed in Chromium, and none is installed: apt-get install chromium")
    with served(library) as address, sync_playwright() as run:
        chromium = run.chromium.launch(executable_path=program, args=FLAGS, env=dict(os.environ))
        page = chromium.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
        page.goto(address)
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        page.get_by_role("radio", name="A trained model").click()
        settled(page)
        yield page
        chromium.close()


def sentences(progress: tqdm) -> list[float]:
    """Milliseconds from a sentence to its memory, traced, sent and drawn."""
    samples = []
    with reading(Library()) as page:
        box = page.get_by_label("Your sentence")
        for i in range(REPEATS + 1):
            box.fill(SENTENCES[i % 2])
            box.press("Enter")
            settled(page)
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
    with tqdm(total=8 * REPEATS + 1, unit=" moves", file=sys.stderr) as progress:
        up = []
        for _ in range(REPEATS):
            up.append(until_the_page_answers())
            progress.update()
        samples = {
            "the page answers, after the command": up,
            "64 tokens traced and drawn": sentences(progress),
            "one step of a 128 x 128 board": steps(progress),
        }
    publish("explainer", "milliseconds", samples)


if __name__ == "__main__":
    main()
