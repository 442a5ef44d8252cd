"""How long a series of runs will still take, by what its finished ones took."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from intra_distillation_fairseq.experiments.runs import RunFolder
from intra_distillation_fairseq.files import read_json
from intra_distillation_fairseq.progress import rest


def runs_left(
    done: Iterable[tuple[str, Path]], left: Iterable[str], checkpoint: str, unit: str, side_by_side: int = 1
) -> str:
    """As in `3 of 8 cells left, about 2 h 10 min`; without a time before any is done.

    It counts what a stopped or running one has done already as still to do.

    Args:
        done: kind and run folder of those that are over; runs of one kind take about the same time.
        left: kinds of those that are to come.
        checkpoint: which one is evaluated: best, last or averageN.
        unit: what the reader calls them.
        side_by_side: how many run at a time.
    """
    done, left, took = list(done), list(left), dict[str, list[float]]()
    for kind, folder in done:
        run = RunFolder(folder)
        times = [(one or {}).get("seconds") for one in (read_json(run.finished), run.score(checkpoint))]
        if None not in times:
            took.setdefault(kind, []).append(sum(times))
    any_kind = [seconds for one in took.values() for seconds in one]
    seconds = sum(fmean(took.get(kind, any_kind)) for kind in left) / side_by_side if any_kind else None
    return rest(len(left), len(done) + len(left), unit, seconds)
