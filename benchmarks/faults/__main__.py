"""Runs the campaigns and writes docs/faults.md: `python -m benchmarks.faults`, or some of them with `--only WORD`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import select
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path

from benchmarks import faults
from benchmarks.faults import Campaign, Counts
from palimpsest.files import LockedError, locked, read_object, write_json, write_text

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
PAGE = ROOT / "docs" / "faults.md"


def campaigns() -> dict[str, Campaign]:
    """All campaigns of this folder's files, by name."""
    modules = [importlib.import_module(f"benchmarks.faults.{m.name}") for m in pkgutil.iter_modules(faults.__path__)]
    listed = [campaign for module in modules for campaign in getattr(module, "CAMPAIGNS", [])]
    assert len({campaign.name for campaign in listed}) == len(listed), "two campaigns have one name"
    return {campaign.name: campaign for campaign in listed}


def child(name: str, start: int) -> None:
    """Runs the trials of a campaign from one on, and prints a line before and after each."""
    lines, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory(prefix="palimpsest-faults-") as folder:
        for i, trial in enumerate(campaigns()[name].trials(Path(folder))):
            if i < start:
                continue
            print(json.dumps(["begin", i, trial.name]), file=lines, flush=True)
            try:
                wrong = trial.run()
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"[:500]
            print(json.dumps(["end", i, wrong]), file=lines, flush=True)
    print(json.dumps(["done", 0, None]), file=lines, flush=True)


def run(campaign: Campaign) -> Counts:
    """All trials of a campaign; a process that dies or hangs costs the trial that it was at, and the rest goes on."""
    tried, failures, start, done = 0, [], 0, False
    while not done:
        begun: tuple[int, str] | None = None
        command = [sys.executable, "-m", "benchmarks.faults", "--child", campaign.name, "--start", str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
            hung = False
            for word, i, what in _lines(process, campaign.patience):
                if word == "done":
                    done = True
                elif word == "begin":
                    begun = i, what
                elif word == "end" and begun is not None:
                    tried += 1
                    if what is not None:
                        failures.append(f"{begun[1]}: {what}")
                    begun = None
                elif word == "hang":
                    hung = True
                    process.kill()
                if word in ("begin", "end"):
                    start = i + 1
                if sys.stderr.isatty():
                    print(f"\r{campaign.name}: {tried} tried, {len(failures)} failed ", end="", file=sys.stderr)
        if begun is not None:
            tried += 1
            ended = "hung" if hung else f"ended the process ({process.returncode})"
            failures.append(f"{begun[1]}: {ended}")
        elif not done:
            raise RuntimeError(f"campaign {campaign.name!r} cannot draw its trials; run it with --child to see why")
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return Counts(tried, tried - len(failures), failures)


def _lines(process: subprocess.Popen, patience: float):
    """The lines of a child as lists; ["hang", 0, None] when none comes for too long."""
    assert process.stdout is not None
    held, descriptor = b"", process.stdout.fileno()
    wait = max(patience, 300.0)  # the first line comes when all is imported
    while True:
        if not select.select([descriptor], [], [], wait)[0]:
            yield ["hang", 0, None]
            return
        block = os.read(descriptor, 1 << 16)
        if not block:
            return
        wait = patience
        *whole, held = (held + block).split(b"\n")
        yield from map(json.loads, whole)


def store(rows: dict[str, dict], listed: dict[str, Campaign]) -> None:
    """Adds rows to what is stored, in the order listed, and writes the page; other commands may do so meanwhile."""
    from palimpsest.machine import machine  # loads torch, which a child need not

    with waiting(RESULTS.parent):
        stored = read_object(RESULTS)["campaigns"] if RESULTS.is_file() else {}
        merged = stored | rows
        ordered = {name: merged[name] | {"about": c.about} for name, c in listed.items() if name in merged}
        whole = {"date": date.today().isoformat(), "machine": machine(), "campaigns": ordered}
        write_json(RESULTS, whole, indent=1)
        write_text(PAGE, page(whole))


@contextmanager
def waiting(folder: Path):
    """Holds a folder, however long another holds it before."""
    while True:
        with suppress(LockedError), locked(folder, "busy"):
            yield
            return
        time.sleep(0.1)


def page(stored: dict) -> str:
    """The table as Markdown."""
    from palimpsest.machine import in_words

    rows = stored["campaigns"]
    tried, survived = (sum(row[key] for row in rows.values()) for key in ("tried", "survived"))
    lines = [
        "# Faults",
        "",
        "What was done to the program on purpose, and how often it held. A bad input is survived if it is refused in a",
        "sentence, or answered rightly; a fault, if no finished work is lost, nothing hangs, and the next start goes on.",
        "",
        f"**{tried:,} faults tried, {survived:,} survived.**",
        "",
        "| Campaign | What is done | tried | survived |",
        "|---|---|---:|---:|",
    ]
    lines += [f"| {name} | {row['about']} | {row['tried']:,} | {row['survived']:,} |" for name, row in rows.items()]
    failures = [f"- {name}, {failure}" for name, row in rows.items() for failure in row["failures"][:20]]
    if failures:
        lines += ["", "## Not survived", "", *(line.replace("\n", " ")[:400] for line in failures)]
    lines += [
        "",
        f"{stored['date']}; {in_words(stored['machine'])}; `python -m benchmarks.faults`.",
        "A campaign is a file of `benchmarks/faults/`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument(
        "--only", metavar="WORD", help="campaigns with this word in their name; the others stay as stored"
    )
    parser.add_argument("--list", action="store_true", help="name the campaigns and stop")
    parser.add_argument("--no-page", action="store_true", help="print what came of it, and write nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return child(options.child, options.start)
    listed = campaigns()
    if options.list:
        return print("\n".join(listed))
    for name, campaign in listed.items():
        if options.only is not None and options.only not in name:
            continue
        began = time.monotonic()
        counts = run(campaign)
        print(f"{name}: {counts.tried} tried, {counts.survived} survived, {time.monotonic() - began:.0f} s")
        for failure in counts.failures:
            print(f"  {failure}")
        if not options.no_page:
            store({name: counts._asdict()}, listed)


if __name__ == "__main__":
    main()
