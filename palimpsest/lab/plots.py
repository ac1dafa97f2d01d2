"""Plots as PNG and SVG, alike in all experiments: a colour and a marker belong to a contestant, a band to the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palimpsest.lab.experiment import Record

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
    found = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = found.subplots(rows, columns, squeeze=False).flatten().tolist()
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return found, axes


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


def legend_below(found: Any, axes: Sequence[Any]) -> None:
    """One legend for all axes, under the figure."""
    seen = dict(pair[::-1] for each in axes for pair in zip(*each.get_legend_handles_labels()))
    if seen:
        found.legend(seen.values(), seen, loc="outside lower center", ncols=min(len(seen), 6), frameon=False)


def save(figures: Mapping[str, Any], folder: Path) -> list[str]:
    """Writes NAME.png and NAME.svg; returns the names."""
    for name, each in figures.items():
        for kind in ("png", "svg"):
            each.savefig(folder / f"{name}.{kind}", dpi=140, metadata={"Date": None} if kind == "svg" else None)
    return list(figures)
