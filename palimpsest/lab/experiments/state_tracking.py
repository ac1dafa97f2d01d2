"""State tracking: does beta up to 2 give the memory the states that beta up to 1 cannot hold?"""

from collections.abc import Sequence

from palimpsest.lab.compare.comparison import Measure, best, draw_lengths, results_table
from palimpsest.lab.compare.seed_statistics import contestants_table, diverged
from palimpsest.lab.framework.experiment import Experiment, Record, Verdict
from palimpsest.lab.model_variants import MODEL_VARIANTS, Size
from palimpsest.lab.tasks import StateTracking
from palimpsest.lab.training import Training

WHO = [MODEL_VARIANTS[name] for name in ("kda", "kda-negative", "gdn", "gdn-negative", "softmax")]
PAIRS = (("kda-negative", "kda"), ("gdn-negative", "gdn"))


def points(scale: str) -> list[Training]:
    if scale == "tiny":
        size, seeds, length, factors = Size(layers=1, hidden_size=16, heads=1, head_dim=8, mlp=16), (0,), 8, (1, 2)
        shared = {"steps": 4, "tokens_per_step": 64, "evaluate_every": 2, "test_batches": 1, "lr": 3e-3}
        machines, who = [StateTracking(length=length)], WHO[:2]
    elif scale == "small":
        size, seeds, length, factors = (
            Size(layers=1, hidden_size=32, heads=2, head_dim=16, mlp=64),
            (0, 1, 2),
            32,
            (1, 2, 4, 8),
        )
        shared = {"steps": 600, "tokens_per_step": 2048, "evaluate_every": 50, "test_batches": 2, "lr": 3e-3}
        machines = [StateTracking(length=length), StateTracking(length=length, kind="group", degree=3, letters="swaps")]
        who = WHO[:2]
    else:
        size, seeds, length, factors = (
            Size(layers=1, hidden_size=128, heads=4, head_dim=32, mlp=256),
            (0, 1, 2),
            128,
            (1, 2, 4, 8),
        )
        shared = {"steps": 10000, "tokens_per_step": 32768, "evaluate_every": 250, "test_batches": 2, "lr": 1e-3}
        machines = [
            StateTracking(length=length),
            StateTracking(length=length, kind="modular", modulus=5),
            StateTracking(length=length, kind="group", degree=3),
            StateTracking(length=length, kind="group", degree=5, letters="swaps"),
            StateTracking(length=length, kind="group", degree=5),
        ]
        who = WHO
    longer = lambda t, f: StateTracking(
        length=t.length * f, kind=t.kind, modulus=t.modulus, degree=t.degree, letters=t.letters
    )
    return [
        Training(
            who=w,
            train=(t,),
            tests=tuple(longer(t, f) for f in factors),
            size=size,
            seed=seed,
            stop_at=0.9999,
            **shared,
        )  # type: ignore[arg-type]
        for seed in seeds
        for t in machines
        for w in who
    ]


def judge(records: Sequence[Record]) -> Verdict:
    scores = best(records)
    because, shown, reverse = [], 0, 0
    for machine in dict.fromkeys(r.label["task"] for r in records):
        tests = sorted({int(t.rpartition(" ")[2]) for t, _ in scores if t.rpartition(" ")[0] == machine})
        for negative, positive in PAIRS:
            for length in (tests[0], tests[-1]):
                a, b = (scores.get((f"{machine} {length}", who)) for who in (negative, positive))
                if a is None or b is None:
                    continue
                m = Measure(machine)
                where = "in training" if length == tests[0] else "beyond it"
                sure = ", apart in every seed" if a.above(b) or b.above(a) else ", not apart in every seed"
                because.append(
                    f"{machine} at length {length} ({where}): {negative} {m.text(a)} against {positive} {m.text(b)}{sure}."
                )
                if length == tests[-1]:
                    shown, reverse = shown + a.above(b), reverse + b.above(a)
    outcome = "shown" if shown and not reverse else "not shown" if reverse else "undecided"
    return Verdict(outcome, because + diverged(records), (results_table(scores), contestants_table(records)))


EXPERIMENT = Experiment(
    name="state_tracking",
    question="does beta up to 2 let the memory track states that beta up to 1 cannot?",
    claim=(
        "Linear recurrences whose transitions have eigenvalues in [0, 1] cannot learn parity at lengths beyond training; with "
        "eigenvalues in [-1, 1] they can (arXiv:2411.12537). One delta-rule step is one reflection, so products of swaps are "
        "within reach of a single layer and all of S5 needs more."
    ),
    scales={
        "tiny": "every part in seconds, on a CPU; proves nothing",
        "small": "1 layer of width 32, parity and swaps of 3, trained at length 32, tested to 256, 3 seeds: minutes on a CPU",
        "full": "1 layer of width 128, five machines, trained at length 128, tested to 1,024, 3 seeds: about 2 hours on an H200",
    },
    points=points,
    judge=judge,
    draw=draw_lengths,
    setting="One layer, so that depth cannot stand in for the memory. The label after every token is the state.",
)
