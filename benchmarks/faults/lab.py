"""Bad input to the lab's Python: tasks, variants, trainings, measurements and sweeps with fields of every wrong kind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults import Campaign, Trial, refused
from palimpsest.lab.framework.experiment import Experiment, Verdict
from palimpsest.lab.framework.sweep import run
from palimpsest.lab.measure.context_cost import Cache, Decode, Prefill
from palimpsest.lab.measure.state_formats import Format
from palimpsest.lab.measure.state_quantization import Drift
from palimpsest.lab.measure.transition_spectra import Spectra
from palimpsest.lab.model_variants import MODEL_VARIANTS, ModelVariant, Size, model_variant
from palimpsest.lab.tasks import MQAR, TASKS, Key
from palimpsest.lab.training import Training

SIZE = Size(layers=1, hidden_size=16, heads=1, head_dim=8, mlp=16)
TRAINING = Training(
    who=MODEL_VARIANTS["kda"], train=(MQAR(length=16, vocab_size=16, pairs=3),), size=SIZE, steps=2, tokens_per_step=32
)
WRONG = {  # the type of a field -> values that it must not take
    int: (-1, 1.5, math.nan, "3", None, (1,), True),
    float: (-1.0, math.nan, math.inf, "0.1", None, ()),
    str: (3, None, "no such thing", "", ()),
    tuple: ("x", 3, None, (None,)),
}


def fields(value: Any) -> Iterator[tuple[str, Any]]:
    """Field and wrong value of a dataclass, by the types of the values that it has."""
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        for kind, wrongs in WRONG.items():
            if type(held) is kind:
                yield from ((field.name, wrong) for wrong in wrongs)


def changed(value: Any, prepare: bool) -> Iterator[Trial]:
    """A value with one field wrong: refused when it is made, or when it is prepared."""
    for name, wrong in fields(value):

        def make(name=name, wrong=wrong):
            made = dataclasses.replace(value, **{name: wrong})
            return made.prepare() if prepare else made

        yield Trial(
            f"{type(value).__name__}, {name} = {str(wrong)[:20]!r} ({type(wrong).__name__})",
            lambda make=make: refused(make),
        )


def experiments(folder: Path) -> Iterator[Trial]:
    def run_it(points: Any, judge: Any = lambda records: Verdict("measured", []), **options: Any) -> Any:
        experiment = Experiment(
            name="x", question="q", claim="c", scales={"tiny": "t"}, points=points, judge=judge, draw=lambda r: {}
        )
        return run(experiment, "tiny", folder / "out", device="cpu", **options)

    bad_points = {
        "none": [],
        "number": [3],
        "text": "ab",
        "null": None,
        "training, steps": [dataclasses.replace(TRAINING, steps=0)],
    }
    for name, points in bad_points.items():
        yield Trial(f"points: {name}", lambda points=points: refused(lambda: run_it(lambda scale: points)))
    for options in (
        {"workers": 0},
        {"workers": -1},
        {"minutes": 0},
        {"minutes": math.nan},
        {"minutes": -1},
        {"only": "nothing like it"},
    ):
        yield Trial(
            f"run: {options}", lambda options=options: refused(lambda: run_it(lambda scale: [TRAINING], **options))
        )


def trials(folder: Path) -> Iterable[Trial]:
    for name, task in TASKS.items():
        for field, wrong in fields(task()):
            if (name, field) in (("text", "paths"), ("needle", "paths")):  # looked at when text is drawn
                make = lambda task=task, field=field, wrong=wrong: task(**{field: wrong}).draw(1, Key("test", 0, 0))
            else:
                make = lambda task=task, field=field, wrong=wrong: task(**{field: wrong})
            yield Trial(
                f"{name}, {field} = {str(wrong)[:20]!r} ({type(wrong).__name__})", lambda make=make: refused(make)
            )
        for key in (Key("validation", 0, 0), Key("train", -1, 0), Key("", 0, 0)):
            yield Trial(f"{name}, drawn by {key}", lambda task=task, key=key: refused(lambda: task().draw(1, key)))
    yield from changed(SIZE, False)
    yield from changed(TRAINING, True)
    yield from changed(Spectra(training=TRAINING), True)
    yield from changed(Drift(format="int8"), True)
    for point in (Decode(layer="kda"), Prefill(layer="kda"), Cache(pattern="K")):
        yield from changed(point, True)
    for name in ("", "kdaa", "KX", "transformer", "k", "K" * 1000 + "?", "MODEL_VARIANTS"):
        yield Trial(f"variant {name[:20]!r}", lambda name=name: refused(lambda: model_variant(name)))
    for options in (
        {"conv": 3},
        {"convolution": False},
        {"beta_max": -1},
        {"beta_max": math.nan},
        {"gate": "relu"},
        {"": 1},
    ):
        yield Trial(f"variant with {options}", lambda options=options: refused(lambda: ModelVariant("x", "K", options)))
    for options in (
        {"kind": "int4"},
        {"kind": ""},
        {"kind": "int8", "feedback": True, "stochastic": 3},
        {"kind": "float8", "feedback": True},
    ):
        yield Trial(f"format {options}", lambda options=options: refused(lambda: Format(**options)))
    yield from experiments(folder)


CAMPAIGNS = [
    Campaign(
        "lab, bad input",
        "tasks, variants, trainings, measurements and sweeps with a field of a wrong kind or range: refused before anything runs",
        trials,
        60.0,
    )
]
