"""The ratio: how many layers of attention does a hybrid need? (paper, Table 1, upper half)"""

from palimpsest.lab.compare.comparison import draw_bars, versus
from palimpsest.lab.compare.plots import needle_map
from palimpsest.lab.framework.experiment import Experiment
from palimpsest.lab.model_variants import ModelVariant, Size
from palimpsest.lab.tasks import Needle, Text
from palimpsest.lab.training import Training

WHO = {
    "0:1, all attention": ModelVariant("0:1, all attention", "M"),
    "1:1": ModelVariant("1:1", "KM"),
    "3:1": ModelVariant("3:1", "KKKM"),
    "7:1": ModelVariant("7:1", 7 * "K" + "M"),
    "15:1": ModelVariant("15:1", 15 * "K" + "M"),
    "1:0, all KDA": ModelVariant("1:0, all KDA", "K"),
}


def points(scale: str) -> list[Training]:
    names = list(WHO)
    if scale == "tiny":
        names = ["3:1", "15:1"]
        size, seeds, length = Size(layers=16, hidden_size=16, heads=1, head_dim=8, mlp=32), (0,), 210
        shared = {"steps": 1, "tokens_per_step": 420, "evaluate_every": 1, "test_batches": 1, "lr": 3e-3}
    elif scale == "small":
        size, seeds, length = Size(layers=16, hidden_size=32, heads=2, head_dim=16, mlp=64), (0, 1), 256
        shared = {"steps": 500, "tokens_per_step": 1024, "evaluate_every": 100, "test_batches": 8, "lr": 3e-3}
    else:
        size, seeds, length = Size(layers=16, hidden_size=512, heads=4, head_dim=128, mlp=1408), (0, 1), 2048
        shared = {"steps": 8000, "tokens_per_step": 65536, "evaluate_every": 1000, "test_batches": 4, "lr": 1e-3}
    return [
        Training(
            who=WHO[name],
            train=(Needle(length=length),),
            tests=(
                Text(length=length),
                *(Needle(length=length * f) for f in ((1, 2, 4) if scale == "full" else (1,))),
                Needle(length=length, needles=2, queries=2),
                Needle(length=length, values=2),
            ),
            size=size,
            seed=seed,
            stop_at=2.0,  # never: equal compute for all
            **shared,  # type: ignore[arg-type]
        )
        for seed in seeds
        for name in names
    ]


EXPERIMENT = Experiment(
    name="ratio",
    question="how many layers of memory may stand for one of attention?",
    claim=(
        "Of 0:1, 1:1, 3:1, 7:1 and 15:1 the ratio 3:1 has the lowest validation perplexity: 5.77, 5.66, 5.65, 5.70, 5.82 "
        "(arXiv:2510.26692, Table 1)."
    ),
    scales={
        "tiny": "every part in seconds, on a CPU; proves nothing",
        "small": "16 layers of width 32 on text with needles at length 256, 500 steps of 1,024 tokens, 2 seeds: a quarter "
        "of an hour on a CPU",
        "full": "16 layers of width 512 at length 2,048, 524M bytes, tested to 8,192, 2 seeds: some 7 hours on an H200",
    },
    points=points,
    judge=versus("3:1", {name: name for name in WHO if name != "3:1"}),
    draw=lambda records: {**draw_bars(records), "needles": needle_map(records)},
    setting=(
        "Text with a needle in each sequence; equal parameters (through the MLPs) and equal tokens. Bits a byte are of text "
        "without needles; a needle counts when all its digits are right."
    ),
)
