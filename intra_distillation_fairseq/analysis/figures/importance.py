"""How sensitive each layer is, in the course of a training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from intra_distillation_fairseq.analysis import drawing
from intra_distillation_fairseq.analysis.labels import run_labels
from intra_distillation_fairseq.analysis.run_files import read_measurements, sensitivity_unit

_SIDES = ("encoder", "decoder")


def draw_importance(runs: Sequence[Path], out: Path, labels: Sequence[str] | None = None) -> list[Path]:
    """Draw the mean sensitivity of each layer against updates, one row of panels (encoder, decoder) for each run.

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
    figure = drawing.new_figure(9.5, 0.6 + 3.4 * len(runs))
    # One scale for all panels: layers of both sides and of all runs can be compared.
    panels = figure.subplots(len(runs), len(_SIDES), squeeze=False, sharex=True, sharey=True)
    for row, name, entries in zip(panels, names, measured):
        for axes, side in zip(row, _SIDES):
            layer_name = re.compile(rf"{side}\.layers\.(\d+)\Z")
            layers = {int(match[1]): match[0] for key in entries[0]["layers"] if (match := layer_name.match(key))}
            for number in sorted(layers):
                values = [entry["layers"][layers[number]]["mean"] for entry in entries]
                updates = [entry["update"] for entry in entries]
                axes.plot(updates, values, label=f"layer {number + 1}", **drawing.style(number))
            axes.set_yscale("log")
            axes.set_title(f"{name}, {side}", fontsize=9)
            drawing.finish(axes, "updates", f"mean sensitivity of the layer\n({unit})")
            axes.label_outer()
    return drawing.save(figure, out)
