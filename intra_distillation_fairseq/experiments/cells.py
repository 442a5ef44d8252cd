"""The cells of a table: one run for each pair, method and seed, where it lies, and what it has come to."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.logs import read_log
from intra_distillation_fairseq.experiments.runs import RunFolder
from intra_distillation_fairseq.files import file_sha256, read_json, write_json

LAYOUT = "<pair>/<method>/seed<number>"
PLAN = "reproduce.json"
_SEED = re.compile(r"seed(\d+)\Z")
_PAIR = re.compile(r"[a-z]{2,3}-[a-z]{2,3}\Z")
_PROCESS = re.compile(r"(?:process |\()(\d+)")


@dataclass(frozen=True)
class Cell:
    """One run of a table.

    Attributes:
        pair: as in `de-en`.
        method: a method of the config.
        seed: --seed of the training.
    """

    pair: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder, as seen from the results folder."""
        return f"{self.pair}/{self.method}/seed{self.seed}"

    def folder(self, results: Path) -> Path:
        """Its run folder."""
        return results / self.pair / self.method / f"seed{self.seed}"


@dataclass
class Outcome:
    """What a cell has come to.

    Attributes:
        state: "not run", "running", "stopped" (the training has begun and nothing runs), "failed", "not evaluated" (the
            training has finished), or "done".
        update: the last update heard of; None before the training.
        reason, log: of a failure.
        score: score.json, or empty.
        finished: finished.json, or empty.
        record: run.json, or empty.
        corpus: name of the corpus, or "".
        train_lines: sentence pairs of its training text, or None where nobody knows.
        versions: what the launches of the training ran with: key of environment.json -> distinct values.
    """

    state: str = "not run"
    update: int | None = None
    reason: str = ""
    log: str = ""
    score: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    corpus: str = ""
    train_lines: int | None = None
    versions: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def bleu(self) -> float | None:
        """BLEU of a cell that is done."""
        return self.score["bleu"] if self.state == "done" else None

    def text(self) -> str:
        """The state in a word or two."""
        at = "" if self.update is None else f" at update {self.update:,}"
        return self.state + (at if self.state in ("running", "stopped") else "")


def failure_file(folder: Path) -> Path:
    """Where a cell's failure is noted until it is tried again."""
    return folder / "failed.json"


def note_failure(folder: Path, step: str, reason: str, log: Path) -> None:
    """Remember why a cell failed.

    Args:
        folder: its run folder; made if need be.
        step: prepare, train or evaluate.
        reason: one line.
        log: where more is said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(failure_file(folder), {"step": step, "reason": reason, "log": str(log)})


def outcome(folder: Path, checkpoint: str) -> Outcome:
    """Look at a cell's run folder, without locking it.

    Args:
        folder: the run folder; it need not exist.
        checkpoint: the evaluation that counts: best, last or averageN.
    """
    run, failure = RunFolder(folder), read_json(failure_file(folder))
    try:
        record = run.read()
    except UserError as error:
        return Outcome("failed", reason=str(error), log=str(run.record))
    result = Outcome(record=record or {}, finished=read_json(run.finished) or {})
    evaluation = run.folder / "eval" / checkpoint
    if record:
        _add_data(result, record)
        launches = (read_json(run.environment) or {}).get("launches", [])
        for key in ("git_commit", "torch", "devices"):
            result.versions[key] = list(dict.fromkeys(str(launch.get(key)) for launch in launches))
    result.score = (result.finished and read_json(evaluation / "score.json")) or {}
    if result.score:
        result.state = "done"
    elif _in_use(folder / ".train.lock") or _in_use(evaluation / ".lock"):
        result.state = "running"
    elif failure:
        result.state, result.reason, result.log = "failed", failure["reason"], failure["log"]
    elif record:
        result.state = "not evaluated" if result.finished else "stopped"
    if record:
        result.update = result.finished["updates"] if result.finished else read_log(run.log).update
    return result


def _add_data(result: Outcome, record: dict[str, Any]) -> None:
    """Name and size of the corpus; from the data folder where the run is of a version that did not note them."""
    if "corpus" in record:
        result.corpus, result.train_lines = record["corpus"], record["lines"].get("train")
        return
    manifest = Path(record["data"]) / "manifest.json"
    if manifest.is_file() and file_sha256(manifest) == record["settings"]["data_digest"]:
        result.corpus, result.train_lines = corpus_of(manifest.parent)


def corpus_of(data: Path) -> tuple[str, int | None]:
    """Name of a data folder's corpus and number of its training pairs; ("", None) where it does not say."""
    manifest = read_json(data / "manifest.json")
    if not isinstance(manifest, dict):
        return "", None
    return str(manifest.get("corpus", "")), manifest.get("splits", {}).get("train", {}).get("lines")


def _in_use(lock: Path) -> bool:
    """Whether a lock names a living holder. Not tried: whoever wants the lock just then would be turned away."""
    try:
        holder = lock.read_text(encoding="utf-8").strip()
    except OSError:
        return False
    if not holder:
        return False
    elsewhere = holder.rpartition(" on ")[2] != socket.gethostname()
    return elsewhere or any(Path(f"/proc/{number}").exists() for number in _PROCESS.findall(holder))


def find_cells(results: Path) -> list[Cell]:
    """The cells that have a folder, in alphabetical order."""
    cells = []
    for folder in results.glob("*/*/seed*"):
        seed, (pair, method) = _SEED.match(folder.name), folder.parts[-3:-1]
        if seed and _PAIR.match(pair) and (failure_file(folder).exists() or RunFolder(folder).record.exists()):
            cells.append(Cell(pair, method, int(seed[1])))
    return sorted(cells, key=lambda cell: (cell.pair, cell.method, cell.seed))


def read_plan(results: Path) -> dict[str, Any]:
    """What `reproduce` was asked for in this folder: table, checkpoint, data_root, and all cells; empty without."""
    plan = read_json(results / PLAN)
    return {**plan, "cells": [Cell(*cell) for cell in plan["cells"]]} if isinstance(plan, dict) else {}


def add_to_plan(results: Path, table: int, checkpoint: str, data_root: Path, cells: Iterable[Cell]) -> None:
    """Note what is asked for now, beside what was asked for before.

    Raises:
        UserError: the folder is of another table.
    """
    old = read_plan(results)
    if old and old["table"] != table:
        raise UserError(
            f"--results '{results}' holds the runs of table {old['table']}, not of table {table}: give another folder"
        )
    together = dict.fromkeys([*old.get("cells", []), *cells])
    plan = {
        "table": table,
        "checkpoint": checkpoint,
        "data_root": str(data_root.resolve()),
        "cells": [[cell.pair, cell.method, cell.seed] for cell in together],
    }
    write_json(results / PLAN, plan)
