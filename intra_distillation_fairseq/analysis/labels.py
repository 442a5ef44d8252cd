"""What runs are called in a figure."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from intra_distillation_fairseq.errors import UserError

_SEED = re.compile(r"seed\d+\Z")


def run_labels(places: Sequence[Path], given: Sequence[str] | None = None) -> list[str]:
    """One label for each run, all different.

    Args:
        places: run folders, or sensitivity files, which stand for the run whose analysis folder they are in.
        given: labels of the user, which win.
    Returns:
        The folder's name, or <name> for .../<name>/seed<N>; where that does not tell two runs apart with the seed, and
        where that does not either, the path from the folder they have in common.
    Raises:
        UserError: the wrong number of labels, or a label or a run twice.
    """
    if given:
        if len(given) != len(places):
            raise UserError(
                f"--labels has {len(given)} ({', '.join(given)}) for {len(places)} runs: give one for each, in order"
            )
        if twice := [label for label, count in Counter(given).items() if count > 1]:
            raise UserError(f"--labels has '{twice[0]}' twice: give each run a label of its own")
        return list(given)
    paths = [Path(os.path.abspath(place)) for place in places]  # not resolved: links are names that somebody chose
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise UserError(f"'{twice[0]}' is given twice: give each run once")
    folders = [path.parents[1] if path.suffix and path.parent.name == "analysis" else path for path in paths]
    labels = [_short(folder) for folder in folders]
    for longer in (_with_seed, lambda folder: os.path.relpath(folder, os.path.commonpath(folders))):
        counts = Counter(labels)
        labels = [longer(folder) if counts[label] > 1 else label for label, folder in zip(labels, folders)]
    counts = Counter(labels)  # two files of one run
    return [f"{label} {path.stem}" if counts[label] > 1 else label for label, path in zip(labels, paths)]


def _short(folder: Path) -> str:
    return folder.parent.name if _SEED.match(folder.name) else folder.name.removesuffix(".npz")


def _with_seed(folder: Path) -> str:
    return f"{folder.parent.name} {folder.name}" if _SEED.match(folder.name) else folder.name
