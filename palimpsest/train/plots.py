"""The loss curve of a run, from its metrics, as PNG and SVG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INK, BLUE, ORANGE = "#333333", "#0072B2", "#D55E00"  # distinguishable without colour vision


def draw_loss_curve(records: Sequence[Mapping[str, Any]], baselines: Mapping[str, float], folder: Path) -> list[Path]:
    """Draws training and held-out bits per byte against tokens into folder/loss.png and folder/loss.svg.

    Args:
        records: lines of metrics.jsonl.
        baselines: names and bits per byte of horizontal lines to compare with.
        folder: where the two files go.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the loss curve needs matplotlib: pip install palimpsest-kda[train]") from error
    train = [(r["tokens"] / 1e6, r["bits_per_byte"]) for r in records if r.get("event") == "train"]
    train = [(x, y) for x, y in train if y is not None]  # steps that were skipped
    heldout = [(r["tokens"] / 1e6, r["heldout_bits_per_byte"]) for r in records if r.get("event") == "evaluate"]
    heldout = [(x, y) for x, y in heldout if y is not None]  # evaluations that were not finite
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        x, y = zip(*train)
        axes.plot(x, y, color=BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(x, _smooth(y, max(len(y) // 40, 1)), color=BLUE, linewidth=1.6, label="training")
    if heldout:
        axes.plot(*zip(*heldout), color=ORANGE, marker="o", markersize=4, linewidth=1.6, label="held out")
        axes.annotate(
            f"{heldout[-1][1]:.2f}", heldout[-1], textcoords="offset points", xytext=(0, 8), ha="right", color=ORANGE
        )
    for name, bits in baselines.items():
        axes.axhline(bits, color=INK, linewidth=0.8, linestyle=":")
        axes.text(1.01, bits, f"{name} {bits:.2f}", transform=axes.get_yaxis_transform(), va="center", color=INK)
    levels = [y for _, y in heldout] + list(baselines.values()) or [y for _, y in train] or [8.0]
    axes.set_ylim(0, min(max(levels), 1e6) + 1.0)  # a run may diverge beyond what a plot can hold
    axes.set(xlabel="tokens, millions", ylabel="bits per byte")
    axes.spines[["top", "right"]].set_visible(False)
    if train or heldout:
        axes.legend(frameon=False, loc="upper center")
    files = [folder / f"loss.{kind}" for kind in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=160)
    return files


def _smooth(values: Sequence[float], span: int) -> list[float]:
    return [sum(part) / len(part) for part in (values[max(0, i - span) : i + span + 1] for i in range(len(values)))]
