"""Draws the training curves of several runs into one picture; readable in grey, without a screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.files import replacing

# Black and grey, lines and marks all differ: any one of them is enough to tell two runs apart.
_STYLES = (
    {"color": "0.0", "linestyle": "-", "marker": "o"},
    {"color": "0.45", "linestyle": "--", "marker": "s"},
    {"color": "0.2", "linestyle": ":", "marker": "^"},
    {"color": "0.6", "linestyle": "-.", "marker": "D"},
)
_PANELS = (
    ("valid_loss", "validation loss (bits per token)"),
    ("id_loss", "divergence of the passes, id_loss (bits per token)"),
    ("id_alpha", "weight of the divergence, alpha' (no unit)"),
)


def points(rows: Sequence[dict[str, Any]], column: str) -> tuple[list[int], list[float]]:
    """Updates and values of one column, without the rows that have none.

    Args:
        rows: as `experiments.logs.read_curves` gives them.
        column: a key of the rows.
    Returns:
        Updates, and the values at them.
    """
    known = [row for row in rows if row.get(column) is not None]
    return [row["update"] for row in known], [row[column] for row in known]


def draw_curves(runs: dict[str, Sequence[dict[str, Any]]], out: Path) -> None:
    """Draw validation loss, divergence and alpha' against the number of updates.

    Args:
        runs: label of each run, and its rows as `experiments.logs.read_curves` gives them.
        out: the PNG file to write; it appears whole or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import; draws without a screen
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (column, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS):
        for number, (name, rows) in enumerate(runs.items()):
            updates, values = points(rows, column)
            if values:  # a plain run has no divergence
                style = _STYLES[number % len(_STYLES)]
                axes.plot(updates, values, label=name, markersize=4, linewidth=1.4, **style)
        axes.set_xlabel("updates")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid(color="0.88", linewidth=0.6)
        if axes.has_data():
            axes.legend(frameon=False)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
