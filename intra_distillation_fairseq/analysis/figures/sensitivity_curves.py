"""Figure 2: how far the most sensitive parameters are from the rest, in the course of a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from intra_distillation_fairseq.analysis import drawing
from intra_distillation_fairseq.analysis.labels import run_labels
from intra_distillation_fairseq.analysis.run_files import read_measurements, sensitivity_unit

# The parameters are ranked anew at each measurement: "top" is whichever are the most sensitive then.
_GROUPS = (("top_mean", "top 20%", {}), ("rest_mean", "other 80%", {"markerfacecolor": "1.0", "linewidth": 0.9}))


def draw_sensitivity_curves(runs: Sequence[Path], out: Path, labels: Sequence[str] | None = None) -> list[Path]:
    """Draw the mean sensitivity of the current top 20% and of the other 80% against updates (paper, Fig. 2).

    Args:
        runs: run folders with a sensitivity.jsonl.
        out: path without ending; gets .png and .pdf.
        labels: one for each run (default: see `labels.run_labels`).
    Returns:
        The files.
    Raises:
        UserError: a run has no measurements, or they were made in different ways.
        ImportError: matplotlib is not installed.
    """
    names, measured = run_labels(runs, labels), [read_measurements(run) for run in runs]
    unit = sensitivity_unit([(run, one["settings"]) for run, entries in zip(runs, measured) for one in entries])
    figure = drawing.new_figure(6.4, 4.6)
    axes = figure.subplots()
    for number, (name, entries) in enumerate(zip(names, measured)):
        for key, group, look in _GROUPS:
            values = [entry["summary"][key] for entry in entries]
            updates = [entry["update"] for entry in entries]
            axes.plot(updates, values, label=f"{name}, {group}", **{**drawing.style(number), **look})
    axes.set_yscale("log")
    drawing.finish(axes, "updates", f"mean sensitivity ({unit})", legend=False)
    drawing.legend_below(figure, axes)
    return drawing.save(figure, out)
