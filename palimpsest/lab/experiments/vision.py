"""KDA sees: does a memory that scans an image see as well as attention, and how many ways must it read?"""

from collections.abc import Sequence

from palimpsest.lab.compare.comparison import best, draw_bars, results_table
from palimpsest.lab.compare.plots import figure, learning_curves, legend_below, style
from palimpsest.lab.compare.seed_statistics import Spread, by_luck, contestants_table, diverged, tuned
from palimpsest.lab.framework.experiment import Experiment, Record, Verdict
from palimpsest.lab.image_training import ImageTraining, Seer
from palimpsest.lab.images import Digits, NamedImages, Scenes
from palimpsest.models.vision import VisionConfig

MEMORIES = {"KDA": "kda", "GDN": "gated_delta", "GLA": "gated_linear_attention"}
WAYS = {"one way": "one", "both ways": "both", "four ways": "four"}


def seer(mixer: str, ways: str = "", positions: bool = False, **changes) -> Seer:
    name = f"{mixer}, {ways}" if ways else mixer
    scan = {"scan": WAYS[ways.removesuffix(" by turns")], "by_turns": ways.endswith("by turns")} if ways else {}
    places = {"positions": "learned"} if positions else {}
    kind = {"mixer": MEMORIES.get(mixer, "softmax")}
    return Seer(name + (", positions" if positions else ""), kind | scan | places | changes)


TURNS = "four ways by turns"
SCANS = [seer("KDA", ways) for ways in ("one way", "both ways by turns", TURNS, "both ways")]
OTHERS = [seer("GDN", TURNS), seer("GLA", TURNS), seer("softmax")]
PLACED = [seer("KDA", "one way", True), seer("KDA", TURNS, True), seer("softmax", "", True)]
WHO = [*SCANS, *OTHERS, *PLACED]


def points(scale: str) -> list[ImageTraining]:
    if scale == "tiny":
        base = VisionConfig(patch_size=4, hidden_size=16, num_layers=2, num_heads=4, head_dim=4, intermediate_size=64)
        shared = {"steps": 2, "evaluate_every": 1, "images_per_step": 6, "test_images": 6}
        settings = [(Scenes(size=16, cells=2), 1e-3, 0)]
        who = [SCANS[2], OTHERS[2]]
    elif scale == "digits":
        base = VisionConfig(patch_size=2, hidden_size=32, num_layers=2, num_heads=4, head_dim=8, intermediate_size=64)
        shared = {"steps": 300, "evaluate_every": 50, "images_per_step": 32, "test_images": 512}
        settings = [(Digits(size=16), 3e-3, seed) for seed in (0, 1, 2)]
        who = WHO
    elif scale == "scenes":
        base = VisionConfig(
            patch_size=4, hidden_size=128, num_layers=4, num_heads=2, head_dim=64, intermediate_size=384
        )
        shared = {"steps": 1000, "evaluate_every": 100, "images_per_step": 32, "test_images": 1536}
        settings = [(Scenes(size=48), lr, seed) for seed in (0, 1, 2) for lr in (1e-3, 3e-3, 3e-4)]
        who = WHO
    else:
        base = VisionConfig(
            patch_size=4, hidden_size=256, num_layers=8, num_heads=4, head_dim=64, intermediate_size=768
        )
        shared = {"steps": 20000, "evaluate_every": 1000, "images_per_step": 256, "test_images": 10000}
        settings = [(NamedImages(), lr, seed) for seed in (0, 1, 2) for lr in (5e-4, 1e-3)]
        who = WHO
    return [
        ImageTraining(
            who=w, task=task, base=base, lr=lr, seed=seed,
            pictures=3 if (lr, seed, w.name) == (settings[0][1], 0, f"KDA, {TURNS}") else 0, **shared,
        )  # type: ignore[arg-type]
        for task, lr, seed in settings
        for w in who
    ]  # fmt: skip


def _said(name: str, one: Spread, other_name: str, other: Spread) -> str:
    gap = 100 * (one.mean - other.mean)
    sure = "in every seed" if one.above(other) or other.above(one) else "and the seeds overlap"
    return f"{name} at {one.percent()} against {other_name} at {other.percent()} ({gap:+.1f} points, {sure})"


def judge(records: Sequence[Record]) -> Verdict:
    scores = best(records)
    tests = list(dict.fromkeys(test for test, _ in scores))
    because, outcome = [], "undecided"
    best_kda = f"KDA, {TURNS}"
    pairs = [(best_kda, other) for other in ("KDA, one way", "KDA, both ways by turns", "KDA, both ways")]
    pairs += [
        (best_kda, f"GDN, {TURNS}"),
        (best_kda, f"GLA, {TURNS}"),
        (best_kda, "softmax"),
        (best_kda, "softmax, positions"),
    ]
    pairs += [
        (f"{best_kda}, positions", best_kda),
        ("KDA, one way, positions", "KDA, one way"),
        ("softmax, positions", "softmax"),
    ]
    for test in tests[:1]:  # all images together; a kind is a slice of them
        for a, b in pairs:
            if (test, a) in scores and (test, b) in scores:
                because.append(_said(a, scores[test, a], b, scores[test, b]) + ".")
        four, one, attention = (scores.get((test, n)) for n in (best_kda, "KDA, one way", "softmax, positions"))
        if four and one and attention:
            good, bad = four.above(one) and four.above(attention), one.above(four) or attention.above(four)
            outcome = "shown" if good else "not shown" if bad else "undecided"
            because.append(f"In every seed: by luck {by_luck(len(four.values), len(one.values))} a comparison.")
    rates = {r.label["lr"] for r in records}
    if len(rates) == 1 and scores:
        because.append(f"All had one learning rate, {rates.pop():g}, at which KDA learns; others may want another.")
    for test in tests[1:]:
        order = sorted(((s.mean, who) for (t, who), s in scores.items() if t == test), reverse=True)
        if order:
            (high, first), (low, last) = order[0], order[-1]
            because.append(
                f"{test.rpartition(' ')[0]}: {first} is first ({100 * high:.1f} %), {last} last ({100 * low:.1f} %)."
            )
    return Verdict(outcome, because + diverged(records), (results_table(scores), contestants_table(records)))


def draw(records: Sequence[Record]):
    figures = draw_bars(records)
    figures["curves"] = curves(records)
    pictures = [r.result["pictures"] for r in records if r.result.get("pictures")]
    if pictures:
        figures["memory"] = memory_picture(pictures[0])
    return figures


def curves(records: Sequence[Record]):
    """Accuracy against steps; who has positions is dashed, in the colour of the same one without."""
    names = list(dict.fromkeys(r.label["contestant"] for r in records))
    plain = style([name.removesuffix(", positions") for name in names])
    styles = {
        n: plain[n.removesuffix(", positions")] | ({"linestyle": "--"} if "positions" in n else {}) for n in names
    }
    fig, (ax,) = figure(1, 1, width=9, height=5)
    best_rate = {who: lr for (who,), (_, lr) in tuned(records, ("contestant",)).items()}
    learning_curves(ax, [r for r in records if r.label["lr"] == best_rate[r.label["contestant"]]], styles)
    legend_below(fig, [ax])
    return fig


def memory_picture(pictures: Sequence[dict]):
    """Images in rows; beside each, a column a direction, what the last layer's memory still holds of every patch."""
    import numpy as np

    ways = list(pictures[0]["left"])
    fig, axes = figure(len(pictures), 1 + len(ways), width=1.9, height=1.9)
    for row, picture in enumerate(pictures):
        across = axes[row * (1 + len(ways)) : (row + 1) * (1 + len(ways))]
        image = np.array(picture["image"], np.uint8).transpose(1, 2, 0)
        across[0].imshow(image.repeat(3, 2) if image.shape[2] == 1 else image)
        for ax, way in zip(across[1:], ways):
            ax.imshow(np.array(picture["left"][way]), cmap="magma", vmin=0)
            if row == 0:
                ax.set_title(f"left, read by {way}", fontsize=8)
        for ax in across:
            ax.set_axis_off()
    return fig


EXPERIMENT = Experiment(
    name="vision",
    question="does a memory that scans an image see as well as attention, and how many ways must it read?",
    claim=(
        "Vision transformers with memories have been published for GLA (ViG, arXiv:2405.18425: 77.2 to 82.6 % on ImageNet-1K) "
        "and Mamba (Vim, arXiv:2401.09417), read in two directions and level with attention; of KDA or Gated DeltaNet no such "
        "table was found. Asked here: KDA read four ways is ahead of KDA read one way, and of attention with positions."
    ),
    scales={
        "tiny": "every part in seconds, on a CPU; proves nothing",
        "digits": "1,198 handwritten digits of 16 x 16 pixels, 2 layers of width 32, 300 steps, 3 seeds: minutes on a CPU",
        "scenes": "drawn scenes of 48 x 48 pixels (counting, relations, mazes), patches of 4, 4 layers of width 128, 32,000 "
        "images, three rates, 3 seeds: 3 minutes on an H100 with --side-by-side 30",
        "full": "CIFAR-10 by name, 8 layers of width 256, 5.1M images seen, two rates, 3 seeds: hours on an H100, and a network",
    },
    points=points,
    judge=judge,
    draw=draw,
    setting=(
        "Equal parameters through the MLPs (a table of positions, 3 %, comes on top), equal heads and channels, equal images. "
        "Directions share the heads; by turns, a layer has one direction and the next layer the next. The mean over patches is "
        "classified, so that reading one way costs no last word. Images are drawn anew every step; those of the test are others. "
        "All see equally many images: what is compared is how soon they see, not what they would come to. "
        "Chance is 16.7 % in counting, 25 % in relations, 50 % in mazes. Of three images the picture shows what is left, at the "
        "end, of the write of each patch in the last layer's memories."
    ),
)
