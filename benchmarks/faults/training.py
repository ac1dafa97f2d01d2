"""Faults to training: kills, full disks, damaged and hostile run folders, second runs, numbers that are not finite."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import socket
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults import Campaign, Trial, refused, unreadable

STRUCK = ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink")
NEEDS_ROOM = tuple(call for call in STRUCK if call not in ("rmdir", "unlink"))  # removing is refused on no full disk
PATIENCE = 60.0  # seconds for one run
SENTENCE = 3  # exit code of a process that ended in a refusal


def recipe_for(folder: Path, **changes: Any) -> Any:
    """A run of a second on texts that it writes: 4 steps, a checkpoint every second one, of which one is kept."""
    from palimpsest.models.kimi_linear import KimiLinearConfig
    from palimpsest.train import Data, Evaluate, Output, Recipe, TextFiles

    texts = folder / "texts"
    if not texts.exists():
        texts.mkdir()
        for i in range(6):
            (texts / f"{i}.py").write_text(
                "".join(f"def f{i}_{j}(x):\n    return x + {i * j}\n" for j in range(12 + i))
            )
    small = {"hidden_size": 16, "intermediate_size": 32, "linear_head_dim": 8, "moe_intermediate_size": 8}
    fields = {
        "model": KimiLinearConfig.tiny("KM", **small),
        "data": Data(source=TextFiles(paths=(str(texts),)), sequence_length=32, batch_size=4),
        "steps": 4,
        "evaluate": Evaluate(every=2, piece_bytes=64, max_bytes=128, final_max_bytes=128),
        "output": Output(checkpoint_every=2, checkpoints=1, log_every=1),
    }
    return Recipe(**fields | changes)


def in_child(work: Callable[[], Any], patience: float = PATIENCE) -> tuple[int, str]:
    """Runs work in a forked process: its exit code, negative for a signal, and the sentence that it ended in."""
    read, write = os.pipe()
    if (process := os.fork()) == 0:
        code, said = 0, ""
        try:
            import torch

            from palimpsest.train import logger

            torch.set_num_threads(1)
            logger.draw_loss_curve = lambda *arguments: []  # four fifths of so small a run
            work()
        except (ValueError, OSError) as error:
            code, said = SENTENCE, unreadable(error) or str(error)
        except BaseException:
            code, said = 4, traceback.format_exc()[-500:]
        os.write(write, said.encode(errors="replace")[:4000])
        os._exit(code)
    os.close(write)
    end = time.monotonic() + patience
    while (status := os.waitpid(process, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return 5, "hung"
        time.sleep(0.01)
    with os.fdopen(read, "rb") as said:
        return os.waitstatus_to_exitcode(status[1]), said.read().decode(errors="replace")


def train_in(folder: Path, recipe: Any, **options: Any) -> None:
    from palimpsest.train import train

    train(recipe, folder, **options)


def strike(call: str, nth: int, kill: bool, work: Callable[[], Any]) -> None:
    """Does work; at its nth call of this function of the system the disk is full, or the process killed."""
    real, calls = getattr(os, call), itertools.count()

    def struck(*arguments: Any, **options: Any) -> Any:
        if next(calls) == nth:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    setattr(os, call, struck)
    work()


def _count(call: str, work: Callable[[], Any], place: Path) -> None:
    real, times = getattr(os, call), []
    setattr(os, call, lambda *arguments, **options: (times.append(call), real(*arguments, **options))[1])
    work()
    setattr(os, call, real)
    place.write_text(str(len(times)))


def weights_of(folder: Path) -> str | None:
    """The digest of the newest checkpoint's weights; None if there is none."""
    from safetensors import safe_open

    from palimpsest.train.run_folder import latest

    if (place := latest(folder)) is None:
        return None
    with safe_open(place / "model.safetensors", framework="pt") as file:
        return f"{place.name} {file.metadata()['palimpsest.sha256']}"


def goes_on(folder: Path, recipe: Any, wanted: str | None) -> str | None:
    """None if a struck run resumes and comes to the weights of one that nobody struck, and leaves no litter."""
    code, said = in_child(partial(train_in, folder, recipe, resume=True))
    if code:
        return f"does not resume: {code} {said}"
    if weights_of(folder) != wanted:
        return "resumes to other weights"
    left = [p.name for p in folder.rglob("*") if p.name.startswith(".") or p.name.endswith(".partial")]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    marks = [(line["event"], line["step"], line.get("final")) for line in lines]
    if len(set(marks)) < len(marks):
        return "tells a step twice"
    return f"leaves {left}" if left else None


def _struck(folder: Path, recipe: Any, wanted: str | None, call: str, nth: int, kill: bool) -> str | None:
    run = folder / f"{call}-{nth}-{kill}"
    code, said = in_child(partial(strike, call, nth, kill, partial(train_in, run, recipe)))
    if code not in ((-signal.SIGKILL,) if kill else (0, SENTENCE)):
        return f"ended with {code}: {said}"
    problem = goes_on(run, recipe, wanted)
    shutil.rmtree(run)
    return problem


def strikes(folder: Path, kill: bool) -> Iterator[Trial]:
    recipe = recipe_for(folder)
    code, said = in_child(partial(train_in, folder / "reference", recipe))
    assert not code, said
    wanted = weights_of(folder / "reference")
    for call in STRUCK if kill else NEEDS_ROOM:
        code, said = in_child(
            partial(_count, call, partial(train_in, folder / f"counted-{call}", recipe), folder / call)
        )
        assert not code, said
        count = int((folder / call).read_text())
        for nth in range(0, count, 8 if call == "fsync" else 2):
            yield Trial(f"{call} {nth}", partial(_struck, folder, recipe, wanted, call, nth, kill))


def _stopped(folder: Path, recipe: Any, wanted: str | None, number: int, after: int) -> str | None:
    """A signal right after a step or in the middle of what follows it."""
    run = folder / f"signal-{number}-{after}"

    def report(event: dict[str, Any]) -> None:
        report.seen += 1  # type: ignore[attr-defined]
        if report.seen == after:  # type: ignore[attr-defined]
            os.kill(os.getpid(), number)

    report.seen = 0  # type: ignore[attr-defined]
    code, said = in_child(partial(train_in, run, recipe, report=report))
    if code not in (0, -number):  # a signal before the first step ends the process as it would any other
        return f"ended with {code}: {said}"
    problem = goes_on(run, recipe, wanted)
    shutil.rmtree(run)
    return problem


def signals(folder: Path) -> Iterator[Trial]:
    recipe = recipe_for(folder)
    code, said = in_child(partial(train_in, folder / "reference", recipe))
    assert not code, said
    wanted = weights_of(folder / "reference")
    for number in (signal.SIGTERM, signal.SIGKILL):
        for after in range(1, 15, 2):
            yield Trial(f"{number.name} at event {after}", partial(_stopped, folder, recipe, wanted, number, after))


DAMAGES: dict[str, Callable[[Path, bytes], Any]] = {
    "cut to half": lambda file, content: file.write_bytes(content[: len(content) // 2]),
    "cut by two bytes": lambda file, content: file.write_bytes(content[:-2]),
    "one byte more": lambda file, content: file.write_bytes(content + b"\0"),
    "empty": lambda file, content: file.write_bytes(b""),
    "zeros": lambda file, content: file.write_bytes(b"\0" * len(content)),
    "another file's": lambda file, content: file.write_bytes(b"\x80\x04cposix\nsystem\n(S'true'\ntR."),
    "removed": lambda file, content: file.unlink(),
    "a folder": lambda file, content: (file.unlink(), file.mkdir()),
    "a pipe": lambda file, content: (file.unlink(), os.mkfifo(file)),
    "an endless device": lambda file, content: (file.unlink(), file.symlink_to("/dev/zero")),
    "a link to itself": lambda file, content: (file.unlink(), file.symlink_to(file)),
}


def _flip(place: float, file: Path, content: bytes) -> None:
    changed = bytearray(content)
    changed[int(len(content) * place)] ^= 1
    file.write_bytes(changed)


for _place in (0.0, 0.1, 0.35, 0.6, 0.85, 0.999):
    DAMAGES[f"a bit flipped at {_place:.1%}"] = partial(_flip, _place)


def _damaged(folder: Path, recipe: Any, name: str, damage: str) -> str | None:
    run = folder / "damaged"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "begun", run)
    file = run / "checkpoints" / "step-00000002" / name
    DAMAGES[damage](file, file.read_bytes())
    return refused(lambda: train_in(run, recipe, resume=True), (ValueError,), 1200)


def damages(folder: Path) -> Iterator[Trial]:
    from palimpsest.train.run_folder import latest

    recipe = recipe_for(folder)
    stop = lambda event: (
        os.kill(os.getpid(), signal.SIGINT) if (event["event"], event.get("step")) == ("step", 2) else None
    )
    code, said = in_child(partial(train_in, folder / "begun", recipe, report=stop))
    assert not code, said
    whole = latest(folder / "begun")
    assert whole is not None
    for file in sorted(whole.iterdir()):
        for damage in DAMAGES:
            yield Trial(f"{file.name}, {damage}", partial(_damaged, folder, recipe, file.name, damage))


class Payload:
    """What unpickling runs."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


PICKLED = [
    "custom_checkpoint_0.pkl",
    "optimizer.bin",
    "optimizer.pt",
    "random_states_0.pkl",
    "scheduler.bin",
    "scaler.pt",
]
PICKLED += [".metadata", "pytorch_model.bin", "model.pt", "training_args.bin", "training.json", "random.json"]
PICKLED += ["optimizer.safetensors", "model.safetensors", "config.json", "palimpsest.json", "tokenizer.json"]
MALFORMED = {
    "run.json": [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"recipe": []}',
        '{"recipe": {}, "data": 3}',
        '{"recipe": {}, "data": "x"}',
    ],
    "result.json": ["", "[]", '{"finished": true}', '{"finished": true, "step": 2, "tokens": []}', '{"finished": 1}'],
    "metrics.jsonl": ["\0\0", "[]\n3\nnull\n", '{"step": "x"}\n', "{" * 10_000, '{"event": 3, "step": 1}\n'],
}


def _pickled(folder: Path, recipe: Any, name: str) -> str | None:
    run, owned = folder / "pickled", folder / f"owned-{name}"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "begun", run)
    for place in (run / "checkpoints" / "step-00000002", run):
        (place / name).write_bytes(pickle.dumps(Payload(owned)))
    code, said = in_child(partial(train_in, run, recipe, resume=True))
    if owned.exists():
        return "its code ran"
    return None if code in (0, SENTENCE) else f"ended with {code}: {said}"


def _malformed(folder: Path, recipe: Any, name: str, content: str) -> str | None:
    run = folder / "malformed"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "begun", run)
    (run / name).write_text(content)
    code, said = in_child(partial(train_in, run, recipe, resume=True))
    if code != (SENTENCE if name == "run.json" else 0):
        return f"ended with {code}: {said}"
    return None


def _mine(folder: Path, recipe: Any, name: str, overwrite: bool) -> str | None:
    """A user's own file or folder in a run's: neither rotation nor --overwrite takes it."""
    run = folder / "mine"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "begun", run)
    (run / name).mkdir(parents=True)
    (run / name / "precious").write_text("mine")
    code, said = in_child(partial(train_in, run, recipe, overwrite=overwrite, resume=not overwrite))
    if code:
        return f"ended with {code}: {said}"
    return None if (run / name / "precious").exists() else "it was removed"


MINE = [
    "notes",
    ".git",
    "checkpoints/step-00000002-best",
    "checkpoints/step-1",
    "checkpoints/step-backup",
    "checkpoints/old",
]


def hostile(folder: Path) -> Iterator[Trial]:
    recipe = recipe_for(folder)
    stop = lambda event: (
        os.kill(os.getpid(), signal.SIGINT) if (event["event"], event.get("step")) == ("step", 2) else None
    )
    code, said = in_child(partial(train_in, folder / "begun", recipe, report=stop))
    assert not code, said
    for name in PICKLED:
        yield Trial(f"a pickle as {name}", partial(_pickled, folder, recipe, name))
    for name, contents in MALFORMED.items():
        for i, content in enumerate(contents):
            yield Trial(f"{name} {i}", partial(_malformed, folder, recipe, name, content))
    for name in MINE:
        for overwrite in (False, True):
            yield Trial(f"a user's {name}, {overwrite=}", partial(_mine, folder, recipe, name, overwrite))


def _second(folder: Path, recipe: Any, i: int, options: dict[str, bool], after: str) -> str | None:
    """While a run is at work, another comes; then the first is killed, and the other comes again."""
    run, problems = folder / f"twice-{i}", []

    def report(event: dict[str, Any]) -> None:
        if event["event"] == after:
            problems.append(refused(lambda: train_in(run, recipe, **options), (ValueError,)))
            os.kill(os.getpid(), signal.SIGKILL if problems == [None] else signal.SIGABRT)

    code, said = in_child(partial(train_in, run, recipe, report=report))
    if code != -signal.SIGKILL:
        return f"the second run was let in, or ended with {code}: {said}"
    code, said = in_child(partial(train_in, run, recipe, resume=True))
    return f"after the kill: {code} {said}" if code else None


def doubles(folder: Path) -> Iterator[Trial]:
    recipe = recipe_for(folder)
    options = [{"resume": True}, {"overwrite": True}, {}]
    for i, (option, after) in enumerate(itertools.product(options, ["start", "step", "evaluate", "checkpoint"])):
        yield Trial(f"{option} at {after}", partial(_second, folder, recipe, i, option, after))


def _poisoned(folder: Path, recipe: Any, number: int, what: str, value: float) -> str | None:
    """One number of a weight or a momentum becomes NaN or infinite after the third step."""
    import torch

    from palimpsest.models.kimi_linear import KimiLinearForCausalLM
    from palimpsest.train import optim
    from palimpsest.train.run_folder import checkpoints_of

    run = folder / f"poisoned-{number}-{what}-{value}"
    real, count = optim.MuonAdamW.step, itertools.count(1)

    def struck(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        if next(count) == 3:
            parameters = [p for group in self.param_groups for p in group["params"]]
            parameter = parameters[number % len(parameters)]
            states = [x for x in self.state[parameter].values() if x.shape == parameter.shape]
            (parameter.data if what == "weight" else states[0]).view(-1)[-1] = value

    def work() -> None:
        optim.MuonAdamW.step = struck
        train_in(run, recipe)

    code, said = in_child(work)
    if code != SENTENCE:
        return f"ended with {code}: {said}"
    kept = checkpoints_of(run)
    if [path.name for path in kept] != ["step-00000002"]:
        return f"left {[path.name for path in kept]}"
    state = KimiLinearForCausalLM.from_pretrained(kept[0]).state_dict()
    shutil.rmtree(run)
    return None if all(torch.isfinite(x).all() for x in state.values()) else "the checkpoint that is left is not finite"


def poison(folder: Path) -> Iterator[Trial]:
    recipe = recipe_for(folder)
    for number in range(0, 40, 2):
        what, value = ("weight", "momentum")[number // 2 % 2], (math.nan, math.inf, -math.inf)[number % 3]
        yield Trial(f"{what} {number} {value}", partial(_poisoned, folder, recipe, number, what, value))


WRONG: dict[Any, list[Any]] = {
    float: [math.nan, math.inf, -math.inf, "0.1", True, [], 1j, -1.0, b"1", {}],
    int: [1.5, math.nan, "3", True, [], -1, -(10**30), b"1", {}],
    bool: [0, 1, "true", [], math.nan, b"1"],
    str: [3, True, [], b"bytes", 1.5, {}, Path("x")],
}


def nonsense(folder: Path) -> Iterator[Trial]:
    """Every field of every part of a recipe, with values of other types and out of range."""
    from palimpsest.train import Data, Evaluate, NamedDataset, Optim, Output, Recipe, Schedule, TextFiles

    source = TextFiles(paths=(str(folder),))
    good = {TextFiles: {"paths": ("x",)}, NamedDataset: {"name": "x"}, Data: {"source": source}}
    recipe = recipe_for(folder)
    good |= {Recipe: {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}}
    for part in (TextFiles, NamedDataset, Data, Optim, Schedule, Evaluate, Output, Recipe):
        for field in dataclasses.fields(part):
            kind = typing.get_type_hints(part)[field.name]
            options = typing.get_args(kind)
            plain = kind if kind in WRONG else next((option for option in options if option in WRONG), None)
            values = list(WRONG.get(plain, [3, "other", [], math.nan, {}]))
            values += [] if type(None) in options else [None]
            for i, value in enumerate(values):
                fields = good.get(part, {}) | {field.name: value}
                yield Trial(
                    f"{part.__name__}.{field.name} {i}", partial(refused, partial(part, **fields), (ValueError,), 400)
                )


SETTINGS = [
    "optim.lr=nan",
    "optim.lr=inf",
    "optim.lr=",
    "optim.lr=1e999",
    "steps=1.5",
    "steps=-3",
    "steps=NaN",
    "batch_size=8",
]
SETTINGS += [
    "optim=3",
    "optim.lr.x=1",
    "=",
    "model.layer_types=XYZ",
    "data.layout=rows",
    "optim.betas=1",
    "optim.betas=1,2",
]
SETTINGS += ["output.tensorboard=perhaps", "keep.checkpoints=1", "seed=-1", "minutes=-1", "data.source.paths=", "x=y"]
SETTINGS += ["model.num_layers=3", "precision=fp8", "schedule.warmup=2", "model.hidden_size=many", "optim.lr=1;2"]


def settings(folder: Path) -> Iterator[Trial]:
    from palimpsest.train import override

    recipe = recipe_for(folder)
    for text in SETTINGS:
        name, _, value = text.partition("=")
        yield Trial(text, partial(refused, partial(override, recipe, {name: value}), (ValueError,), 600))


def _socket(file: Path) -> None:
    before = Path.cwd()
    os.chdir(file.parent)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(file.name)
    finally:
        os.chdir(before)


def _sparse(file: Path) -> None:
    with open(file, "wb") as opened:
        opened.truncate(1 << 42)


STRANGE: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a socket": _socket,
    "an endless device": lambda file: file.symlink_to("/dev/zero"),
    "random numbers without end": lambda file: file.symlink_to("/dev/urandom"),
    "a terminal": lambda file: file.symlink_to("/dev/tty"),
    "a link to itself": lambda file: file.symlink_to(file),
    "a link to nothing": lambda file: file.symlink_to(file.parent / "nothing"),
    "4 TiB of holes": _sparse,
    "an image": lambda file: file.write_bytes(b"\x89PNG\r\n\0" * 20),
}


def _data(folder: Path, name: str, alone: bool) -> str | None:
    from palimpsest.train import Data, TextFiles
    from palimpsest.train.data import Corpus

    texts = folder / f"{name.replace(' ', '-')}-{alone}"
    texts.mkdir()
    STRANGE[name](texts / "strange.py")
    for i in range(0 if alone else 5):
        (texts / f"{i}.py").write_text("x = 1\n" * 40)
    source = TextFiles(paths=(str(texts / "strange.py" if alone else texts),))
    return refused(lambda: Corpus(Data(source=source, sequence_length=32), 0), (ValueError,), 600)


def _other_data(folder: Path, name: str, contents: dict[bytes, bytes], fine: bool) -> str | None:
    from palimpsest.train import Data, TextFiles
    from palimpsest.train.data import Corpus, Heldout

    texts = folder / name.replace(" ", "-")
    texts.mkdir()
    for file, content in contents.items():
        with open(os.fsencode(texts) + b"/" + file, "wb") as opened:
            opened.write(content)

    def work() -> None:
        corpus = Corpus(Data(source=TextFiles(paths=(str(texts),)), sequence_length=32, batch_size=2), 0)
        Heldout(corpus.heldout, corpus.tokenizer, piece_bytes=64, max_bytes=100)
        corpus.step(0)

    if not fine:
        return refused(work, (ValueError,), 600)
    work()
    return None


OTHER: dict[str, tuple[dict[bytes, bytes], bool]] = {
    "names that are no UTF-8": ({b"\xff%d.py" % i: b"x = 1\n" * 40 for i in range(5)}, True),
    "names with quotes and line ends": ({b"a'\"\n%d.py" % i: b"x = 1\n" * 40 for i in range(5)}, True),
    "content that is no UTF-8": ({b"%d.py" % i: b"\xff\xfe\x80" * 90 for i in range(5)}, True),
    "files of one byte": ({b"%d.py" % i: b"x" for i in range(5)}, False),
    "files of no byte": ({b"%d.py" % i: b"" for i in range(5)}, False),
    "one file of one byte": ({b"a.py": b"x"}, False),
    "no file": ({}, False),
    "hidden files alone": ({b".a.py": b"x = 1\n" * 40}, False),
}


def data(folder: Path) -> Iterator[Trial]:
    for name in STRANGE:
        for alone in (False, True):
            yield Trial(f"{name}, {alone=}", partial(_data, folder, name, alone))
    for name, (contents, fine) in OTHER.items():
        yield Trial(name, partial(_other_data, folder, name, contents, fine))


CAMPAIGNS = [
    Campaign(
        "training, killed",
        "kill -9 at every second rename or removal, every eighth flush: resumes to the same bits, leaves no litter",
        partial(strikes, kill=True),
    ),
    Campaign(
        "training, disk full",
        "no room at the same places: a sentence, and it resumes to the same bits",
        partial(strikes, kill=False),
    ),
    Campaign(
        "training, signals", "SIGTERM and SIGKILL at every second event of a run: it resumes to the same bits", signals
    ),
    Campaign(
        "training, NaN", "a weight or momentum becomes NaN or infinite: not saved, the good checkpoint stays", poison
    ),
    Campaign(
        "training, damaged checkpoints", "each file cut, flipped by a bit, replaced: refused in a sentence", damages
    ),
    Campaign(
        "training, hostile run folders",
        "pickles under every name, malformed records, a user's own files: no code runs, nothing of the user's goes",
        hostile,
    ),
    Campaign(
        "training, two runs in a folder", "a second run at any event, then a kill: refused, then welcome", doubles
    ),
    Campaign("recipes, nonsense", "every field with values of other types and out of range: refused by name", nonsense),
    Campaign("recipes, --set", "settings that mean nothing: refused by name", settings),
    Campaign("data folders", "pipes, devices, sockets, links, holes, names that are no text: refused, or read", data),
]
