"""The picture of the README: one token fades, erases and writes a memory of two rows, in the numbers of the worked example.

palimpsest explain --picture docs/pictures
"""

from pathlib import Path

PAPER, INK, SOFT, LINE, ACCENT = "#fbfaf7", "#1d1c19", "#5f5b53", "#ddd8cd", "#0b6e69"
STOPS = ("#8a3d00", "#c96a16", "#edb877", "#f4efe6", "#8fbbe0", "#2f74b8", "#0c3d78")  # the page's own scale
BEATS = (
    ("start", r"$S_{t-1}$", ""),
    ("decay", r"$\mathrm{Diag}(\alpha_t)\,S_{t-1}$", r"each row fades: $\alpha$ = (1, ½)"),
    ("erase", r"$(I-\beta_t k_t k_t^\top)\;\cdots$", "what the key holds is wiped"),
    ("write", r"$\cdots\;+\;\beta_t k_t v_t^\top$", "the new value takes its place"),
)
ROWS = (("row 1", "k = 0"), ("row 2", "k = 1"))


def draw(folder: str | Path) -> list[Path]:
    """Writes palimpsest.svg and palimpsest.png.

    Args:
        folder: made if it does not exist.

    Returns:
        The two files.

    Raises:
        ValueError: the folder cannot be written.
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install palimpsest-kda[explain]") from error
    from matplotlib import rc_context, rcdefaults, rcParams

    from palimpsest.explainer.scenes import worked

    folder = Path(folder)
    scene = worked("walk")
    boards = [scene["start"], scene["decayed"][0], scene["erased"][0], scene["written"][0]]
    most = max(board.abs().max().item() for board in boards)
    colours = LinearSegmentedColormap.from_list("palimpsest", STOPS)
    with rc_context():  # whatever style the caller has set
        rcdefaults()
        rcParams.update({"svg.hashsalt": "palimpsest", "mathtext.fontset": "stix", "font.family": "DejaVu Sans"})
        figure = Figure(figsize=(11, 3.5), facecolor=PAPER)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 11), ylim=(0, 3.5), aspect="equal")
        axes.axis("off")
        for i, (board, (name, formula, says)) in enumerate(zip(boards, BEATS)):
            left = 0.95 + 2.65 * i
            for row, values in enumerate(board.tolist()):
                for column, value in enumerate(values):
                    shade = colours(0.5 + 0.5 * value / most)
                    x, y = left + 0.78 * column, 1.85 - 0.78 * row
                    corner = "round,pad=0,rounding_size=0.07"
                    axes.add_patch(FancyBboxPatch((x, y), 0.72, 0.72, boxstyle=corner, facecolor=shade, linewidth=0))
                    light = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] > 0.55
                    ink = INK if light else "#ffffff"
                    axes.text(x + 0.36, y + 0.35, f"{value:g}", color=ink, fontsize=17, ha="center", va="center")
            middle = left + 0.75
            axes.text(middle, 3.18, name, color=INK if i == 0 else ACCENT, fontsize=14, fontweight="bold", ha="center")
            axes.text(middle, 2.78, formula, color=INK, fontsize=14, ha="center")
            axes.text(middle, 0.72, says, color=SOFT, fontsize=10, ha="center")
            if i:
                arrow = FancyArrowPatch(
                    (left - 0.92, 1.82),
                    (left - 0.28, 1.82),
                    arrowstyle="-|>",
                    mutation_scale=14,
                    color=SOFT,
                    linewidth=1.4,
                )
                axes.add_patch(arrow)
        for row, words in enumerate(ROWS):
            for line, word in enumerate(words):
                axes.text(0.82, 2.3 - 0.78 * row - 0.2 * line, word, color=SOFT, fontsize=9.5, ha="right", va="center")
        axes.plot((0.35, 10.65), (0.48, 0.48), color=LINE, linewidth=1)
        law = r"$S_t=(I-\beta_t k_t k_t^\top)\,\mathrm{Diag}(\alpha_t)\,S_{t-1}+\beta_t k_t v_t^\top$"
        axes.text(0.35, 0.2, law, color=INK, fontsize=12, va="center")
        given = r"$k_t=(0,1),\;\; v_t=(5,5),\;\; \alpha_t=(1,\frac{1}{2}),\;\; \beta_t=1$"
        axes.text(10.65, 0.2, given, color=SOFT, fontsize=11, ha="right", va="center")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files = [folder / f"palimpsest.{kind}" for kind in ("svg", "png")]
            for file in files:
                metadata = {"Date": None} if file.suffix == ".svg" else None  # the same numbers give the same file
                figure.savefig(file, dpi=160, facecolor=PAPER, metadata=metadata)
        except OSError as error:
            raise ValueError(f"{str(folder)!r} cannot be written ({error.strerror}); give another folder") from error
    return files
