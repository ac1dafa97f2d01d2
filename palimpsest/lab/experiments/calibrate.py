"""Calibration: does KDA learn the tasks of fig4's quick form within its steps, and at which learning rate?"""

from collections.abc import Sequence

from palimpsest.lab.compare.plots import figure, learning_curves, legend_below, style
from palimpsest.lab.compare.seed_statistics import Table
from palimpsest.lab.experiments.fig4 import QUICK_RATE, QUICK_RUN, quick_tasks, tasks
from palimpsest.lab.framework.experiment import Experiment, Record, Verdict
from palimpsest.lab.model_variants import MODEL_VARIANTS, Size
from palimpsest.lab.training import Training

RATES = (QUICK_RATE, QUICK_RATE / 2)
SETTING = ("length", "vocabulary", "lr")


def points(scale: str) -> list:
    if scale == "tiny":
        size = Size(layers=1, hidden_size=16, heads=1, head_dim=8, mlp=32)
        shared = {"size": size, "steps": 2, "tokens_per_step": 64, "evaluate_every": 1, "test_batches": 1}
        settings = [(task, QUICK_RATE) for task in tasks(16, 24, 4)]
    else:  # the first points are those of fig4 itself
        shared = QUICK_RUN
        settings = [(task, lr) for lr in RATES for length in (256, 512, 1024) for task in quick_tasks(length)]
        settings += [(task, QUICK_RATE) for task in quick_tasks(256, vocab_size=512)]
    return [
        Calibration(Training(who=MODEL_VARIANTS["kda"], train=(task,), lr=lr, **shared))  # type: ignore[arg-type]
        for task, lr in settings
    ]


class Calibration:
    """A training point whose label tells the vocabulary and the pairs too."""

    def __init__(self, point: Training):
        self.point = point

    def label(self):
        task = self.point.asked[0]
        return self.point.label() | {"vocabulary": task.vocab_size, "pairs": getattr(task, "pairs", 0)}

    def __getattr__(self, name: str):
        return getattr(self.point, name)


def judge(records: Sequence[Record]) -> Verdict:
    solved = [r for r in records if r.rows[0]["step_at_99"]]
    rows = [
        [
            *(str(r.label[c]) for c in ("task", "length", "vocabulary", "pairs", "lr")),
            f"{r.rows[0]['best_accuracy']:.1%}",
            str(r.rows[0]["step_at_99"] or "never"),
            f"{r.seconds:.0f}",
        ]
        for r in records
    ]
    header = ["task", "length", "vocabulary", "pairs", "learning rate", "peak accuracy", "steps to 99 %", "seconds"]
    because = [f"KDA solved {len(solved)} of {len(records)} settings."]
    for key in dict.fromkeys(tuple(r.label[c] for c in SETTING) for r in records):
        here = [r for r in records if tuple(r.label[c] for c in SETTING) == key]
        steps = [f"{r.label['task']} {r.rows[0]['step_at_99'] or 'never'}" for r in here]
        words = f"Length {key[0]}, vocabulary {key[1]}, learning rate {key[2]:g}"
        because.append(f"{words}, steps to 99 %: {', '.join(steps)}.")
    return Verdict("measured", because, (Table("Settings", header, rows),))


def draw(records: Sequence[Record]):
    settings = list(dict.fromkeys((r.label["task"], r.label["length"]) for r in records))
    name = lambda r: (
        f"{r.label['vocabulary']} tokens, lr {r.label['lr']:g}"
        + (f", {r.label['pairs']} pairs" if r.label["pairs"] else "")
    )
    renamed = [Record(r.label | {"contestant": name(r)}, r.result, r.seconds) for r in records]
    styles = style([r.label["contestant"] for r in renamed])
    fig, axes = figure(-(-len(settings) // 3), min(len(settings), 3))
    for ax, (task, length) in zip(axes, settings):
        learning_curves(ax, [r for r in renamed if (r.label["task"], r.label["length"]) == (task, length)], styles)
        ax.set_title(f"{task}, length {length}", fontsize=10)
    legend_below(fig, axes)
    return {"curves": fig}


EXPERIMENT = Experiment(
    name="calibrate",
    question="does KDA learn the tasks of fig4's quick form within its steps, and at which learning rate?",
    claim=(
        "None; the paper gives neither vocabulary nor pairs, and with 8,192 tokens and length / 4 pairs KDA needs some 4,000 "
        "steps at length 512."
    ),
    scales={
        "tiny": "every part in seconds, on a CPU; proves nothing",
        "quick": "one seed of fig4's quick form, lengths 256 to 1,024, two learning rates, and twice the vocabulary: 5 minutes "
        "on an H200 with 4 workers",
    },
    points=points,
    judge=judge,
    draw=draw,
)
