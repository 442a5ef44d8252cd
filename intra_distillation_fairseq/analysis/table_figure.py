"""Draws a table as grouped bars: our scores beside the published ones; readable in grey, without a screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from intra_distillation_fairseq.analysis import drawing

PAIRS_PER_ROW = 4
_LEGEND_INCHES = 1.7  # width of one of its entries, "transformer, published" being the longest
# Methods differ in their grey and keep their order; the published bars are hatched as well.
_LIGHTEST = 0.85


def bars(table: dict[str, Any]) -> list[tuple[str, str, list[tuple[float | None, float | None]]]]:
    """The bars of each group, in their order: method, "ours" or "published", and (BLEU, deviation) for each pair.

    Args:
        table: as `experiments.results_table.build_table` gives it.
    Returns:
        A series without any score is left out.
    """
    series = []
    for method in table["methods"]:
        entries = [table["bleu"][method][pair] for pair in table["pairs"]]
        series.append((method, "ours", [(entry["mean"], entry["sd"]) for entry in entries]))
        series.append((method, "published", [(entry["published"], None) for entry in entries]))
    return [one for one in series if any(score is not None for score, _ in one[2])]


def draw_table(table: dict[str, Any], out: Path) -> list[Path]:
    """Draw the scores of a table, one group of bars for each pair, with whiskers of one standard deviation.

    Args:
        table: as `experiments.results_table.build_table` gives it.
        out: path without ending; gets .png and .pdf, each whole or not at all.
    Returns:
        The files.
    Raises:
        ImportError: matplotlib is not installed.
    """
    series, pairs = bars(table), table["pairs"]
    rows = [range(start, min(start + PAIRS_PER_ROW, len(pairs))) for start in range(0, len(pairs), PAIRS_PER_ROW)]
    width = min(14.0, max(6.0, 2.0 + 0.28 * len(series) * min(len(pairs), PAIRS_PER_ROW)))
    figure = drawing.new_figure(width, 0.8 + 3.2 * len(rows))
    for axes, members in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows):
        _draw_row(axes, series, [pairs[number] for number in members], members)
    drawing.legend_below(figure, figure.axes[0], entry_inches=_LEGEND_INCHES)
    figure.suptitle(table["title"], fontsize=10)
    return drawing.save(figure, out)


def _draw_row(axes: Any, series: list, pairs: list[str], members: range) -> None:
    methods = list(dict.fromkeys(method for method, _, _ in series))
    thickness = 0.86 / max(len(series), 1)
    for place, (method, origin, values) in enumerate(series):
        grey = _LIGHTEST * methods.index(method) / max(len(methods) - 1, 1)
        look = (
            {"color": f"{grey:.2f}", "edgecolor": "0.0"}
            if origin == "ours"
            else {"color": "1.0", "edgecolor": f"{min(grey, 0.5):.2f}", "hatch": "////"}
        )
        offset = (place - (len(series) - 1) / 2) * thickness
        known = [(column, *values[number]) for column, number in enumerate(members) if values[number][0] is not None]
        at = [column + offset for column, _, _ in known]
        axes.bar(at, [score for _, score, _ in known], thickness, label=f"{method}, {origin}", linewidth=0.5, **look)
        whiskers = [(x, score, sd) for x, (_, score, sd) in zip(at, known) if sd is not None]
        if whiskers:
            # Two colours, to be seen on a dark bar as well as on the white above it.
            for colour, line in (("1.0", 2.4), ("0.35", 1.0)):
                axes.errorbar(*map(list, zip(*whiskers)), fmt="none", ecolor=colour, elinewidth=line, capsize=2)
        for x, (_, score, sd) in zip(at, known):
            place_above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            axes.annotate(f"{score:.1f}", (x, score + (sd or 0)), rotation=90, fontsize=6, **place_above)
    axes.set_xticks(range(len(pairs)), pairs)
    axes.set_xlim(-0.5, len(pairs) - 0.5)
    axes.set_ylabel("BLEU")
    highest = max(
        (score + (sd or 0) for _, _, values in series for score, sd in values if score is not None), default=0
    )
    axes.set_ylim(0, max(1.0, 1.18 * highest))  # the same in all rows; scores near 0 are shown as such
    axes.grid(axis="y", **drawing.GRID)
    axes.set_axisbelow(True)
