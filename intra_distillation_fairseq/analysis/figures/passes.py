"""Figure 8: the score against the number of passes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from intra_distillation_fairseq.analysis import drawing
from intra_distillation_fairseq.analysis.run_files import check_folder
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.method_settings import num_passes, without_option
from intra_distillation_fairseq.experiments.runs import RunFolder


class _Scored(NamedTuple):
    """A run that was trained and evaluated."""

    folder: Path
    settings: dict[str, Any]
    passes: int
    bleu: float


def draw_passes(runs: Sequence[Path], out: Path) -> list[Path]:
    """Draw BLEU of the best checkpoint against K (paper, Fig. 8); K = 1 is a run without intra-distillation.

    Runs that differ in nothing but their seed are one point, their mean, with a whisker of one sample standard
    deviation.

    Args:
        runs: run folders, trained and evaluated.
        out: path without ending; gets .png and .pdf.
    Returns:
        The files.
    Raises:
        UserError: a run was not evaluated, or the runs differ in more than the number of passes and the seed.
        ImportError: matplotlib is not installed.
    """
    scores = scores_by_passes(runs)
    means = [statistics.mean(scores[number]) for number in scores]
    deviations = [statistics.stdev(one) if len(one) > 1 else 0.0 for one in scores.values()]
    figure = drawing.new_figure(6.4, 4.2)
    axes = figure.subplots()
    axes.plot(list(scores), means, **drawing.style(0))
    if any(deviations):
        axes.errorbar(list(scores), means, deviations, fmt="none", ecolor="0.35", elinewidth=1.0, capsize=3)
    for place, (x, mean, deviation) in enumerate(zip(scores, means, deviations)):
        spread = f" ± {deviation:.2f}" if deviation else ""
        up, look = _label_place(means, place)
        axes.annotate(f"{mean:.2f}{spread}", (x, mean + up * deviation), fontsize=8, **look)
    axes.margins(x=0.1, y=0.15)
    plain = " (1: without intra-distillation)" if 1 in scores else ""
    drawing.finish(axes, f"number of passes K{plain}", "BLEU")
    axes.set_xticks(list(scores))
    return drawing.save(figure, out)


def scores_by_passes(runs: Sequence[Path]) -> dict[int, list[float]]:
    """BLEU of all seeds for each K, K ascending.

    Raises:
        UserError: as of `draw_passes`.
    """
    scored = sorted((_read(run) for run in runs), key=lambda one: one.passes)
    _check_alike([one for one in scored if one.passes == 1], lambda settings: settings)
    _check_alike([one for one in scored if one.passes > 1], _without_passes)
    # Plain runs need not have the method's options, but data and precision.
    _check_alike(scored, lambda settings: {key: settings[key] for key in ("data_digest", "precision")})
    scores: dict[int, list[float]] = {}
    seen: dict[tuple[int, int], Path] = {}
    for one in scored:
        other = seen.setdefault((one.passes, one.settings["seed"]), one.folder)
        if other != one.folder:
            raise UserError(f"'{other}' and '{one.folder}' have the same number of passes and seed: give one of them")
        scores.setdefault(one.passes, []).append(one.bleu)
    return scores


def _read(run: Path) -> _Scored:
    check_folder(run)
    folder = RunFolder(run)
    record, score = folder.read(), folder.score("best")
    if record is None or score is None:
        raise UserError(
            f"'{run}' was not trained to its end and evaluated: do it with scripts/train.sh and scripts/evaluate.sh"
        )
    return _Scored(folder.folder, record["settings"], num_passes(record["settings"]), score["bleu"])


def _without_passes(settings: dict[str, Any]) -> dict[str, Any]:
    options = {key: value for key, value in settings["options"].items() if key != "id-num-passes"}
    return {**settings, "options": options, "flags": without_option(settings["flags"], "id-num-passes")}


def _check_alike(runs: Sequence[_Scored], view: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A figure about the number of passes is of runs that differ in nothing else that somebody may have changed."""
    for one in runs[1:]:
        mine, first = view(one.settings), view(runs[0].settings)
        if differing := [key for key in mine if key != "seed" and mine[key] != first.get(key)]:
            raise UserError(
                f"'{runs[0].folder}' and '{one.folder}' differ in {', '.join(differing)}: give runs that differ in "
                "--id-num-passes and the seed only, and plain ones"
            )


def _label_place(means: Sequence[float], place: int) -> tuple[int, dict[str, Any]]:
    """Where the line to the neighbours leaves room for a number: 1 above or -1 below, and how to put it there."""
    neighbours = [means[place - 1] if place else None, *means[place + 1 : place + 2]]
    higher = [one is not None and one > means[place] for one in neighbours]
    lower = [one is not None and one <= means[place] for one in neighbours]
    up = -1 if any(higher) and not any(lower) else 1
    aside = 0 if not (any(higher) and any(lower)) else 1 if higher[0] else -1
    look = {"ha": {0: "center", 1: "left", -1: "right"}[aside], "va": "bottom" if up > 0 else "top"}
    return up, {**look, "xytext": (3 * aside, 6 * up), "textcoords": "offset points"}
