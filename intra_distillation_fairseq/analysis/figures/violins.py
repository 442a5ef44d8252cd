"""Figures 3, 5 and 9: how the sensitivities of a trained model are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from intra_distillation_fairseq.analysis import drawing
from intra_distillation_fairseq.analysis.balance import TRIM_ONE_IN
from intra_distillation_fairseq.analysis.labels import run_labels
from intra_distillation_fairseq.analysis.run_files import analysis_file, read_record, sensitivity_unit
from intra_distillation_fairseq.errors import UserError

TOP = f"top {1 / TRIM_ONE_IN:.0%}"  # of the sensitivities, which a violin leaves out (paper, App. B)
SAMPLE_ONE_IN = 10  # of the others, from which it is drawn
SEED = 1
_BESIDE = 0.36  # where the deviations stand, seen from the middle of a violin


def draw_violins(places: Sequence[Path], out: Path, labels: Sequence[str] | None = None) -> list[Path]:
    """Draw the distribution of the sensitivities, and their standard deviation on a second axis (paper, Fig. 3, 5, 9).

    Args:
        places: run folders, which stand for their analysis/sensitivity_best.npz, or files like that one.
        out: path without ending; gets .png and .pdf.
        labels: one for each (default: see `labels.run_labels`).
    Returns:
        The files.
    Raises:
        UserError: a file is missing or damaged, or they were measured in different ways.
        ImportError: matplotlib is not installed.
    """
    names, files = run_labels(places, labels), [_arrays(place) for place in places]
    records = [read_record(file.with_suffix(".json")) for file in files]
    unit = sensitivity_unit([(file, record["settings"]) for file, record in zip(files, records)])
    figure = drawing.new_figure(max(4.8, 2.2 + 1.4 * len(files)), 4.6)
    violins = figure.subplots()
    positions = list(range(len(files)))
    samples = [sample(read_arrays(file)) for file in files]
    bodies = violins.violinplot(samples, positions, widths=0.5, points=300, showextrema=False)
    for body in bodies["bodies"]:
        body.set(facecolor="0.85", edgecolor="0.3", alpha=1.0, linewidth=0.8)
    drawing.finish(violins, "", f"sensitivity, without the {TOP} ({unit})", whole_x=False)
    violins.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    violins.set_xticks(positions, names)
    violins.set_xlim(-0.5, len(files) - 0.25)
    _draw_deviations(violins.twinx(), [record["summary"] for record in records], unit)
    drawing.legend_below(figure, figure.axes[-1], entry_inches=2.4)
    return drawing.save(figure, out)


def read_arrays(file: Path) -> np.ndarray:
    """All sensitivities of a file, one behind the other (float32).

    Raises:
        UserError: it is damaged.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return np.concatenate([arrays[name].ravel() for name in arrays.files])
    except Exception as error:  # numpy, zipfile and zlib each have their own for a damaged archive
        raise UserError(f"'{file}' cannot be read ({error}): measure it again") from None


def sample(values: np.ndarray) -> np.ndarray:
    """What a violin is drawn from: a tenth, at random, of all but the most sensitive hundredth (paper, App. B).

    Args:
        values: sensitivities, (N,).
    Returns:
        Some of them; always the same ones.
    """
    kept = len(values) - len(values) // TRIM_ONE_IN
    rest = np.partition(values, kept - 1)[:kept]
    return np.random.default_rng(SEED).choice(rest, max(1, kept // SAMPLE_ONE_IN), replace=False)


def _arrays(place: Path) -> Path:
    if place.suffix == ".npz":
        if not place.is_file():
            raise UserError(f"'{place}' does not exist: make it with  intra-distillation sensitivity RUN_DIR")
        return place
    return analysis_file(place, "sensitivity_best.npz", "sensitivity")


def _draw_deviations(axes: Any, summaries: Sequence[dict[str, Any]], unit: str) -> None:
    """Logarithmic: a few outliers make the one deviation many times the other."""
    places = [number + _BESIDE for number in range(len(summaries))]
    for key, mark, face, label in (
        ("std", "o", "0.0", "deviation of all parameters"),
        ("std_trimmed", "s", "1.0", f"deviation without the {TOP}"),
    ):
        values = [summary[key] for summary in summaries]
        look = {"marker": mark, "linestyle": "none", "color": "0.0", "markerfacecolor": face, "markersize": 6}
        axes.plot(places, values, label=label, **look)
        for x, value in zip(places, values):
            axes.annotate(
                f"{value:.1e}", (x, value), xytext=(6, 0), textcoords="offset points", va="center", fontsize=7
            )
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_ylabel(f"standard deviation ({unit}),\nbefore (filled) and after (hollow) removing the {TOP}")
