"""Draws the training curves of several runs into one picture; readable in grey, without a screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.analysis import drawing

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
    figure = drawing.new_figure(13, 4.2)
    for axes, (column, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS):
        for number, (name, rows) in enumerate(runs.items()):
            updates, values = points(rows, column)
            if values:  # a plain run has no divergence
                axes.plot(updates, values, label=name, **drawing.style(number))
        drawing.finish(axes, "updates", label)
    drawing.write_figure(figure, out)
