"""Score and speed of a model cut to its first layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.analysis import drawing
from intra_distillation_fairseq.analysis.labels import run_labels
from intra_distillation_fairseq.analysis.run_files import analysis_file, check_alike, read_record


def draw_layers(runs: Sequence[Path], out: Path, labels: Sequence[str] | None = None) -> list[Path]:
    """Draw BLEU, and translation speed on a second axis, against the number of layers, from RUN/analysis/layers.json.

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
    records = [read_record(analysis_file(run, "layers.json", "layers")) for run in runs]
    check_alike(runs, [_facts(record) for record in records])
    figure = drawing.new_figure(6.4, 4.6)
    scores = figure.subplots()
    speeds = scores.twinx()
    for number, (name, record) in enumerate(zip(names, records)):
        points = sorted(record["points"], key=lambda point: point["layers"])
        layers, look = [point["layers"] for point in points], drawing.style(number)
        scores.plot(layers, [point["bleu"] for point in points], label=f"{name}, BLEU", **look)
        # Models of one size are equally fast: marks of decreasing size show all curves that lie upon each other.
        size = 4 + 2 * (len(runs) - 1 - number)
        look |= {"color": drawing.LIGHT, "linewidth": 1.0, "markerfacecolor": "none", "markersize": size}
        speeds.plot(layers, [point["tokens_per_second"] for point in points], label=f"{name}, speed", **look)
    drawing.finish(scores, "layers of the encoder and of the decoder", "BLEU", legend=False)
    scores.set_xticks(sorted({point["layers"] for record in records for point in record["points"]}))
    speeds.set_ylabel("translation speed (target tokens per second)")
    # The scores are what the figure is about: their lines lie above those of the speed.
    scores.set_zorder(speeds.get_zorder() + 1)
    scores.patch.set_visible(False)
    drawing.legend_below(figure, scores, speeds)
    return drawing.save(figure, out)


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    """What scores and speeds of two models must have in common."""
    inputs = record.get("inputs") or {}
    return {
        "the sha256 of the test set": " ".join(digest[:12] for digest in inputs.get("test") or ()),
        **{f"--{name}": value for name, value in (inputs.get("evaluation") or {}).items()},
        **{name: inputs.get(name) for name in ("device", "processor", "OMP_NUM_THREADS")},
    }
