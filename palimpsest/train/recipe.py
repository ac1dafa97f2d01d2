"""A recipe: everything that decides a training run, as frozen dataclasses. Nothing else does.

A recipe file is Python with a function that returns a `Recipe`; a field is overridden by its dotted path:

    palimpsest train recipes/demo.py --set optim.lr=3e-3 --set steps=200
"""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from palimpsest.checks import check, check_fields
from palimpsest.models.kimi_linear.config import KimiLinearConfig
from palimpsest.parallel.plan import Plan
from palimpsest.python_files import load_file


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Documents that are files on this machine.

    Attributes:
        paths: files and folders; a folder gives every file below it, hidden ones apart.
        include: patterns on the file's name, or on its path below the folder.
        exclude: patterns of what is left out, in the same way.
        heldout: this share of the files is never trained on, between 0 and 1; a single file gives its end.
        heldout_paths: or: these files and folders are held out, and `heldout` is not used.
    """

    paths: tuple[str, ...] = ()
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    heldout: float = 0.05
    heldout_paths: tuple[str, ...] = ()

    def __post_init__(self):
        check_fields(self, "data.source.")
        check(bool(self.paths), "data.source.paths is empty; name at least one file or folder")
        check(0 < self.heldout < 1, f"data.source.heldout is {self.heldout}; expected a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class NamedDataset:
    """Documents from the `datasets` library.

    Attributes:
        name: on its hub, or a local folder of JSONL, CSV, Parquet or text.
        config: of the data set, where it has several.
        column: holds the text.
        train_split: is trained on.
        heldout_split: never.
        document_start: a regular expression; rows are joined into one document until one matches it. None: a row is one.
    """

    name: str
    config: str | None = None
    column: str = "text"
    train_split: str = "train"
    heldout_split: str = "validation"
    document_start: str | None = None

    def __post_init__(self):
        check_fields(self, "data.source.")
        try:
            re.compile(self.document_start or "")
        except re.error as error:
            raise ValueError(
                f"data.source.document_start is {self.document_start!r}, no regular expression: {error}"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read, and in what portions.

    Attributes:
        source: the documents.
        tokenizer: "bytes", a tokenizer.json, or its folder.
        sequence_length: tokens a row, at least 2.
        batch_size: rows an optimiser step, over all processes and accumulated parts.
        accumulate: parts a step is computed in, one after the other.
        layout: "windows": each row within one document; "packed": documents laid end to end.
    """

    source: TextFiles | NamedDataset
    tokenizer: str = "bytes"
    sequence_length: int = 256
    batch_size: int = 16
    accumulate: int = 1
    layout: Literal["windows", "packed"] = "windows"

    def __post_init__(self):
        check_fields(self, "data.")
        check(bool(self.tokenizer), "data.tokenizer is empty; give 'bytes' or a tokenizer.json")
        _at_least(self, "data.", sequence_length=2, batch_size=1, accumulate=1)


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimiser.

    Attributes:
        kind: "muon": hidden matrices by Muon, the rest by AdamW; "adamw": all by AdamW.
        lr: learning rate of AdamW.
        matrix_lr: of Muon, times sqrt(max(1, rows / columns)).
        weight_decay: of matrices, on their own learning rate; vectors, gates and embeddings have none.
        betas: of AdamW, each from 0 to below 1.
        momentum: of Muon, from 0 to below 1.
        clip: largest norm of the gradient; longer ones are shortened to it.
    """

    kind: Literal["muon", "adamw"] = "muon"
    lr: float = 3e-3
    matrix_lr: float = 2e-2
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    clip: float = 1.0

    def __post_init__(self):
        check_fields(self, "optim.")
        for name in ("lr", "matrix_lr", "clip"):
            check(getattr(self, name) > 0, f"optim.{name} is {getattr(self, name)}; expected a positive number")
        check(self.weight_decay >= 0, f"optim.weight_decay is {self.weight_decay}; expected 0 or more")
        check(0 <= self.momentum < 1, f"optim.momentum is {self.momentum}; expected a number from 0 to below 1")
        check(
            all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas is {self.betas}; expected numbers from 0 to below 1",
        )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate's factor, by the share of the run that is done.

    Attributes:
        kind: "wsd": warm-up, stable, linear decay; "cosine": warm-up and half a cosine.
        warmup: share of the run.
        decay: share of the run; wsd only. With warmup at most 1.
        floor: the factor at the end, 0 to 1.
    """

    kind: Literal["wsd", "cosine"] = "wsd"
    warmup: float = 0.02
    decay: float = 0.3
    floor: float = 0.0

    def __post_init__(self):
        check_fields(self, "schedule.")
        decay = self.decay if self.kind == "wsd" else 0.0
        shares = min(self.warmup, decay) >= 0 and self.warmup + decay <= 1
        check(shares, f"schedule.warmup {self.warmup} and decay {self.decay} are shares of the run, at most 1 together")
        check(0 <= self.floor <= 1, f"schedule.floor is {self.floor}; expected a factor between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Bits per byte on held-out files, in pieces that each start from an empty memory.

    Attributes:
        every: steps between evaluations; there is one at the end, too.
        piece_bytes: bytes a piece, at least 2.
        max_bytes: read by an evaluation along the way, spread evenly over the held-out files.
        final_max_bytes: read by the last one.
        batch_size: pieces at once.
    """

    every: int = 100
    piece_bytes: int = 1024
    max_bytes: int = 65536
    final_max_bytes: int = 1 << 20
    batch_size: int = 16

    def __post_init__(self):
        check_fields(self, "evaluate.")
        _at_least(self, "evaluate.", every=1, batch_size=1, max_bytes=1, final_max_bytes=1, piece_bytes=2)


@dataclass(frozen=True, kw_only=True)
class Output:
    """What is written along the way.

    Attributes:
        checkpoint_every: steps between checkpoints; there is one at the end and when interrupted, too.
        checkpoints: so many of the newest are kept, and the best by held-out bits beside them.
        log_every: steps between lines of metrics.jsonl.
        tensorboard: write its events, too.
    """

    checkpoint_every: int = 200
    checkpoints: int = 2
    log_every: int = 10
    tensorboard: bool = False

    def __post_init__(self):
        check_fields(self, "output.")
        _at_least(self, "output.", checkpoint_every=1, checkpoints=1, log_every=1)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run.

    Attributes:
        model: its architecture.
        data: what it reads.
        steps: the run ends here,
        minutes: or here, whichever comes first; the schedule follows what is nearer its end. None: by steps alone.
        optim: the optimiser.
        schedule: its learning rate over the run.
        evaluate: how it is measured.
        output: what is written along the way. When a run is resumed, these fields and those of `parallel` may change, and no
            others.
        router_bias_rate: how fast the experts' loads are evened out, 0 or more.
        precision: "no" is fp32; "bf16" and "fp16" by autocast.
        compile: torch.compile of each layer; None: on a GPU, where it pays.
        capture: forward and backward as one CUDA graph; None: on a GPU of its own, unless fp16 scales its loss.
        recompute: keep no activations inside layers, and compute them again for the gradient.
        parallel: how model and rows are spread over processes, when there are several.
        max_nonfinite: so many steps in a row whose gradient is not finite are skipped; one more ends the run.
        seed: of weights and order of data, 0 to 2^32 - 1.
    """

    model: KimiLinearConfig
    data: Data
    steps: int
    minutes: float | None = None
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    evaluate: Evaluate = field(default_factory=Evaluate)
    output: Output = field(default_factory=Output)
    router_bias_rate: float = 1e-3
    precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool | None = None
    capture: bool | None = None
    recompute: bool = False
    parallel: Plan = field(default_factory=Plan)
    max_nonfinite: int = 10
    seed: int = 0

    def __post_init__(self):
        check_fields(self)
        _at_least(self, "", steps=1, max_nonfinite=0)
        check(self.minutes is None or self.minutes > 0, f"minutes is {self.minutes}; expected more than 0, or none")
        check(self.router_bias_rate >= 0, f"router_bias_rate is {self.router_bias_rate}; expected 0 or more")
        check(0 <= self.seed < 2**32, f"seed is {self.seed}; expected 0 to 4294967295")


def _at_least(part: Any, prefix: str, **least: int) -> None:
    for name, bound in least.items():
        value = getattr(part, name)
        check(value >= bound, f"{prefix}{name} is {value}; expected at least {bound}")


RESUMABLE = (
    "output.",
    "parallel",
)  # fields that may change between the parts of an interrupted run: they decide no number


def override(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    """The recipe with fields replaced, each named by its dotted path, its value as text.

    Raises:
        ValueError: no such field (the nearest name is suggested), or the text is no value of its type.
    """
    tree: dict[str, Any] = {}
    for path, text in settings.items():
        node = tree
        *groups, last = path.split(".")
        for name in groups:
            node = node.setdefault(name, {})
            check(isinstance(node, dict), f"{path!r} and a part of it are both set; set one of them")
        check(last not in node, f"{path!r} and a part of it are both set; set one of them")
        node[last] = text
    return _replace(recipe, tree, "", list(_flat(dataclasses.asdict(recipe))))


def load_recipe(place: str, settings: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of "file.py" (its function `recipe`) or "file.py:function", with settings as `override` takes them.

    Raises:
        ValueError: the file or function is missing, fails, or returns something else.
    """
    path, colon, name = place.partition(":")
    check(
        bool(name) or not colon, f"recipe {place!r} names no function after its colon; give one, or leave the colon out"
    )
    name = name or "recipe"
    module = load_file(path, "recipe")
    function = getattr(module, name, None)
    if not callable(function):
        own = [n for n, f in vars(module).items() if callable(f) and getattr(f, "__module__", "") == module.__name__]
        raise ValueError(f"recipe {path!r} has no function {name!r}; it has {', '.join(own) or 'none'}")
    try:
        recipe = function()
    except Exception as error:
        raise ValueError(f"{name}() of {path!r} fails: {type(error).__name__}: {error}") from error
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{name}() of {path!r} returns {type(recipe).__name__}; expected a palimpsest.train.Recipe")
    return override(recipe, settings or {})


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON would hold it."""
    return json.loads(json.dumps(dataclasses.asdict(recipe), default=str))


def difference(recipe: Recipe, saved: Mapping[str, Any]) -> str | None:
    """The first field in which the recipe is not the one saved by `as_dict`, as a phrase; None if they agree."""
    now, then = _flat(as_dict(recipe)), _flat(saved)
    for path in sorted(now.keys() | then.keys()):
        if not path.startswith(RESUMABLE) and now.get(path) != then.get(path):
            return f"{path} was {then.get(path)!r} and is now {now.get(path)!r}"
    return None


def difference_of(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first field in which two recipes, as JSON would hold them, differ, as a phrase."""
    flat = _flat(one), _flat(other)
    path = next(path for path in sorted(flat[0] | flat[1]) if flat[0].get(path) != flat[1].get(path))
    return f"{path} is {flat[0].get(path)!r}, there {flat[1].get(path)!r}"


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in node.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _replace(node: Any, tree: Mapping[str, Any], prefix: str, paths: list[str]) -> Any:
    types_of = typing.get_type_hints(type(node))
    names = [f.name for f in fields(node) if f.init]
    changes = {}
    for name, value in tree.items():
        path = prefix + name
        if name not in names:
            elsewhere = [p for p in paths if p.endswith(f".{name}")]  # the right name, but not its group
            near = elsewhere or [prefix + n for n in difflib.get_close_matches(name, names, n=1, cutoff=0.5)]
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(names)}"
            raise ValueError(f"the recipe has no field {path!r}; {hint}")
        inner = getattr(node, name)
        if isinstance(value, Mapping):
            check(is_dataclass(inner), f"{path!r} is a single value and has no field {next(iter(value))!r}")
            changes[name] = _replace(inner, value, path + ".", paths)
        elif is_dataclass(inner):
            raise ValueError(f"{path!r} is a group; set one of {', '.join(f'{path}.{f.name}' for f in fields(inner))}")
        elif name == "layer_types" and value.isupper():
            changes[name] = value  # letters, which the config reads itself
        else:
            changes[name] = _parse(path, value, types_of[name])
    return dataclasses.replace(node, **changes)


def _parse(path: str, text: str, kind: Any) -> Any:
    """The value that text means for a field of this type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.strip().lower() in ("none", "null", ""):
            return None
        options = [a for a in arguments if a is not type(None)]
        for option in options:
            try:
                return _parse(path, text, option)
            except ValueError:
                if option is options[-1]:
                    raise
    if origin is Literal:
        check(text in arguments, f"{path} is {text!r}; expected one of {', '.join(map(str, arguments))}")
        return text
    if origin in (tuple, list):
        items = [item.strip().strip("'\"") for item in re.split(r"[,\s]+", text.strip("()[] ")) if item]
        item_kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis or origin is list else list(arguments)
        check(len(items) == len(item_kinds), f"{path} is {text!r}; expected {len(item_kinds)} values")
        return origin(_parse(path, item, item_kind) for item, item_kind in zip(items, item_kinds))
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        check(text.lower() in words, f"{path} is {text!r}; expected true or false")
        return words[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            word = "a whole number" if kind is int else "a number"
            raise ValueError(f"{path} is {text!r}; expected {word}") from None
    if kind is str:
        return text
    raise ValueError(f"{path} cannot be set from the command line; change it in the recipe file")
