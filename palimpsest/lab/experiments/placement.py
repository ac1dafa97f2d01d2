"""Where to put full attention: which layer, which two, and can a model find out by itself?"""

from collections.abc import Mapping, Sequence
from itertools import combinations

from palimpsest.lab.compare.comparison import draw_curves
from palimpsest.lab.compare.plots import FAINT, figure, style
from palimpsest.lab.compare.seed_statistics import Spread, contestants_table, diverged, grid
from palimpsest.lab.framework.experiment import Experiment, Record, Verdict
from palimpsest.lab.model_variants import ModelVariant, Size
from palimpsest.lab.placement.placed_training import placed
from palimpsest.lab.tasks import Needle, Text
from palimpsest.lab.training import Training

LEARNED, ROUTED = "learned layers", "routed tokens"


def pattern(layers: int, *attention: int) -> ModelVariant:
    """KDA with latent attention in these layers, from 0."""
    word = "".join("M" if i in attention else "K" for i in range(layers))
    return ModelVariant(word, word)


def points(scale: str) -> list[Training]:
    if scale == "tiny":
        size, seeds, pair_seeds, length = Size(layers=2, hidden_size=16, heads=1, head_dim=8, mlp=64), (0,), (), 200
        shared = {"steps": 2, "tokens_per_step": 400, "evaluate_every": 1, "test_batches": 1, "lr": 1e-3}
        task, tests = Needle(length=length), (Text(length=64),)
    elif scale == "small":
        size, seeds, pair_seeds, length = (
            Size(layers=4, hidden_size=64, heads=1, head_dim=64, mlp=128),
            (0, 1),
            (0,),
            256,
        )
        shared = {"steps": 1200, "tokens_per_step": 4096, "evaluate_every": 100, "test_batches": 4, "lr": 1e-3}
        task = Needle(length=length, needles=2, queries=2)
        tests = (Needle(length=2 * length, needles=2, queries=2), Text(length=128))
    else:
        size, length = Size(layers=6, hidden_size=128, heads=2, head_dim=64, mlp=256), 256
        seeds, pair_seeds = (0, 1, 2), ((0,) if scale == "map" else ())
        steps, tokens = (1200, 4096) if scale == "map" else (900, 8192)
        shared = {"steps": steps, "tokens_per_step": tokens, "evaluate_every": 100, "test_batches": 8, "lr": 1e-3}
        task = Needle(length=length, needles=2, queries=2)
        tests = (Needle(length=2 * length, needles=2, queries=2), Text(length=128))
    n = size.layers
    shared |= {"train": (task,), "tests": (task, *tests), "size": size, "stop_at": 2.0}
    made: list[Training] = []
    for seed in seeds:
        base = Training(who=pattern(n), seed=seed, **shared)  # type: ignore[arg-type]
        made += [base, *(Training(who=pattern(n, i), seed=seed, **shared) for i in range(n))]  # type: ignore[arg-type]
        made.append(placed(base, who=ModelVariant(LEARNED, "K"), choose="layers", budget=1.0))
        middle = pattern(n, n // 2).pattern
        budgets = (0.1,) if scale == "tiny" else (0.1, 0.3)
        made += [
            placed(base, who=ModelVariant(f"{ROUTED}, {b:.0%}", middle), choose="tokens", budget=b) for b in budgets
        ]
        if seed in pair_seeds:
            made += [Training(who=pattern(n, *two), seed=seed, **shared) for two in combinations(range(n), 2)]  # type: ignore[arg-type]
    return made


def found(records: Sequence[Record]) -> dict[str, dict[str, Spread]]:
    """contestant -> of its tests: needles found, those at twice the length, bits a byte; and the nats of the first."""
    by: dict[str, list[Record]] = {}
    for record in records:
        by.setdefault(record.label["contestant"], []).append(record)
    return {
        who: {
            "needle": Spread(tuple(r.rows[0]["accuracy"] for r in rs)),
            "exact": Spread(tuple(r.rows[0]["exact"] for r in rs)),
            "longer": Spread(tuple(r.rows[1]["accuracy"] for r in rs)),
            "bits": Spread(tuple(r.rows[-1]["bits"] for r in rs)),
        }
        for who, rs in by.items()
    }


def _fixed(scores: dict, count: int) -> dict[str, Spread]:
    """Patterns with so many attention layers -> needles found."""
    return {w: s["needle"] for w, s in scores.items() if set(w) <= {"K", "M"} and w.count("M") == count}


def searched(scores: dict[str, dict[str, Spread]]) -> tuple[list[str], int, list[str], int]:
    """A greedy search for two layers, replayed on the map: the best layer first, then the best beside it.

    Returns:
        What it chose (one layer, then two), after how many trainings; the best pair there is, after how many.
    """
    one, two = _fixed(scores, 1), _fixed(scores, 2)
    if not one or not two:
        return [], 0, [], 0
    first = max(one, key=lambda w: one[w].mean)
    beside = {w: s for w, s in two.items() if w[first.index("M")] == "M"}
    second = max(beside, key=lambda w: beside[w].mean)
    return [first, second], len(one) + len(beside), [max(two, key=lambda w: two[w].mean)], len(two)


def judge(records: Sequence[Record]) -> Verdict:
    scores = found(records)
    one, two = _fixed(scores, 1), _fixed(scores, 2)
    because, outcome = [], "undecided"
    none, order = None, []
    if one:
        order = sorted(one, key=lambda w: -one[w].mean)
        best, worst = order[0], order[-1]
        apart = "in every seed" if one[best].above(one[worst]) else "and the seeds overlap"
        because.append(
            f"One layer of attention: best {best} ({one[best].percent()} of the digits), worst {worst} "
            f"({one[worst].percent()}), {apart}."
        )
        none = scores.get("K" * len(best))
        if none:
            because.append(f"Without any: {none['needle'].percent()}.")
        paper = "K" * 3 + "M" + "K" * (len(best) - 4)
        if paper in one:
            because.append(
                f"The fourth layer, where 3:1 puts its first: {one[paper].percent()}, place {order.index(paper) + 1} of "
                f"{len(one)}."
            )
    chosen, cost, best_pair, all_cost = searched(scores)
    if chosen:
        because.append(
            f"Two layers: a greedy search ({cost} trainings) comes to {chosen[1]} ({two[chosen[1]].percent()}); the best of all "
            f"{all_cost} pairs is {best_pair[0]} ({two[best_pair[0]].percent()})."
        )
    learned = [r for r in records if r.label["contestant"] == LEARNED]
    picks = []
    for r in learned:
        shares = [value for name, value in sorted(r.rows[0].items()) if name.startswith("share_")]
        picks.append((1 + shares.index(max(shares)), max(shares)))
    if picks and one:
        names = [w for w in one if w.index("M") == picks[0][0] - 1]
        order = sorted(one, key=lambda w: -one[w].mean)
        ranks = [1 + [w.index("M") + 1 for w in order].index(layer) for layer, _ in picks]
        told = ", ".join(
            f"layer {layer} (share {share:.2f}, place {rank} of {len(one)} in the map)"
            for (layer, share), rank in zip(picks, ranks)
        )
        because.append(
            f"Learned with both mixers in every layer and a budget of one: {told}; together they find "
            f"{scores[LEARNED]['needle'].percent()}."
        )
        good = [rank <= max(len(one) // 3, 1) for rank in ranks]
        none = scores.get("K" * len(order[0]))
        apart = none is not None and one[order[0]].above(none["needle"])
        agree = len({layer for layer, _ in picks}) == 1
        if names and len(picks) > 1:
            outcome = "shown" if all(good) and agree else "not shown" if not any(good) else "undecided"
            outcome = outcome if apart else "undecided"  # no place is surely better than none: nothing to find out
    middle = "".join("M" if i == len(next(iter(one), "")) // 2 else "K" for i in range(len(next(iter(one), ""))))
    for who in [w for w in scores if w.startswith(ROUTED)]:
        kept = Spread(tuple(r.rows[0]["kept"] for r in records if r.label["contestant"] == who))
        whole = f" against {one[middle].percent()} of {middle} whole" if middle in one else ""
        idle = " Its attention stands idle: what it finds, its memories find." if kept.high < 0.01 else ""
        because.append(
            f"{who}: the latent layer keeps {kept.percent()} of the tokens, so its cache has so many of its bytes, and finds "
            f"{scores[who]['needle'].percent()}{whole}.{idle}"
        )
    if none and one and not one[order[0]].above(none["needle"]):
        because.append(
            "No place is surely better than none: whether a run leaves the plateau decides, and not the place."
        )
    return Verdict(outcome, because + diverged(records), (_table(scores, records), contestants_table(records)))


def _table(scores: dict[str, dict[str, Spread]], records: Sequence[Record]):
    cells = {}
    for who, s in sorted(scores.items(), key=lambda x: -x[1]["needle"].mean):
        cells[who, "digits right, %"] = s["needle"].percent()
        cells[who, "all 8 right, %"] = s["exact"].percent()
        cells[who, "digits at twice the length, %"] = s["longer"].percent()
        cells[who, "bits a byte of text"] = s["bits"].text(lambda x: f"{x:.3f}")
        kept = [r.rows[0]["kept"] for r in records if r.label["contestant"] == who and "kept" in r.rows[0]]
        cells[who, "tokens in a latent cache, %"] = (
            Spread(tuple(kept)).percent() if kept else "100" if "M" in who else "none"
        )
    return grid("Every placement, mean and range over seeds", cells, "layers")


def draw(records: Sequence[Record]):
    scores = found(records)
    one, two = _fixed(scores, 1), _fixed(scores, 2)
    n = len(next(iter(one), "KK"))
    fig, axes = figure(1, 3, width=4.2)
    x = [w.index("M") + 1 for w in one]
    for seed in range(max((len(s.values) for s in one.values()), default=0)):
        ys = [100 * s.values[seed] if seed < len(s.values) else float("nan") for s in one.values()]
        axes[0].plot(x, ys, "o", color="#333333", markersize=3)
    axes[0].bar(x, [100 * s.mean for s in one.values()], color="#0072B2", alpha=0.7)
    none = scores.get("K" * n)
    if none:
        axes[0].axhline(100 * none["needle"].mean, color=FAINT, linestyle=":")
    axes[0].set(
        xlabel="the layer of attention (dots: seeds)", ylabel="digits right, %", ylim=(0, 103), xticks=range(1, n + 1)
    )
    cells = [[float("nan")] * n for _ in range(n)]
    for w, s in two.items():
        a, b = (i for i, letter in enumerate(w) if letter == "M")
        cells[b][a] = 100 * s.mean
    for w, s in one.items():
        cells[w.index("M")][w.index("M")] = 100 * s.mean
    image = axes[1].imshow(cells, vmin=0, vmax=100, cmap="viridis")
    axes[1].set(xlabel="first layer of attention", ylabel="second (diagonal: the only one)")
    axes[1].set_xticks(range(n), range(1, n + 1))
    axes[1].set_yticks(range(n), range(1, n + 1))
    fig.colorbar(image, ax=axes[1], label="digits right, %", shrink=0.8)
    styles = style([str(r.label["seed"]) for r in records])
    for r in records:
        shares = [value for name, value in sorted(r.rows[0].items()) if name.startswith("share_")]
        if shares:
            seed = str(r.label["seed"])
            axes[2].plot(range(1, len(shares) + 1), shares, label=f"seed {seed}", **styles[seed])
    axes[2].set(xlabel="layer", ylabel="learned share of attention", ylim=(-0.03, 1.03), xticks=range(1, n + 1))
    if axes[2].get_lines():
        axes[2].legend(frameon=False, fontsize=8)
    names = [w for w in scores if not (set(w) <= {"K", "M"} and w.count("M") > 1)]
    shown = [r for r in records if r.label["contestant"] in names]
    figures = {"map": fig, "curves": draw_curves(shown, style(names))}
    kept = {r.label["contestant"]: r.result["kept_tokens"] for r in reversed(records) if "kept_tokens" in r.result}
    if kept:
        figures["kept"] = kept_text(kept)
    return figures


def kept_text(kept: Mapping[str, Sequence[Sequence[int]]], width: int = 88):
    """A test sequence for each router, what the attention keeps of it in black on yellow."""
    lines = max(-(-len(tokens) // width) for tokens, _ in kept.values())
    fig, axes = figure(len(kept), 1, width=10, height=0.5 + 0.28 * lines)
    for ax, (who, (tokens, marks)) in zip(axes, kept.items()):
        for i, (token, mark) in enumerate(zip(tokens, marks)):
            letter = chr(token) if 33 <= token < 127 else "\u00b7"
            how = {"color": "black", "backgroundcolor": "#ffe066"} if mark else {"color": "#888888"}
            ax.text(i % width, -(i // width), letter, family="monospace", fontsize=9, ha="center", va="center", **how)
        ax.set(xlim=(-1, width), ylim=(-lines + 0.4, 0.6))
        ax.set_axis_off()
        ax.set_title(who, fontsize=10, loc="left")
    return fig


EXPERIMENT = Experiment(
    name="placement",
    question="where does a hybrid need its attention, and can it find out by itself?",
    claim=(
        "Kimi Linear puts one layer of attention after every three of KDA, the same everywhere (arXiv:2510.26692); where the few "
        "should stand is not reported. Asked here: the layer matters, and a model that holds both mixers in every layer, with a "
        "gate and a budget of one, comes by itself to a place that is among the best third."
    ),
    scales={
        "tiny": "every part in seconds, on a CPU; proves nothing",
        "small": "4 layers of width 64, two needles in 256 bytes of text, 1,200 steps of 4,096 tokens, 2 seeds: an hour on a CPU",
        "full": "6 layers of width 128: attention in each of 6 layers, in none, learned, routed, 3 seeds; 900 steps of 8,192 "
        "tokens: a minute and a half on an H100 with --side-by-side 16",
        "map": "the same and all 15 pairs, one seed of them; 1,200 steps of 4,096 tokens: 2 minutes on an H100 with "
        "--side-by-side 25",
    },
    points=points,
    judge=judge,
    draw=draw,
    setting=(
        "Two needles (names with keys of four digits) hidden in 256 bytes of real text, both asked for; the text is learned "
        "too. All fixed placements have the parameters of KDA alone. A greedy search is replayed on the map, and costs the "
        "trainings it would have asked for. Learned: each layer is (1 - g) KDA + g attention, the gates are a softmax over "
        "layers times the budget, with a penalty on undecided ones; where it puts most is looked up in the map, as if it were "
        "pruned to that and trained anew. Routed: the attention of the middle layer keeps only tokens that a router chooses when "
        "they come; the choice is hard in training, with a price on more than the budget."
    ),
)
