"""What an image costs as it grows: from which resolution is a memory faster than attention?"""

from collections.abc import Sequence

from palimpsest.lab.compare.plots import FAINT, figure, legend_below, style
from palimpsest.lab.compare.seed_statistics import grid
from palimpsest.lab.experiments.vision import seer
from palimpsest.lab.framework.experiment import Experiment, Record, Verdict
from palimpsest.lab.measure.sight_cost import SightCost
from palimpsest.models.vision import VisionConfig

WHO = [
    seer("softmax"),
    seer("KDA", "one way"),
    seer("KDA", "both ways"),
    seer("KDA", "four ways"),
    seer("GDN", "four ways"),
]
WHO += [seer("GLA", "four ways")]


def points(scale: str) -> list[SightCost]:
    if scale == "tiny":
        base = VisionConfig(patch_size=4, hidden_size=16, num_layers=1, num_heads=4, head_dim=4, intermediate_size=64)
        return [
            SightCost(who=w, base=base, resolutions=(16, 32), tokens=64, rounds=1, calls=1) for w in (WHO[0], WHO[3])
        ]
    base = VisionConfig(patch_size=16, hidden_size=256, num_layers=4, num_heads=4, head_dim=64, intermediate_size=768)
    sides = (224, 448, 896) if scale == "small" else (224, 320, 448, 640, 896, 1280, 2048)
    return [SightCost(who=w, base=base, resolutions=sides, train=train) for train in (False, True) for w in WHO]


def judge(records: Sequence[Record]) -> Verdict:
    times = {
        (r.label["what"], r.label["contestant"]): {row["resolution"]: row["milliseconds"] for row in r.rows}
        for r in records
    }
    because, wins, losses = [], 0, 0
    for what in dict.fromkeys(w for w, _ in times):
        attention = times.get((what, "softmax"), {})
        for who in ("KDA, one way", "KDA, four ways"):
            mine = times.get((what, who), {})
            sides = sorted(mine.keys() & attention.keys())
            if not sides:
                continue
            largest = sides[-1]
            faster = [side for side in sides if all(mine[s] < attention[s] for s in sides if s >= side)]
            since = f"faster than attention from {faster[0]} pixels on" if faster else "nowhere faster than attention"
            ratio = attention[largest] / mine[largest]
            because.append(
                f"{what}, {who}: {since}; at {largest} pixels {mine[largest]:.3g} ms an image against {attention[largest]:.3g} "
                f"({ratio:.2f} times as fast)."
            )
            wins, losses = wins + (ratio > 1.05), losses + (ratio < 1 / 1.05)
    outcome = "shown" if wins and not losses else "not shown" if losses and not wins else "undecided"
    tables = [
        grid(f"{what}: milliseconds an image", {(who, f"{side}"): f"{ms:.3g}" for (w, who), by in times.items() if w == what
             for side, ms in by.items()}, "contestant")
        for what in dict.fromkeys(w for w, _ in times)
    ]  # fmt: skip
    return Verdict(outcome, because, tables)


def draw(records: Sequence[Record]):
    whats = list(dict.fromkeys(r.label["what"] for r in records))
    fig, axes = figure(1, len(whats))
    styles = style([r.label["contestant"] for r in records])
    for ax, what in zip(axes, whats):
        sides: set[int] = set()
        for r in records:
            if r.label["what"] == what:
                x = [row["resolution"] for row in r.rows]
                ax.plot(
                    x,
                    [row["milliseconds"] for row in r.rows],
                    label=r.label["contestant"],
                    **styles[r.label["contestant"]],
                )
                sides |= set(x)
        ax.set(xscale="log", yscale="log", xlabel="pixels of a side", ylabel="milliseconds an image")
        ax.set_xticks(sorted(sides), [str(x) for x in sorted(sides)])
        ax.minorticks_off()
        ax.grid(axis="y", color=FAINT, alpha=0.25)
        ax.set_title(what, fontsize=10)
    legend_below(fig, axes)
    return {"cost": fig}


EXPERIMENT = Experiment(
    name="vision_cost",
    question="what does an image cost as it grows, scanned by a memory or attended to?",
    claim=(
        "A memory's time grows with the patches, attention's with their square: Vision Mamba reports 2.8 times DeiT's speed at "
        "1,248 pixels (arXiv:2401.09417). Asked here: at 2,048 pixels KDA is faster than attention."
    ),
    scales={
        "tiny": "every part in seconds, on a CPU; proves nothing",
        "small": "4 layers of width 256, patches of 16, 224 to 896 pixels: minutes on a CPU",
        "full": "the same from 224 to 2,048 pixels, reading and training: half a minute on an H100",
    },
    points=points,
    judge=judge,
    draw=draw,
    alone=True,
    setting=(
        "About 16,384 patches at a time, whatever the resolution: images at once times patches an image. bfloat16 on a GPU, as "
        "CUDA graphs, so that the host is not timed; attention is torch's fused kernel. Resolutions in turn, the fastest of "
        "three rounds of five calls. Parameters are equal through the MLPs."
    ),
)
