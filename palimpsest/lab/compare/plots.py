"""Plots as PNG, alike in all experiments: a colour and a marker belong to a contestant, a band to the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palimpsest.lab.framework.experiment import Record

INK, FAINT = "#333333", "#999999"
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8A6D3B",
    "#333333",
)  # Okabe and Ito's, nearly
MARKERS = "osD^vP*X"


def figure(rows: int = 1, columns: int = 1, *, width: float = 4.4, height: float = 3.4) -> tuple[Any, list[Any]]:
    """A figure and its axes in reading order."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the lab's plots need matplotlib: pip install palimpsest-kda[train]") from error
    fig = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False).flatten().tolist()
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return fig, axes


def style(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """name -> the arguments of plot that tell it from the others."""
    order = list(dict.fromkeys(names))
    return {
        name: {
            "color": PALETTE[i % len(PALETTE)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4,
            "linewidth": 1.6,
        }
        for i, name in enumerate(order)
    }


def band(axes: Any, x: Sequence[float], ys: Sequence[Sequence[float]], name: str, how: Mapping[str, Any]) -> None:
    """The mean of several seeds' ys over x, and between the lowest and the highest a band."""
    columns = list(zip(*ys))
    axes.plot(x, [sum(c) / len(c) for c in columns], label=name, **how)
    if len(ys) > 1:
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(x, low, high, color=how["color"], alpha=0.15, linewidth=0)


def learning_curves(axes: Any, records: Sequence[Record], styles: Mapping[str, Any], metric: str = "accuracy") -> None:
    """Accuracy (or another column of the curve) against steps, a line a contestant; a run that ended early keeps its value."""
    scale = 100 if metric in ("accuracy", "exact") else 1
    by: dict[str, list[list[dict[str, Any]]]] = {}
    for record in records:
        by.setdefault(record.label["contestant"], []).append(record.result["curve"])
    for name, curves in by.items():
        steps = sorted({point["step"] for curve in curves for point in curve})
        ys = []
        for curve in curves:
            known = {p["step"]: p[metric] for p in curve}
            value, y = curve[0][metric], []
            for step in steps:
                value = known.get(step, value)
                y.append(scale * value)
            ys.append(y)
        band(axes, steps, ys, name, {**styles[name], "markevery": max(len(steps) // 8, 1)})
    axes.set_xlabel("steps")
    if scale == 100:
        axes.set_ylim(-3, 103)
        axes.set_ylabel("accuracy, %")


def sliced(axes: Any, records: Sequence[Record], styles: Mapping[str, Any], name: str, test: int = 0) -> None:
    """Accuracy against a slice of a test, such as "gap", from 8 on by powers of two; over all seeds, a line a contestant."""
    by: dict[str, dict[int, list[float]]] = {}
    for record in records:
        for text, (accuracy, count) in record.result["slices"][test].get(name, {}).items():
            value = int(text) if int(text) < 8 else 1 << (int(text).bit_length() - 1)
            sums = by.setdefault(record.label["contestant"], {}).setdefault(value, [0.0, 0.0])
            sums[0], sums[1] = sums[0] + accuracy * count, sums[1] + count
    for who, values in by.items():
        x = sorted(values)
        axes.plot(x, [100 * values[v][0] / values[v][1] for v in x], label=who, **styles[who])
    ticks = sorted({v for values in by.values() for v in values if v & (v - 1) == 0})
    axes.set(xlabel=name, ylabel="accuracy, %", ylim=(-3, 103), xscale="symlog" if 0 in ticks else "log")
    axes.set_xticks(ticks, [str(v) for v in ticks])
    axes.minorticks_off()


def needle_map(records: Sequence[Record]) -> Any:
    """Digits found, by the depth of the needle and the length of the text: a panel a contestant, the mean over seeds."""
    cells: dict[str, dict[tuple[int, int], list[float]]] = {}
    for record in records:
        for row, slices in zip(record.rows, record.result["slices"]):
            for depth, (accuracy, _) in slices.get("depth", {}).items() if row["test_task"] == "needle" else ():
                cells.setdefault(row["contestant"], {}).setdefault((row["test_length"], int(depth)), []).append(
                    accuracy
                )
    fig, axes = figure(1, max(len(cells), 1), width=2.6, height=3.0)
    image = None
    for ax, (who, by) in zip(axes, cells.items()):
        lengths = sorted({length for length, _ in by})
        mean = lambda values: 100 * sum(values) / len(values) if values else float("nan")  # not asked there: left white
        grid = [[mean(by.get((length, depth))) for length in lengths] for depth in range(11)]
        image = ax.imshow(grid, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7)
        ax.set_yticks(range(0, 11, 5), ["start", "middle", "end"], fontsize=7)
        ax.set_title(who, fontsize=9)
        ax.set_xlabel("length", fontsize=8)
    if image is not None:
        fig.colorbar(image, ax=axes, label="digits right, %", shrink=0.8)
    return fig


def legend_below(fig: Any, axes: Sequence[Any]) -> None:
    """One legend for all axes, under the figure."""
    seen = dict(pair[::-1] for each in axes for pair in zip(*each.get_legend_handles_labels()))
    if seen:
        widest = 0.5 + 0.07 * max(map(len, seen))  # inches of an entry, about
        columns = max(min(len(seen), 6, int(fig.get_figwidth() / widest)), 1)
        fig.legend(seen.values(), seen, loc="outside lower center", ncols=columns, frameon=False)


def save(figures: Mapping[str, Any], folder: Path) -> list[str]:
    """Writes NAME.png; returns the names."""
    for name, each in figures.items():
        each.savefig(folder / f"{name}.png", dpi=140)
    return list(figures)
