"""Bad input to the command line: every option of every command, wrong in each of the ways that a value can be wrong."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.faults import Campaign, Trial
from palimpsest import KimiLinearConfig, KimiLinearForCausalLM, cli

NO_NUMBER = ("x", "", "1e", "0x1", "¼", "1,5")
NO_COUNT = (*NO_NUMBER, "1.5", "-1", "nan", "inf", "true")
OPTIONS = {  # of generate
    "-n": (*NO_COUNT, "0"),
    "--temperature": (*NO_NUMBER, "-1", "nan", "inf", "-inf"),
    "--top-k": (*NO_COUNT, "0"),
    "--top-p": (*NO_NUMBER, "0", "-0.1", "1.1", "nan", "inf"),
    "--min-p": (*NO_NUMBER, "-0.1", "1.5", "nan"),
    "--repetition-penalty": (*NO_NUMBER, "0", "-1", "nan", "inf"),
    "--seed": (*NO_NUMBER, "1.5", "nan"),
    "--tokenizer": ("", "nope.json", "{empty}", "{text}", "{model}/config.json", "{pipe}", "{endless}"),
    "--save": ("/nowhere/s", "{text}/s"),
    "--load": ("", "/nowhere", "{empty}", "{text}", "{model}/model.safetensors", "{pipe}", "{endless}", "{junk}"),
    "--device": ("", "CPU", " cpu", "cpu:3", "cuda:x", "cuda:-1", "cuda:99", "xpu", "meta", "mps", "tpu9"),
    "--prompt-file": ("", "/nowhere", "{empty}", "{junk}", "{endless}"),
}
SETTINGS = (
    "", "=", "x", "=3", "optim", "optim.lr", "optim.lr=", "optim.lr=x", "optim.lr=nan", "optim.lr=inf", "optim.lr=-1",
    "optim.lrr=1", "steps=0", "steps=-1", "steps=1.5", "steps=x", "seed=x", "seed=-1", "seed=1.5", "minutes=-1", "minutes=nan",
    "data.batch_size=0", "data.batch_size=x", "data.sequence_length=0", "data.source.paths=/nowhere", "batch_size=8",
    "keep.checkpoint_every=0", "keep.checkpoint_every=x", "evaluate.every=0", "schedule.warmup=2", "schedule.warmup=nan", ".=1",
    "..=1", "optim.=1", ".optim=1", "optim.lr.x=1", "model=1", "data=1", "__class__=1", "optim.__class__=1",
    "optim.__dict__=1", "optim.kind=adam2", "precision=fp7",
)  # fmt: skip
RECIPES = {
    "absent.py": None,
    "folder.py": "folder",
    "text.txt": "recipe = 3",
    "binary.py": b"\xff\xfe\x00",
    "syntax.py": "def recipe(:",
    "raises.py": "1 / 0",
    "imports.py": "import no_such_module_anywhere",
    "none.py": "",
    "number.py": "recipe = 3",
    "returns.py": "def recipe(): return 3",
    "asks.py": "def recipe(size): return size",
    "fails.py": "def recipe(): raise KeyError('x')",
    "leaves.py": "def recipe(): return open('/nowhere')",
    "experiment.py": "EXPERIMENT = 3",
    "empty.py": "from palimpsest.lab.framework.experiment import *\nEXPERIMENT = Experiment(name='a', question='b', claim='c', "
    "scales={'tiny': 'd'}, points=lambda s: [], judge=len, draw=len)",
    "points.py": "from palimpsest.lab.framework.experiment import *\nEXPERIMENT = Experiment(name='a', question='b', claim='c', "
    "scales={'tiny': 'd'}, points=lambda s: [3], judge=len, draw=len)",
}
SWEEPS = (
    b"", b"{", b"[]", b"null", b"3", b"\xff", b"{}", b'{"experiment": 3}', b"[" * 10**5,
    json.dumps({"experiment": "fig4", "place": "fig4", "scale": "tiny", "points": 3, "sessions": []}).encode(),
    json.dumps({"experiment": "fig4", "place": "fig4", "scale": "tiny", "points": ["a"], "sessions": []}).encode(),
    json.dumps({"experiment": "gate", "place": "gate", "scale": "tiny", "points": [], "sessions": []}).encode(),
)  # fmt: skip


def call(folder: Path, arguments: list[str]) -> str | None:
    """What is wrong with how a command line that must be refused was refused."""
    before = _listing(folder / "precious")
    out, err = io.StringIO(), io.StringIO()
    os.chdir(folder / "precious")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.run(arguments)
    except BaseException as error:
        return f"{arguments} ended in a trace: {type(error).__name__}: {str(error)[:200]}"
    finally:
        os.chdir("/")
    said = err.getvalue()
    if code not in (1, 2):
        return f"{arguments} was accepted ({code})"
    if "Traceback" in said or len(said.split()) < 4:
        return f"{arguments} says {said[-200:]!r}"
    if code == 1 and (len(said) > 1000 or said.count("\n") > 3):
        return f"{arguments} says {len(said)} characters on {said.count(chr(10))} lines"
    if _listing(folder / "precious") != before:
        return f"{arguments} changed files"
    return None


def _listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def _prepared(folder: Path) -> dict[str, str]:
    """The places that trials name."""
    KimiLinearForCausalLM(KimiLinearConfig.tiny("KM")).save_pretrained(folder / "model")
    for name in ("precious", "empty", "recipes", "data"):
        (folder / name).mkdir()
    for i in range(6):
        (folder / "data" / f"{i}.py").write_text("x = 1\n" * 50)
    (folder / "precious" / "thesis.tex").write_text("precious")
    (folder / "junk").write_bytes(b"\xff\xfe" + bytes(range(256)))
    os.mkfifo(folder / "pipe")
    (folder / "endless").symlink_to("/dev/zero")
    for name, content in RECIPES.items():
        file = folder / "recipes" / name
        if content == "folder":
            file.mkdir()
        elif content is not None:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "recipes" / "good.py").write_text(
        "from palimpsest import KimiLinearConfig\nfrom palimpsest.train import Data, Recipe, TextFiles\n"
        "def recipe():\n    return Recipe(model=KimiLinearConfig.tiny('K'), steps=1, "
        f"data=Data(source=TextFiles(paths=({str(folder / 'data')!r},)), sequence_length=16, batch_size=2))\n"
    )
    names = ("model", "empty", "pipe", "endless", "junk", "recipes", "precious")
    return {name: str(folder / name) for name in names} | {"text": str(folder / "precious" / "thesis.tex")}


def arguments(places: dict[str, str]) -> Iterator[list[str]]:
    """Command lines that must be refused."""
    model, good, text = places["model"], places["recipes"] + "/good.py", places["text"]
    say = ["generate", model, "-p", "x", "-n", "1", "--tokenizer", "bytes", "-q"]
    for option, values in OPTIONS.items():
        yield from ([*say, option, value.format(**places)] for value in values)
    yield from (
        ["generate", place, "-p", "x", "-q"]
        for place in ("", "/nowhere", text, places["empty"], places["pipe"], "a\0b")
    )
    yield from (
        [*say[:2], *rest] for rest in ([], ["-p", ""], ["-p", "a", "-p", "b", "--save", "s"], ["-p"], ["x", "y"])
    )
    for setting in SETTINGS:
        yield ["train", good, "-q", "--set", setting]
    for name in RECIPES:
        yield ["train", f"{places['recipes']}/{name}", "-q"]
    yield from (
        ["train", place, "-q"] for place in ("", ":", good + ":", good + ":large", good + ":__doc__", good + ":Recipe")
    )
    yield from (
        ["train", good, "-q", "--out", place] for place in (text, places["precious"], "/proc/x", places["pipe"])
    )
    yield ["train", good, "--resume", "--overwrite"]
    yield ["train", good, "--out", places["precious"], "--overwrite"]
    yield from (
        ["info", place] for place in ("", "nothing", "48c", text, places["empty"], places["pipe"], "a\0b", "/proc/self")
    )
    yield from (["info", f"{places['recipes']}/{name}"] for name in RECIPES if name.endswith(".py"))
    lab = ["lab", "run", "fig4", "--scale", "tiny", "--device", "cpu", "-q"]
    for option, values in {
        "--scale": ("", "huge", "TINY"),
        "--device": ("", "tpu", "cuda:x", "cpu:1", "xpu", "cuda:99"),
        "--workers": (*NO_COUNT, "0"),
        "--minutes": (*NO_NUMBER, "0", "-1", "nan", "inf"),
        "--only": ("no such point",),
        "--out": (text, places["precious"], "/proc/x", places["pipe"]),
    }.items():
        yield from ([*lab, option, value] for value in values)
    yield from (["lab", "run", place, "-q"] for place in ("", "fig5", "../fig4", "fig4.py", "_x", places["recipes"]))
    yield from (["lab", "run", f"{places['recipes']}/{name}", "-q"] for name in RECIPES if name.endswith(".py"))
    yield from (["lab", "show", place] for place in ("", "nothing", places["empty"], places["precious"], text, "a\0b"))
    yield ["lab", "show", "fig4", "--scale", "huge"]
    yield from (
        ["lab", "compare", *rest]
        for rest in ([], [places["empty"]], [places["empty"]] * 2, ["/nowhere"] * 2, [text] * 2)
    )
    for i in range(len(SWEEPS)):
        place = f"{places['recipes']}/../sweep-{i}"
        yield from (["lab", "show", place], ["lab", "compare", place, place], [*lab, "--out", place])
    explain = ["explain", "--no-browser"]
    yield from ([*explain, "--port", port] for port in (*NO_COUNT, "70000"))
    yield from ([*explain, "--model", place] for place in ("/nowhere", text, places["empty"], places["pipe"]))
    yield from (
        [*explain, "--export", place]
        for place in (text, places["precious"], "/proc/x", "/no/such/place", places["pipe"])
    )
    yield [*explain, "--export", "site", "--sentence", ""]
    yield from ([*explain, "--picture", place] for place in (text, "/proc/x"))
    for command in (["train", good], say, ["info"], ["lab", "list"], ["lab", "show", "fig4"], ["explain"], ["lab"], []):
        yield from ([*command, extra] for extra in ("--frobnicate", "--quite", "-Z"))
    yield from ([name] for name in ("trian", "generat", "lab-run", "", "-"))


def trials(folder: Path) -> Iterable[Trial]:
    places = _prepared(folder)
    for i, content in enumerate(SWEEPS):
        (folder / f"sweep-{i}").mkdir()
        (folder / f"sweep-{i}" / "sweep.json").write_bytes(content)
        (folder / f"sweep-{i}" / "results.csv").write_bytes(content)
    for i, line in zip(itertools.count(), arguments(places)):
        shown = " ".join(line).replace(str(folder), "")
        yield Trial(f"{i}: {shown[:120]}", lambda line=line: call(folder, line))


CAMPAIGNS = [
    Campaign(
        "command line, bad input",
        "options, settings, recipes, experiments, folders and devices that cannot be used: a sentence, exit code 1 or 2, and "
        "no file touched",
        trials,
        60.0,
    )
]
