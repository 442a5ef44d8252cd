"""Draws the figures of docs/results.md from the benchmarks' CSV files; readable in grey, without a screen.

python benchmarks/plots.py                       # results/{loss,step}.csv -> docs/figures/benchmark_{loss,step}.png
python benchmarks/plots.py benchmarks/results/loss_gpu.csv
"""

from __future__ import annotations

import argparse
import csv
import logging
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from intra_distillation_fairseq.files import replacing

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"

# Greys, lines and marks all differ: any one of them is enough to tell two variants apart.
STYLES = {
    "published": {"color": "0.6", "linestyle": ":", "marker": "D"},
    "reference": {"color": "0.45", "linestyle": "--", "marker": "s"},
    "chunked": {"color": "0.0", "linestyle": "-", "marker": "o"},
    "chunked_in_place": {"color": "0.2", "linestyle": "-.", "marker": "^"},
    "triton": {"color": "0.0", "linestyle": (0, (6, 2)), "marker": "*"},
    "triton_in_place": {"color": "0.3", "linestyle": (0, (3, 1, 1, 1)), "marker": "v"},
}
SWEPT = {"tokens": "N, tokens of a batch", "vocabulary": "V, types of the vocabulary"}
BASE = {"num_passes": "3", "tokens": "2048", "vocabulary": "12001"}
MEASURED = (
    ("speedup", "speed of forward and backward\n(times that of reference)"),
    ("peak_above_inputs_mib", "peak memory beyond the logits (MiB)"),
)
TICKS = [digit * 10**power for power in range(-2, 6) for digit in (1, 2, 5)]


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def series(rows: list[dict[str, str]], variant: str, swept: str, column: str) -> tuple[list[int], list[float]]:
    """What a variant measured along N or V; K, the other of the two and the type as in the first case."""
    fixed = {name: value for name, value in {**BASE, "dtype": rows[0]["dtype"]}.items() if name != swept}
    found = {
        int(row[swept]): float(row[column])
        for row in rows
        if row["variant"] == variant
        and row["phase"] == "both"
        and row[column]
        and all(row[name] == value for name, value in fixed.items())
    }
    return sorted(found), [found[place] for place in sorted(found)]


def grid(axes: Any, which: str = "both") -> None:
    axes.grid(axis=which, color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)


def draw_loss(rows: list[dict[str, str]]) -> Figure:
    """Speed and memory against N and V for K = 3; both axes logarithmic."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    for line, (column, label) in zip(figure.subplots(2, len(SWEPT)), MEASURED):
        for axes, (swept, name) in zip(line, SWEPT.items()):
            places: list[int] = []
            for variant, style in STYLES.items():
                x, y = series(rows, variant, swept, column)
                if x:
                    axes.plot(x, y, label=variant, markersize=5, linewidth=1.4, **style)
                    places = max(places, x, key=len)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(places, [f"{place:,}" for place in places])
            axes.minorticks_off()
            ticks = [tick for tick in TICKS if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
            axes.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
            axes.set_xlabel(name)
            axes.set_ylabel(label)
            grid(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(f"Loss of K = 3 passes, {rows[0]['dtype']}, {machine(rows[0])}", fontsize=10)
    return figure


def draw_step(rows: list[dict[str, str]]) -> Figure:
    """Time of an update, and its peak memory: what any update needs, and what the passes add."""
    names = [row["variant"] for row in rows]
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(rows) + 0.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    values = [float(row["ms"]) for row in rows]
    spread = [
        [ms - float(row["ms_q20"]) for ms, row in zip(values, rows)],
        [float(row["ms_q80"]) - ms for ms, row in zip(values, rows)],
    ]
    left.barh(names, values, color="0.6", edgecolor="0.0", linewidth=0.5)
    left.errorbar(values, names, xerr=spread, fmt="none", ecolor="0.0", elinewidth=1, capsize=2)
    left.set_xlabel("time of an update (ms; 20% to 80%)")
    state = [float(row["state_mib"]) + float(row["gradients_mib"]) for row in rows]
    above = [float(row["peak_above_state_mib"]) for row in rows]
    right.barh(names, state, color="0.85", edgecolor="0.0", linewidth=0.5, label="parameters, gradients, Adam")
    right.barh(
        names, above, left=state, color="0.45", edgecolor="0.0", linewidth=0.5, hatch="///", label="all the rest"
    )
    right.set_xlabel("peak memory of an update (MiB)")
    for axes, numbers in ((left, values), (right, [a + b for a, b in zip(state, above)])):
        highest = max([*numbers, *(float(row["ms_q80"]) for row in rows if axes is left)])
        for place, number in enumerate(numbers):
            axes.annotate(f"{number:,.0f}", (highest * 1.04, place), va="center", fontsize=8)
        axes.set_xlim(0, 1.2 * highest)
        grid(axes, "x")
    left.invert_yaxis()
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    row = rows[0]
    figure.suptitle(
        f"transformer_small, K = {row['num_passes']}, at most {int(row['max_tokens']):,} tokens, {row['precision']}, "
        f"{machine(row)}",
        fontsize=10,
    )
    return figure


def machine(row: dict[str, str]) -> str:
    return f"{row['device']}, {row['threads']} CPU thread{'s' if row['threads'] != '1' else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("csv", type=Path, nargs="*", help="written by loss.py or step.py (benchmarks/results/)")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder for benchmark_<name>.png (docs/figures)")
    args = parser.parse_args()
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of each font that it looks at
    args.figures.mkdir(parents=True, exist_ok=True)
    for path in args.csv or [RESULTS / "loss.csv", RESULTS / "step.csv"]:
        try:
            rows = read(path)
        except OSError as error:
            parser.error(
                f"'{path}' cannot be read ({error.strerror}): write it with benchmarks/loss.py or step.py first"
            )
        figure = draw_step(rows) if "state_mib" in rows[0] else draw_loss(rows)
        FigureCanvasAgg(figure)
        out = args.figures / f"benchmark_{path.stem}.png"
        with replacing(out) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
        print(out)


if __name__ == "__main__":
    main()
