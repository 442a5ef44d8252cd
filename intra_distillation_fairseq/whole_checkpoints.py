"""Tells whole checkpoint files from cut or damaged ones, and finds the newest whole one."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

from intra_distillation_fairseq.errors import UserError

LAST = "checkpoint_last.pt"
_OTHERS = re.compile(r"checkpoint(\d+|_\d+_\d+|_best|\.best_.+)\.pt\Z")
# PyTorch before 1.6 wrote pickles, which hold no checksum.
_PICKLE = b"\x80"


class Found(NamedTuple):
    """Attributes:
    path: a whole checkpoint, or None.
    damaged: what is not whole, each with the reason.
    """

    path: Path | None
    damaged: dict[Path, str]


def damage(path: Path) -> str | None:
    """Read a checkpoint to its end and compare its checksums, which torch.load does not.

    Args:
        path: an existing file.
    Returns:
        What is wrong, or None where the file is whole.
    Raises:
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return "it is empty"
        if file.read(1) == _PICKLE:
            return None
        try:
            with zipfile.ZipFile(file) as archive:
                record = archive.testzip()
        except Exception as error:  # of a damaged directory zipfile raises whatever it stumbles over
            return f"it is cut off or damaged: {size:,} bytes, {str(error) or type(error).__name__}"
    return f"its record '{record}' does not match its checksum" if record else None


def newest_whole(folder: Path) -> Found:
    """The whole checkpoint of most updates beside `checkpoint_last.pt`.

    Args:
        folder: that of the run.
    """
    from intra_distillation_fairseq import checkpoints

    damaged: dict[Path, str] = {}
    updates: dict[Path, int] = {}
    for path in sorted(path for path in folder.glob("checkpoint*.pt") if _OTHERS.match(path.name)):
        try:
            updates[path] = checkpoints.facts(path).update or 0
        except UserError as error:
            damaged[path] = damage(path) or str(error)
    for path in sorted(updates, key=updates.__getitem__, reverse=True):
        why = damage(path)
        if why is None:
            return Found(path, damaged)
        damaged[path] = why
    return Found(None, damaged)


def set_aside(path: Path) -> Path:
    """Rename a file to NAME.damaged, with a number where that is taken; returns the new path."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged{number}")
    return path.rename(aside)
