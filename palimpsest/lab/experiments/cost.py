"""The cost: time and memory against the length of the context, flat for a memory and growing for a scroll."""

from collections.abc import Sequence

from palimpsest.lab.compare.plots import FAINT, figure, legend_below, style
from palimpsest.lab.compare.seed_statistics import grid
from palimpsest.lab.framework.experiment import Experiment, Record, Verdict
from palimpsest.lab.measure.context_cost import LARGE, SMALL, Cache, Decode, Prefill, Shape


def points(scale: str) -> list:
    powers = lambda low, high, by=2: tuple(1 << n for n in range(low, high + 1, by))
    if scale == "tiny":
        shape = Shape(hidden_size=16, heads=1, head_dim=8, latent=8, positions=4)
        return [
            *(Decode(layer=name, shape=shape, contexts=(64, 256), rounds=1, steps=2) for name in ("kda", "mla", "KM")),
            *(
                Prefill(layer=name, shape=shape, contexts=(32, 64), rounds=1)
                for name in ("kda", "softmax", "KM", "op kda", "op dplr")
            ),
            *(Cache(pattern=pattern, shape=shape, contexts=(1 << 16,)) for pattern in ("KKKM", "MMMM")),
        ]
    caches = [Cache(pattern=pattern, shape=LARGE, contexts=powers(12, 20)) for pattern in ("KKKM", "MMMM")]
    if scale == "small":
        decode = [
            Decode(layer=name, contexts=powers(10, 18 if name in ("kda", "gdn", "mla") else 16), rounds=15)
            for name in ("kda", "gdn", "mla", "softmax", "KKKM", "MMMM")
        ]
        prefill = [
            Prefill(layer=name, contexts=(512, 1024, 2048, 4096, 8192)) for name in ("kda", "gdn", "mla", "softmax")
        ]
        ops = [
            Prefill(layer=name, contexts=(512, 1024, 2048, 4096), backend="chunked") for name in ("op kda", "op dplr")
        ]
        return [*decode, *prefill, *ops, *caches]
    decode = [
        Decode(
            layer=name,
            shape=shape,
            contexts=powers(12, 20),
            rounds=40 if name in ("kda", "gdn") else 10,
            steps=50,
        )
        for shape in (SMALL, LARGE)
        for name in ("kda", "gdn", "mla", "softmax", *(("KKKM", "MMMM") if shape is SMALL else ()))
    ]
    prefill = [
        Prefill(layer=name, shape=shape, contexts=powers(12, 20 if name in ("kda", "gdn") or shape is SMALL else 18))
        for shape in (SMALL, LARGE)
        for name in ("kda", "gdn", "mla", "softmax")
    ]
    prefill += [Prefill(layer=name, contexts=powers(12, 18)) for name in ("KKKM", "MMMM")]
    ops = [Prefill(layer=name, shape=LARGE, contexts=powers(12, 16)) for name in ("op kda", "op dplr")]
    return [*decode, *prefill, *ops, *caches]


def judge(records: Sequence[Record]) -> Verdict:
    because, tables, good, bad = [], [], 0, 0
    decode = _times(records, "decode")
    for (layer, hidden), by in decode.items():
        first, last = min(by), max(by)
        ratio = by[last] / by[first]
        flat = max(abs(x / by[first] - 1) for x in by.values())
        if layer in ("kda", "gdn"):
            because.append(
                f"Decoding with a {layer} layer of width {hidden} takes {by[last]:.3g} ms a token at {last:,} tokens, within "
                f"{flat:.1%} of {first:,} over all contexts."
            )
            good, bad = good + (flat <= 0.05), bad + (flat > 0.05)
        else:
            because.append(f"{layer} of width {hidden} grows {ratio:.2g}-fold from {first:,} to {last:,}.")
    caches = {
        r.label["layer"]: {row["context"]: row["state_bytes"] for row in r.rows}
        for r in records
        if r.label["what"] == "cache"
    }
    if {"KKKM", "MMMM"} <= set(caches):
        longest = max(set(caches["KKKM"]) & set(caches["MMMM"]))
        saving = 1 - caches["KKKM"][longest] / caches["MMMM"][longest]
        because.append(
            f"At {longest:,} tokens KKKM holds {saving:.2%} less than MMMM, in the released model's layer shapes."
        )
        good, bad = good + (abs(saving - 0.75) <= 0.01), bad + (abs(saving - 0.75) > 0.01)
    ops = _times(records, "prefill")
    for (_, hidden), by in ((k, v) for k, v in ops.items() if k[0] == "op kda"):
        general = ops.get(("op dplr", hidden), {})
        longest = max(set(by) & set(general), default=None)
        if longest:
            factor = general[longest] / by[longest]
            because.append(f"At {longest:,} tokens the general transition (DPLR) takes {factor:.2f} times KDA's time.")
    for what in ("decode", "prefill"):
        times = _times(records, what)
        cells = {
            (f"{layer}, width {hidden}", f"{c:,}"): f"{ms:.3g}"
            for (layer, hidden), by in times.items()
            for c, ms in by.items()
        }
        if cells:
            tables.append(
                grid(
                    f"{what}: milliseconds {'a token' if what == 'decode' else 'a prompt'}, against the context",
                    cells,
                    "",
                )
            )
    for column, unit, words in (
        ("state_bytes", 2**20, "MiB of a sequence's state: memories in float32, the rest as the machine computes"),
        ("peak_bytes", 2**30, "GiB at most while a prompt is read, weights and prompt included"),
    ):
        rows = [(row["context"], r.label, row[column]) for r in records for row in r.rows if column in row]
        cells = {
            (f"{label['layer']}, width {label['hidden_size']}", f"{context:,}"): _digits(value / unit)
            for context, label, value in sorted(rows, key=lambda row: row[0])
        }
        if cells:
            tables.append(grid(words, cells, ""))
    outcome = "shown" if good and not bad else "not shown" if bad and not good else "undecided"
    return Verdict(outcome, because, tables)


def _digits(x: float) -> str:
    """Three of them, or all before the point.

    >>> _digits(0.13412), _digits(4608.2)
    ('0.134', '4,608')
    """
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def _times(records: Sequence[Record], what: str) -> dict[tuple[str, int], dict[int, float]]:
    """(layer, hidden size) -> context -> milliseconds."""
    return {
        (r.label["layer"], r.label["hidden_size"]): {row["context"]: row["milliseconds"] for row in r.rows}
        for r in records
        if r.label["what"] == what
    }


def draw(records: Sequence[Record]):
    from matplotlib.ticker import FuncFormatter

    panels = [
        (what, hidden) for what in ("decode", "prefill") for hidden in sorted({r.label["hidden_size"] for r in records})
    ]
    panels = [(what, hidden) for what, hidden in panels if any(h == hidden for _, h in _times(records, what))]
    caches = [r for r in records if r.label["what"] == "cache"]
    count = len(panels) + bool(caches)
    columns = min(count, 3)
    fig, axes = figure(-(-count // columns), columns)
    styles = style([r.label["layer"] for r in records])
    for ax, (what, hidden) in zip(axes, panels):
        for (layer, width), by in _times(records, what).items():
            if width == hidden:
                ax.plot(list(by), list(by.values()), label=layer, **styles[layer])
        ax.set(xscale="log", yscale="log", ylabel="milliseconds " + ("a token" if what == "decode" else "a prompt"))
        ax.set_title(f"{what}, width {hidden}", fontsize=10)
    if caches:
        ax = axes[len(panels)]
        for r in caches:
            ax.plot(
                *zip(*((row["context"], row["state_bytes"] / 2**20) for row in r.rows)),
                label=r.label["layer"],
                **styles[r.label["layer"]],
            )
        ax.set(xscale="log", yscale="log", ylabel="MiB of state")
        ax.set_title("state, the released model's shapes", fontsize=10)
    for ax in axes[:count]:
        ax.set_xlabel("tokens of context")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(int(x))))
        ticks = sorted({x for line in ax.get_lines() for x in line.get_xdata()})
        ax.set_xticks(ticks[:: max(len(ticks) // 5, 1)])
        ax.minorticks_off()
        ax.grid(axis="y", color=FAINT, alpha=0.25)
    for ax in axes[count:]:
        ax.set_visible(False)
    legend_below(fig, axes)
    return {"cost": fig}


def _short(tokens: int) -> str:
    """As on an axis.

    >>> _short(64), _short(4096), _short(1 << 20)
    ('64', '4K', '1M')
    """
    for unit, word in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit:
            return f"{tokens / unit:g}{word}"
    return str(tokens)


EXPERIMENT = Experiment(
    name="cost",
    question="what does a longer context cost, in time and in memory?",
    claim=(
        "Decoding at 1M tokens takes 1.84 ms a token instead of 11.48 (6.3 times faster), the prompt 2.9 times less, the cache "
        "75 % less; KDA's operation is about twice as fast as the general DPLR (arXiv:2510.26692, Figures 1 and 2)."
    ),
    scales={
        "tiny": "every part in seconds, on a CPU; proves nothing",
        "small": "layers of width 256, decoding to 262,144 tokens, prompts to 8,192: minutes on a CPU",
        "full": "layers of width 256 and of the released model, decoding and prompts to 1,048,576 tokens (prompts of attention "
        "in the large shape to 262,144): 6 minutes on an H200",
    },
    points=points,
    alone=True,
    judge=judge,
    draw=draw,
    setting=(
        "Contexts are measured in turn and the fastest round counts. States are filled with random numbers instead of by reading "
        "so many tokens: time does not depend on values. A memory layer reads a long prompt in pieces of 131,072 tokens. One "
        "sequence at a time; bfloat16 on a GPU, float32 on a CPU."
    ),
)
