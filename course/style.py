"""How the figures of the course look: calm, large enough to read, safe for colour-blind eyes."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

INK, MUTED, PAPER = "#1f2328", "#6b7280", "#ffffff"
BLUE, ORANGE, TEAL, GREY = "#0b5cad", "#c2570c", "#0f766e", "#9ca3af"
SIGNED = LinearSegmentedColormap.from_list(
    "signed", [ORANGE, "#f6c79b", PAPER, "#9cc3e8", BLUE]
)  # minus, nothing, plus

plt.rcParams.update(
    {
        "figure.figsize": (7.2, 3.2),
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, TEAL, GREY]),
        "legend.frameon": False,
        "lines.linewidth": 2,
    }
)


def board(ax: Axes, S, title: str = "", limit: float | None = None, digits: int | None = 0) -> None:
    """Draw a memory as a board: rows are key channels, columns value channels, each number in its cell."""
    rows = [[float(x) for x in row] for row in S]
    limit = limit or max(abs(x) for row in rows for x in row) or 1.0
    ax.imshow(rows, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="equal")
    ax.set(xticks=[], yticks=[], title=title)
    ax.spines[:].set_visible(False)
    ax.set_xticks([x - 0.5 for x in range(1, len(rows[0]))], minor=True)
    ax.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
    ax.grid(which="minor", color=PAPER, linewidth=3)
    ax.tick_params(which="minor", length=0)
    if digits is not None:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                colour = PAPER if abs(value) > 0.62 * limit else INK
                ax.text(x, y, f"{value:.{digits}f}", ha="center", va="center", color=colour)
