"""Spectra: what a trained memory does, seen from its transition matrices and its gates."""

from collections.abc import Sequence

from palimpsest.lab.compare.plots import PALETTE, figure, legend_below
from palimpsest.lab.framework.experiment import Experiment, Record, Table, Verdict
from palimpsest.lab.measure.transition_spectra import Spectra
from palimpsest.lab.model_variants import MODEL_VARIANTS, PAPER_SIZE, Size
from palimpsest.lab.tasks import MQAR, StateTracking, Text
from palimpsest.lab.training import Training


def points(scale: str) -> list[Spectra]:
    kda, negative = MODEL_VARIANTS["kda"], MODEL_VARIANTS["kda-negative"]
    if scale == "tiny":
        size = Size(layers=2, hidden_size=16, heads=1, head_dim=8, mlp=32)
        shared = {"size": size, "steps": 2, "tokens_per_step": 64, "evaluate_every": 1, "test_batches": 1}
        return [Spectra(training=Training(who=kda, train=(MQAR(length=16, vocab_size=16, pairs=3),), **shared))]  # type: ignore[arg-type]
    if scale == "small":
        shared = {
            "size": Size(),
            "steps": 400,
            "tokens_per_step": 1024,
            "evaluate_every": 100,
            "test_batches": 2,
            "lr": 3e-3,
        }
        jobs = [
            (kda, MQAR(length=64, vocab_size=64, pairs=8)),
            (kda, Text(length=128)),
            (negative, StateTracking(length=64)),
        ]
        seeds = (0,)
    else:
        shared = {"size": PAPER_SIZE, "steps": 4000, "tokens_per_step": 32768, "evaluate_every": 500, "test_batches": 2}
        jobs = [
            (kda, MQAR(length=512, vocab_size=512, pairs=64)),
            (kda, Text(length=1024)),
            (negative, StateTracking(length=256)),
        ]
        seeds = (0, 1)
    return [
        Spectra(training=Training(who=who, train=(task,), seed=seed, **shared)) for seed in seeds for who, task in jobs
    ]  # type: ignore[arg-type]


def judge(records: Sequence[Record]) -> Verdict:
    because = []
    for r in records:
        name = f"{r.label['contestant']} on {r.label['task']} (seed {r.label['seed']})"
        stretch = max(row["largest_stretch"] for row in r.rows)
        smallest = min(row["smallest_eigenvalue"] for row in r.rows)
        timescales = [timescale for d in r.result["details"] for head in d["timescale"] for timescale in head]
        because.append(
            f"{name}: eigenvalues from {smallest:.3f}, the largest stretch of a transition is {stretch:.4f}, channels live "
            f"{min(timescales):.2g} to {max(timescales):.2g} tokens."
        )
        because += [f"Warning, {name}: {w}." for w in r.result["warnings"]]
    worst = max((row["largest_stretch"] for r in records for row in r.rows), default=0.0)
    header = [
        "contestant",
        "task",
        "seed",
        "layer",
        "head",
        "negative share",
        "carried",
        "memory norm",
        "median life",
        "mean beta",
    ]
    rows = [
        [
            *(str(row[c]) for c in ("contestant", "task", "seed", "layer", "head")),
            f"{row['negative_share']:.1%}",
            f"{row['carried_to_the_end']:.2g}",
            f"{row['memory_norm_at_the_end']:.3g}",
            f"{row['median_timescale']:.3g}",
            f"{row['mean_beta']:.2f}",
        ]
        for r in records
        for row in r.rows
    ]
    return Verdict(
        "shown" if worst <= 1 + 1e-4 else "not shown",
        because,
        (Table("Heads, at the end of the sequence", header, rows),),
    )


def draw(records: Sequence[Record]):
    figures = {}
    for r in records:
        fig, axes = figure(2, 3, width=3.8, height=2.8)
        for i, d in enumerate(r.result["details"]):
            color, name = PALETTE[i % len(PALETTE)], f"layer {d['layer']}"
            ends = {"eigenvalues": (-1, 1), "beta": (0, 2), "decay": (-6, 3)}
            for ax, what in zip(axes, ends):
                low, high = ends[what]
                n = len(d[what])
                edges = [low + (high - low) * j / n for j in range(n + 1)]
                ax.stairs([100 * v for v in d[what]], edges, color=color, label=name, linewidth=1.5)
            for head in d["timescale"]:
                axes[3].plot([j / max(len(head) - 1, 1) for j in range(len(head))], head, color=color, linewidth=1.3)
            for ax, what in ((axes[4], "memory_norm"), (axes[5], "carried")):
                for head in d[what]:
                    ax.plot(d.get("tokens", range(1, len(head) + 1)), head, color=color, linewidth=1.3)
        axes[0].set(title="eigenvalues of the transitions", yscale="log", ylabel="% of them")
        axes[1].set(title="beta", ylabel="% of tokens")
        axes[2].set(title="decay: log10 of -log_decay", ylabel="% of channels and tokens")
        axes[3].set(title="life of the channels, sorted", yscale="log", ylabel="tokens", xticks=[])
        axes[4].set(title="norm of the memory", xlabel="tokens")
        axes[5].set(title="norm of the product of transitions", xlabel="tokens", yscale="log")
        for ax in axes:
            ax.title.set_fontsize(9)
        legend_below(fig, axes)
        figures[f"{r.label['contestant']}-{r.label['task'].replace(' ', '-')}-{r.label['seed']}"] = fig
    return figures


EXPERIMENT = Experiment(
    name="spectra",
    question="what do the transitions and the gates of a trained memory look like, and are they stable?",
    claim=(
        "With unit keys, decays of at most 1 and beta of at most 2 the transition (I - beta k k^T) Diag(alpha) has real "
        "eigenvalues in [-1, 1] and lengthens no vector: a memory of bounded writes cannot run away."
    ),
    scales={
        "tiny": "every part in seconds, on a CPU; proves nothing",
        "small": "models of width 64 on MQAR, text and parity, 400 steps: minutes on a CPU",
        "full": "models of width 256 on MQAR, text and parity, 4,000 steps, 2 seeds: 5 minutes on an H200",
    },
    points=points,
    judge=judge,
    draw=draw,
    setting=(
        "Measured in float64 on four held-out sequences, at up to 256 tokens of each. A channel's life is -1 over its mean log "
        "decay. A line a head."
    ),
)
