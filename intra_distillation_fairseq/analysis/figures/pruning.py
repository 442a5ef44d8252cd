"""Figures 6 and 10: what is left of a model without its least sensitive parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.analysis import drawing
from intra_distillation_fairseq.analysis.labels import run_labels
from intra_distillation_fairseq.analysis.run_files import analysis_file, check_alike, read_record

# The order that the figure is about, and the controls beside it.
_ORDERS = {"sensitivity": "least sensitive first", "magnitude": "smallest first", "random": "at random"}
_CONTROLS = {
    "magnitude": {"linestyle": (0, (1, 2)), "color": "0.5"},
    "random": {"linestyle": (0, (6, 3)), "color": "0.7"},
}


def draw_pruning(runs: Sequence[Path], out: Path, labels: Sequence[str] | None = None) -> list[Path]:
    """Draw BLEU, and its change, against the share of pruned parameters (paper, Fig. 6), from analysis/pruning.json.

    Args:
        runs: run folders.
        out: path without ending; gets .png and .pdf.
        labels: one for each run (default: see `labels.run_labels`).
    Returns:
        The files.
    Raises:
        UserError: a file is missing (names it and the command that makes it), or runs are not comparable.
        ImportError: matplotlib is not installed.
    """
    names = run_labels(runs, labels)
    records = [read_record(analysis_file(run, "pruning.json", "prune")) for run in runs]
    check_alike(runs, [_facts(record) for record in records])
    figure = drawing.new_figure(9.5, 4.2)
    scores, changes = figure.subplots(1, 2)
    for number, (name, record) in enumerate(zip(names, records)):
        for order, curve in curves(record["points"]).items():
            look = {**drawing.style(number), **_CONTROLS.get(order, {})}
            if order in _CONTROLS:
                look |= {"linewidth": 1.0, "markerfacecolor": "1.0", "zorder": 1.5}
            shares, bleu = [100 * ratio for ratio, _ in curve], [score for _, score in curve]
            scores.plot(shares, bleu, label=f"{name}, {_ORDERS.get(order, order)}", **look)
            if shares[0] == 0:
                changes.plot(shares, [score - bleu[0] for score in bleu], **look)
    drawing.finish(scores, "pruned share of the prunable parameters (%)", "BLEU", legend=False)
    drawing.finish(changes, "pruned share of the prunable parameters (%)", "change in BLEU", legend=False)
    if not changes.has_data():
        changes.text(0.5, 0.5, "no score of an unpruned model", ha="center", transform=changes.transAxes)
    drawing.legend_below(figure, scores, entry_inches=3.0)
    return drawing.save(figure, out)


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    """What scores of two models must have in common."""
    evaluation = {f"--{name}": value for name, value in (record.get("evaluation") or {}).items()}
    return {"the sha256 of the data's manifest": str(record.get("data_digest"))[:12], **evaluation}


def curves(points: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(ratio, BLEU) by ascending ratio for each order, that of the sensitivity first.

    With nothing pruned the order does not matter: the score at ratio 0 begins every curve, whichever order it was
    taken in.
    """
    intact = {(0.0, point["bleu"]) for point in points if point["ratio"] == 0}
    found = {point["order"] for point in points}
    known = [order for order in _ORDERS if order in found] + sorted(found - set(_ORDERS))
    return {
        order: sorted(
            {(point["ratio"], point["bleu"]) for point in points if point["order"] == order and point["ratio"]}
            | set(sorted(intact)[:1])
        )
        for order in known
    }
