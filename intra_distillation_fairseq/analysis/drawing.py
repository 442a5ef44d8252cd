"""What all figures share: a look that is readable in grey, a canvas without a screen, files that appear whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from intra_distillation_fairseq.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
GRID = {"color": "0.88", "linewidth": 0.6}
LEGEND = {"frameon": False, "fontsize": 8, "handlelength": 3.4}  # long enough for a whole dash and dot
LIGHT = "0.62"  # of what is there only to compare with; dark enough to be seen on paper
# Grey, line and mark all differ: any one of them is enough to tell up to four curves apart, the mark up to ten.
_GREYS = ("0.0", "0.45", "0.2", "0.6")
_LINES = ("-", "--", ":", "-.")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


def style(number: int) -> dict[str, Any]:
    """The look of one of several curves: color, linestyle, marker, for `Axes.plot`.

    Args:
        number: which curve, from 0 on.
    """
    look = {"color": _GREYS[number % len(_GREYS)], "linestyle": _LINES[number % len(_LINES)]}
    return {**look, "marker": _MARKS[number % len(_MARKS)], "markersize": 4, "linewidth": 1.4}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that is drawn without a screen.

    Args:
        width, height: inches.
    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(axes: Axes, xlabel: str, ylabel: str, *, whole_x: bool = True, legend: bool = True) -> None:
    """Labels, grid and legend of axes that have been drawn on.

    Args:
        axes: where.
        xlabel, ylabel: with units.
        whole_x: ticks of the x axis stand at whole numbers only, as those of updates have to.
        legend: put one into the axes, where there is something to explain.
    """
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if whole_x:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(**GRID)
    axes.set_axisbelow(True)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(**LEGEND)


def legend_below(figure: Figure, *sources: Axes, entry_inches: float = 2.2) -> None:
    """One legend for the whole figure, under it.

    Args:
        figure: the figure.
        sources: axes whose curves it explains.
        entry_inches: width of an entry.
    """
    handles, labels = [], []
    for axes in sources:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.append(handle)
            labels.append(label)
    if handles:
        columns = max(1, min(len(handles), int(figure.get_figwidth() // entry_inches)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, **LEGEND)


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all, in the format of the file's ending; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=DOTS_PER_INCH)


def save(figure: Figure, out: Path) -> list[Path]:
    """Write a figure as PNG and as PDF.

    Args:
        figure: the figure.
        out: path without ending.
    Returns:
        The two files.
    """
    files = [out.with_name(out.name + ending) for ending in (".png", ".pdf")]
    for path in files:
        write_figure(figure, path)
    return files
