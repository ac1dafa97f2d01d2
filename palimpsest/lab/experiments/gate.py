"""The gate: what does a decay of its own for every channel bring?"""

from palimpsest.lab.compare.comparison import draw_bars, versus
from palimpsest.lab.framework.experiment import Experiment
from palimpsest.lab.model_variants import PAPER_SIZE, ModelVariant, Size
from palimpsest.lab.tasks import MQAR, Induction, Palindrome, SelectiveCopy
from palimpsest.lab.training import Training

WHO = {
    "channel": ModelVariant("channel", "K"),
    "channel, full rank": ModelVariant("channel, full rank", "K", {"gate_rank": "full"}),
    "channel, bounded": ModelVariant("channel, bounded", "K", {"gate": "sigmoid"}),
    "head": ModelVariant("head", "G"),
    "constant": ModelVariant("constant", "K", {"decay": "constant"}),
    "none": ModelVariant("none", "D"),
}
WORDS = {
    "channel, full rank": "a gate of full rank",
    "channel, bounded": "a bounded gate",
    "head": "one decay a head",
    "constant": "a constant decay",
    "none": "no decay",
}


def points(scale: str) -> list[Training]:
    if scale == "tiny":
        size, seeds = Size(layers=1, hidden_size=16, heads=1, head_dim=8, mlp=32), (0,)
        shared = {"steps": 2, "tokens_per_step": 64, "evaluate_every": 1, "test_batches": 1, "lr": 3e-3}
        tasks = [SelectiveCopy(length=16, vocab_size=8, symbols=3)]
    elif scale == "small":
        size, seeds = Size(), (0, 1)
        shared = {"steps": 500, "tokens_per_step": 1024, "evaluate_every": 50, "test_batches": 4, "lr": 3e-3}
        tasks = [MQAR(length=64, vocab_size=64, pairs=8), SelectiveCopy(length=64)]
    else:
        size, seeds = PAPER_SIZE, (0, 1, 2)
        shared = {"steps": 4000, "tokens_per_step": 32768, "evaluate_every": 200, "test_batches": 2, "lr": 1e-3}
        tasks = [
            Palindrome(length=512, vocab_size=512),
            MQAR(length=512, vocab_size=512, pairs=64),
            SelectiveCopy(length=512, vocab_size=64, symbols=32),
            Induction(length=512, vocab_size=512, n=1, piece=16),
        ]
    return [
        Training(who=who, train=(task,), size=size, seed=seed, **shared)  # type: ignore[arg-type]
        for seed in seeds
        for task in tasks
        for who in WHO.values()
    ]


EXPERIMENT = Experiment(
    name="gate",
    question="what does a decay of its own for every channel bring?",
    claim=(
        "KDA refines Gated DeltaNet's decay of a head to a decay of a channel, through a projection of low rank, and is ahead "
        "of it (arXiv:2510.26692, sections 3 and 5.1). Later models bound the decay below."
    ),
    scales={
        "tiny": "every part in seconds, on a CPU; proves nothing",
        "small": "width 64, length 64, MQAR and selective copying, 500 steps of 1,024 tokens, 2 seeds: minutes on a CPU",
        "full": "2 layers of width 256, length 512, four tasks, 4,000 steps of 32,768 tokens, 3 seeds: 1.5 hours on an H200",
    },
    points=points,
    judge=versus("channel", WORDS),
    draw=draw_bars,
    setting="All contestants share erasing and writing by beta; only the decay differs. Parameters are matched through the MLPs.",
)
