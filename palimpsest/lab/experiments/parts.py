"""The parts of the layer: output gate, short convolution, normalised queries and keys (paper, Table 1, lower half)."""

from palimpsest.lab.compare.comparison import draw_bars, versus
from palimpsest.lab.framework.experiment import Experiment
from palimpsest.lab.model_variants import PAPER_SIZE, ModelVariant, Size
from palimpsest.lab.tasks import MQAR, Text
from palimpsest.lab.training import Training

WHO = {
    "kda": ModelVariant("kda", "K"),
    "no output gate": ModelVariant("no output gate", "K", {"output_gate": "none"}),
    "SiLU output gate": ModelVariant("SiLU output gate", "K", {"output_gate": "silu"}),
    "no convolution": ModelVariant("no convolution", "K", {"conv": False}),
    "no q/k norm": ModelVariant("no q/k norm", "K", {"qk_norm": False}),
}


def points(scale: str) -> list[Training]:
    if scale == "tiny":
        size, seeds = Size(layers=1, hidden_size=16, heads=1, head_dim=8, mlp=32), (0,)
        shared = {"steps": 2, "tokens_per_step": 64, "evaluate_every": 1, "test_batches": 1, "lr": 3e-3}
        tasks = [MQAR(length=16, vocab_size=16, pairs=3), Text(length=32)]
    elif scale == "small":
        size, seeds = Size(), (0, 1)
        shared = {"steps": 400, "tokens_per_step": 1024, "evaluate_every": 50, "test_batches": 8, "lr": 3e-3}
        tasks = [MQAR(length=64, vocab_size=64, pairs=8), Text(length=128)]
    else:
        size, seeds = Size(layers=8, hidden_size=512, heads=4, head_dim=128, mlp=1408), (0, 1)
        shared = {"steps": 6000, "tokens_per_step": 65536, "evaluate_every": 500, "test_batches": 4, "lr": 1e-3}
        tasks = [Text(length=1024)]
    points = [
        Training(who=who, train=(task,), size=size, seed=seed, **shared)  # type: ignore[arg-type]
        for seed in seeds
        for task in tasks
        for who in WHO.values()
    ]
    if scale == "full":  # a task of recall beside the text, in the paper's small size
        shared = {"steps": 4000, "tokens_per_step": 32768, "evaluate_every": 200, "test_batches": 2, "lr": 1e-3}
        recall = MQAR(length=512, vocab_size=512, pairs=64)
        points += [
            Training(who=who, train=(recall,), size=PAPER_SIZE, seed=seed, **shared)  # type: ignore[arg-type]
            for seed in (0, 1, 2)
            for who in WHO.values()
        ]
    return points


EXPERIMENT = Experiment(
    name="parts",
    question="does each part of the layer earn its place?",
    claim=(
        "Validation perplexity 5.65 with all parts, 5.67 without the output gate, 5.81 with a SiLU output gate, 5.70 without "
        "convolutions (arXiv:2510.26692, Table 1: 16 layers, 3:1 hybrid, about 650M parameters at work)."
    ),
    scales={
        "tiny": "every part in seconds, on a CPU; proves nothing",
        "small": "width 64, MQAR at length 64 and bytes of text at 128, 400 steps of 1,024 tokens, 2 seeds: minutes on a CPU",
        "full": "8 layers of width 512 on 393M bytes of text, 2 seeds, and MQAR in the small size: about 4 hours on an H200",
    },
    points=points,
    judge=versus("kda", {name: name for name in WHO if name != "kda"}),
    draw=draw_bars,
    setting="All layers are KDA, no hybrid, so that a part cannot be made up for by attention. Text is held out by file.",
)
