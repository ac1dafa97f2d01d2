"""Positions: do the attention layers of a hybrid need them, at and beyond the length of training?"""

from collections.abc import Sequence

from palimpsest.lab.compare.comparison import Measure, best, draw_lengths, results_table
from palimpsest.lab.compare.plots import needle_map
from palimpsest.lab.compare.seed_statistics import contestants_table, diverged
from palimpsest.lab.framework.experiment import Experiment, Record, Verdict
from palimpsest.lab.model_variants import ModelVariant, Size
from palimpsest.lab.tasks import Needle, Text
from palimpsest.lab.training import Training

WHO = {
    "hybrid, NoPE": ModelVariant("hybrid, NoPE", "KKKM"),
    "hybrid, RoPE": ModelVariant("hybrid, RoPE", "KKKR"),
    "attention, NoPE": ModelVariant("attention, NoPE", "M"),
    "attention, RoPE": ModelVariant("attention, RoPE", "R"),
}


def points(scale: str) -> list[Training]:
    if scale == "tiny":
        size, seeds, length, factors = Size(layers=4, hidden_size=16, heads=1, head_dim=8, mlp=32), (0,), 200, (1, 2)
        shared = {"steps": 1, "tokens_per_step": 400, "evaluate_every": 1, "test_batches": 1, "lr": 3e-3}
    elif scale == "small":
        size, seeds, length, factors = (
            Size(layers=4, hidden_size=64, heads=2, head_dim=32, mlp=128),
            (0, 1),
            256,
            (1, 2, 4),
        )
        shared = {"steps": 500, "tokens_per_step": 2048, "evaluate_every": 100, "test_batches": 8, "lr": 3e-3}
    else:
        size, seeds, length, factors = (
            Size(layers=8, hidden_size=512, heads=4, head_dim=128, mlp=1408), (0, 1), 2048, (1, 2, 4, 8, 16, 32),
        )  # fmt: skip
        shared = {"steps": 8000, "tokens_per_step": 65536, "evaluate_every": 1000, "test_batches": 4, "lr": 1e-3}
    tests = tuple(task(length=length * f) for task in (Text, Needle) for f in factors)
    return [
        Training(who=who, train=(Needle(length=length),), tests=tests, size=size, seed=seed, stop_at=2.0, **shared)  # type: ignore[arg-type]
        for seed in seeds
        for who in WHO.values()
    ]


def judge(records: Sequence[Record]) -> Verdict:
    scores = best(records)
    because, shown, reverse = [], 0, 0
    for task in ("text", "needle"):
        lengths = sorted({int(t.rpartition(" ")[2]) for t, _ in scores if t.rpartition(" ")[0] == task})
        for length in dict.fromkeys((lengths[0], lengths[-1])) if lengths else ():
            nope, rope = (scores.get((f"{task} {length}", f"hybrid, {p}")) for p in ("NoPE", "RoPE"))
            if nope is None or rope is None:
                continue
            m = Measure(task)
            up, down = (nope.above(rope), rope.above(nope)) if m.larger else (rope.above(nope), nope.above(rope))
            where = "at the length of training" if length == lengths[0] else f"at {length // lengths[0]} times that"
            verdict = "NoPE is ahead" if up else "RoPE is ahead" if down else "the seeds' ranges overlap"
            verdict = "neither finds any" if m.larger and nope.high == rope.high == 0 else verdict
            unit = "" if m.unit == "%" else f" {m.unit}"
            because.append(f"{task} {where}: NoPE {m.text(nope)}, RoPE {m.text(rope)}{unit}; {verdict}.")
            if length != lengths[0]:
                shown, reverse = shown + up, reverse + down
    outcome = "shown" if shown and not reverse else "not shown" if reverse and not shown else "undecided"
    return Verdict(outcome, because + diverged(records), (results_table(scores), contestants_table(records)))


EXPERIMENT = Experiment(
    name="position",
    question="do the attention layers of a hybrid need positions, at and beyond the length of training?",
    claim=(
        "Without positions in its attention layers the hybrid is better at long contexts: RULER at 128K 84.3 without, 78.8 with "
        "rotary positions (arXiv:2510.26692, Table 5 and section 6); at short contexts the two are alike."
    ),
    scales={
        "tiny": "every part in seconds, on a CPU; proves nothing",
        "small": "4 layers of width 64 on text with needles at length 256, tested to 1,024, 500 steps of 2,048 tokens, 2 seeds: "
        "ten minutes on a CPU",
        "full": "8 layers of width 512 at length 2,048, tested to 65,536, 524M bytes, 2 seeds: about 4 hours on an H200",
    },
    points=points,
    judge=judge,
    draw=lambda records: {**draw_lengths(records), "needles": needle_map(records)},
    setting="Text with a needle in each sequence; equal parameters and tokens. A needle counts when all its digits are right.",
)
