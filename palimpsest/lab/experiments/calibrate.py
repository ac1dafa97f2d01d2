"""Calibration: a vocabulary and a number of pairs at which KDA learns the tasks of fig4 within its steps."""

from collections.abc import Sequence

from palimpsest.lab.contestants import CONTESTANTS, PAPER_SIZE, Size
from palimpsest.lab.experiment import Experiment, Record, Verdict
from palimpsest.lab.experiments.fig4 import tasks
from palimpsest.lab.plots import figure, learning_curves, legend_below, style
from palimpsest.lab.spread import Table
from palimpsest.lab.training import Training

GRID = [(vocab, share) for vocab in (256, 1024) for share in (8, 4)]  # vocabulary, and length over pairs
RATES = (1e-3, 3e-3)


def points(scale: str) -> list[Training]:
    if scale == "tiny":
        size, lengths, settings = Size(layers=1, hidden_size=16, heads=1, head_dim=8, mlp=32), (16,), [(24, 8)]
        shared = {"steps": 2, "tokens_per_step": 64, "evaluate_every": 1, "test_batches": 1}
        stacks, rates = 4, RATES[:1]
    else:
        size, lengths, settings, stacks, rates = PAPER_SIZE, (256, 512), GRID, 64, RATES
        shared = {"steps": 1500, "tokens_per_step": 32768, "evaluate_every": 100, "test_batches": 1}
    made = [
        Training(who=CONTESTANTS["kda"], train=(task,), size=size, lr=lr, **shared)  # type: ignore[arg-type]
        for length in lengths
        for vocab, share in settings
        if 2 * length // share < vocab  # keys enough
        for task in tasks(length, vocab, stacks, pairs_share=share)
        if task.name == "mqar" or share == settings[0][1]
        for lr in rates
    ]
    return [Calibration(point) for point in made]  # type: ignore[return-value]


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
    return Verdict(
        "measured", [f"KDA solved {len(solved)} of {len(records)} settings."], (Table("Settings", header, rows),)
    )


def draw(records: Sequence[Record]):
    settings = list(dict.fromkeys((r.label["task"], r.label["length"]) for r in records))
    name = lambda r: (
        f"{r.label['vocabulary']} tokens, lr {r.label['lr']:g}"
        + (f", {r.label['pairs']} pairs" if r.label["pairs"] else "")
    )
    renamed = [Record(r.label | {"contestant": name(r)}, r.result, r.seconds) for r in records]
    styles = style([r.label["contestant"] for r in renamed])
    found, axes = figure(-(-len(settings) // 3), min(len(settings), 3))
    for ax, (task, length) in zip(axes, settings):
        learning_curves(ax, [r for r in renamed if (r.label["task"], r.label["length"]) == (task, length)], styles)
        ax.set_title(f"{task}, length {length}", fontsize=10)
    legend_below(found, axes)
    return {"curves": found}


EXPERIMENT = Experiment(
    name="calibrate",
    question="at which vocabulary and how many pairs does KDA learn the tasks of fig4 within 1,500 steps?",
    claim="None; the paper gives neither, and with 8,192 tokens and length / 4 pairs KDA needs some 4,000 steps at length 512.",
    scales={
        "tiny": "every part in seconds, on a CPU; proves nothing",
        "quick": "one seed, lengths 256 and 512, two vocabularies, shares of pairs and rates: 5 to 10 minutes on an H200",
    },
    points=points,
    judge=judge,
    draw=draw,
)
