"""Figure 4: the weight of the divergence in the course of a training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from intra_distillation_fairseq.analysis import drawing
from intra_distillation_fairseq.schedule import AlphaSchedule

_STEPS = 400


def draw_alpha(curves: Mapping[str, AlphaSchedule], out: Path) -> list[Path]:
    """Draw alpha' against updates (paper, eq. 11-12, Fig. 4), with marks at (N/q, 1) and (N/p, alpha).

    Args:
        curves: label of each curve, and its schedule; max_update N must be known also where alpha' is constant. Equal
            ones are drawn once, under all their labels.
        out: path without ending; gets .png and .pdf.
    Returns:
        The files.
    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = drawing.new_figure(6.4, 4.2)
    axes = figure.subplots()
    names: dict[AlphaSchedule, list[str]] = {}
    for name, schedule in curves.items():
        names.setdefault(schedule, []).append(name)
    marked: dict[tuple[float, float], str] = {}
    for number, (schedule, labels) in enumerate(names.items()):
        last = schedule.max_update
        marks = [last / schedule.q, last / schedule.p] if schedule.is_adaptive else []
        updates = sorted({last * step / _STEPS for step in range(_STEPS + 1)} | set(marks))
        look = drawing.style(number)
        axes.plot(updates, [schedule(x) for x in updates], label=", ".join(labels), **{**look, "markevery": []})
        axes.plot(marks, [1.0, schedule.alpha][: len(marks)], **{**look, "linestyle": "none", "markersize": 6})
        marked |= {(x, schedule(x)): f"{text} = {x:,.6g}" for x, text in zip(marks, ("N/q", "N/p"))}
    for point, text in marked.items():
        axes.annotate(text, point, xytext=(6, -11), textcoords="offset points", fontsize=8)
    axes.set_ylim(bottom=0)
    drawing.finish(axes, "updates", "weight of the divergence, alpha' (no unit)")
    return drawing.save(figure, out)
