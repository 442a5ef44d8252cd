"""Reads the files that the commands leave in a run folder; says which one is missing and what makes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.files import read_json

FORMAT = 1
# What decides the size of a sensitivity. Curves that differ in one of these do not belong into one figure.
_MEASURE = ("objective", "average", "normalised", "dropout", "split")


def check_folder(run: Path) -> None:
    """Refuse what is not a folder.

    Raises:
        UserError: says so.
    """
    if not run.is_dir():
        raise UserError(f"run folder '{run}' does not exist: give one of scripts/train.sh")


def analysis_file(run: Path, name: str, command: str) -> Path:
    """A file of RUN/analysis.

    Args:
        run: the run folder.
        name: name of the file.
        command: sub-command of ours that makes it.
    Raises:
        UserError: it is not there.
    """
    check_folder(run)
    path = run / "analysis" / name
    if not path.is_file():
        raise UserError(f"'{path}' does not exist: make it with  intra-distillation {command} {run}")
    return path


def read_record(path: Path) -> dict[str, Any]:
    """A JSON record of one of our commands.

    Raises:
        UserError: it is damaged, or of another version.
    """
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"'{path}' is damaged or of another version (this one reads format {FORMAT}): make it again")
    return record


def read_measurements(run: Path) -> list[dict[str, Any]]:
    """What was measured during a training (RUN/sensitivity.jsonl), by ascending update.

    Raises:
        UserError: nothing was measured, or the file is damaged.
    """
    check_folder(run)
    path = run / "sensitivity.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    try:
        found = [json.loads(line) for line in lines if line]
    except json.JSONDecodeError:
        raise UserError(f"'{path}' is damaged: remove the lines that are not whole, or train the run again") from None
    if not found:
        raise UserError(
            f"'{path}' does not exist or is empty: make it by training with  scripts/train.sh ... -- "
            "--sensitivity-interval N"
        )
    return found


def sensitivity_unit(settings: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    """The unit of sensitivities that are drawn together, for an axis label.

    Args:
        settings: file and "settings" of each measurement.
    Raises:
        UserError: they were not measured in the same way.
    """
    (first, expected), *others = settings
    for path, given in others:
        for key in _MEASURE:
            if given.get(key) != expected.get(key):
                raise UserError(
                    f"'{path}' was measured with {key} '{given.get(key)}' and '{first}' with '{expected.get(key)}': "
                    "measure them in the same way to compare them"
                )
    return "share of the loss" if expected.get("normalised") else "nats per token"
