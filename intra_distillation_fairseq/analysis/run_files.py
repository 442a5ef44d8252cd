"""Reads the files that the commands leave in a run folder; says which one is missing and what makes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.errors import UserError

FORMAT = 1
# What decides the size of a sensitivity. Curves that differ in one of these do not belong into one figure.
_MEASURE = ("objective", "average", "normalised", "dropout", "split")
# Which command makes a record; every other record is one of sensitivities.
_MADE_BY = {"pruning.json": "prune", "layers.json": "layers"}
_CONTAINERS = {"points": list, "settings": dict, "summary": dict, "layers": dict}


class _Record(dict):
    """A JSON object that knows its file, for whoever reads a key that it does not have."""

    def __init__(self, values: dict[str, Any], *, path: Path, remedy: str):
        super().__init__(values)
        self._path, self._remedy = path, remedy

    def __missing__(self, key: str) -> Any:
        raise UserError(f"'{self._path}' is damaged, it has no '{key}': {self._remedy}")


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
    """A JSON record of one of our commands; to read a key that it, or an object in it, does not have is a UserError.

    Raises:
        UserError: it is missing, damaged, or of another version.
    """
    command = f"intra-distillation {_MADE_BY.get(path.name, 'sensitivity')} RUN_DIR"
    remedy = f"move it away and make it again with  {command}"
    try:
        record = json.loads(path.read_text(encoding="utf-8"), object_hook=partial(_Record, path=path, remedy=remedy))
    except FileNotFoundError:
        raise UserError(f"'{path}' is missing: make it with  {command}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        record = None
    if not _is_whole(record) or record.get("format") != FORMAT:
        raise UserError(f"'{path}' is damaged or of another version (this one reads format {FORMAT}): {remedy}")
    return record


def _is_whole(record: Any) -> bool:
    """An object, whose lists and objects are such wherever they are there."""
    if not isinstance(record, dict):
        return False
    if not all(isinstance(record[key], kind) for key, kind in _CONTAINERS.items() if key in record):
        return False
    return all(isinstance(point, dict) for point in record.get("points", ()))


def read_measurements(run: Path) -> list[dict[str, Any]]:
    """What was measured during a training (RUN/sensitivity.jsonl), by ascending update; keys as in `read_record`.

    Raises:
        UserError: nothing was measured, or the file is damaged.
    """
    check_folder(run)
    path = run / "sensitivity.jsonl"
    remedy = "remove the lines that are not whole, or train the run again"
    hook = partial(_Record, path=path, remedy=remedy)
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        found = [json.loads(line, object_hook=hook) for line in lines if line]
    except (json.JSONDecodeError, UnicodeDecodeError):
        found = [None]
    if not all(map(_is_whole, found)):
        raise UserError(f"'{path}' is damaged: {remedy}")
    if not found:
        raise UserError(
            f"'{path}' does not exist or is empty: make it by training with  scripts/train.sh ... -- "
            "--sensitivity-interval N"
        )
    return found


def check_alike(runs: Sequence[Path], facts: Sequence[dict[str, Any]]) -> None:
    """Refuse records that do not belong into one figure.

    Args:
        runs: run folders.
        facts: of each run, what decides its numbers but is not what the figure shows; by name.
    Raises:
        UserError: two runs differ in one of them; says in which.
    """
    first = facts[0]
    for run, given in zip(runs[1:], facts[1:]):
        keys = [key for key in {**first, **given} if first.get(key) != given.get(key)]
        if keys:
            differences = ", ".join(f"{key} ({first.get(key)} and {given.get(key)})" for key in keys)
            raise UserError(
                f"'{runs[0]}' and '{run}' cannot be compared, they differ in {differences}: measure them in the same "
                "way, or draw them one by one"
            )


def sensitivity_file(checkpoint: Path, variant: str = "") -> Path:
    """Where `intra-distillation sensitivity` puts its arrays unless told otherwise.

    Args:
        checkpoint: that was measured.
        variant: end of the name, as in "_gradient"; none where nothing is chosen but the defaults.
    """
    name = checkpoint.stem.removeprefix("checkpoint_")
    return checkpoint.parent / "analysis" / f"sensitivity_{name}{variant}.npz"


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
