"""Figure 7: the validation loss in the course of a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from intra_distillation_fairseq.analysis import drawing
from intra_distillation_fairseq.analysis.curves import points
from intra_distillation_fairseq.analysis.labels import run_labels
from intra_distillation_fairseq.analysis.run_files import check_folder
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.logs import read_curves


def draw_validation(runs: Sequence[Path], out: Path, labels: Sequence[str] | None = None) -> list[Path]:
    """Draw the validation loss of runs against updates (paper, Fig. 7), from RUN/train.log.

    Args:
        runs: run folders.
        out: path without ending; gets .png and .pdf.
        labels: one for each run (default: see `labels.run_labels`).
    Returns:
        The files.
    Raises:
        UserError: a run was not validated yet.
        ImportError: matplotlib is not installed.
    """
    names, curves = run_labels(runs, labels), [_curve(run) for run in runs]
    figure = drawing.new_figure(6.4, 4.6)
    axes = figure.subplots()
    for number, (name, (updates, losses)) in enumerate(zip(names, curves)):
        axes.plot(updates, losses, label=f"{name} (best {min(losses):.3f})", **drawing.style(number))
    drawing.finish(axes, "updates", "validation loss (bits per token)")
    return drawing.save(figure, out)


def _curve(run: Path) -> tuple[list[int], list[float]]:
    check_folder(run)
    updates, losses = points(read_curves(run / "train.log"), "valid_loss")
    if not losses:
        raise UserError(
            f"'{run / 'train.log'}' does not exist or has no validation yet: train the run with scripts/train.sh"
        )
    return updates, losses
