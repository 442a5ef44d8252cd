"""The cells of a table: one run for each pair, method and seed, where it lies, and what it has come to."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.logs import read_log
from intra_distillation_fairseq.experiments.published import TABLES
from intra_distillation_fairseq.experiments.runs import RunFolder
from intra_distillation_fairseq.files import file_sha256, read_json, write_json

LAYOUT = "<pair>/<method>/seed<number>"
PLAN = "reproduce.json"
_PLANNED = ("checkpoint", "data_root")
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
        state: "not run", "running", "stopped" (the training has begun and nothing runs), "failed" (whatever was scored
            before), "not evaluated" (the training has finished), or "done".
        update: the last update heard of; None before the training.
        host: another machine that has locked the folder; whether anything is alive there cannot be seen from here.
        step, reason, log: of a failure.
        score: score.json of the model that counts, or empty.
        finished: finished.json, or empty.
        record: run.json, or empty.
        corpus: name of the corpus, or "".
        train_lines: sentence pairs of its training text, or None where nobody knows.
        versions: what the launches of the training ran with: key of environment.json -> distinct values.
        batches: distinct (processes, --update-freq) of these launches, as far as they say.
    """

    state: str = "not run"
    update: int | None = None
    host: str = ""
    step: str = ""
    reason: str = ""
    log: str = ""
    score: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    corpus: str = ""
    train_lines: int | None = None
    versions: dict[str, list[Any]] = field(default_factory=dict)
    batches: list[tuple[int, str]] = field(default_factory=list)

    @property
    def bleu(self) -> float | None:
        """BLEU of a cell that is done."""
        return self.score["bleu"] if self.state == "done" else None

    def text(self) -> str:
        """The state in a word or two."""
        at = "" if self.update is None else f" at update {self.update:,}"
        where = f" on {self.host}" if self.host else ""
        return self.state + (where + at if self.state in ("running", "stopped") else "")


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


class Failure(NamedTuple):
    """A cell that failed: in which step (prepare, train or evaluate; "" where there was none), why, and its log."""

    cell: Cell
    step: str
    reason: str
    log: str


def failure_lines(failures: Iterable[Failure]) -> list[str]:
    """One line for all cells of a pair that failed in the same step for the same reason."""
    groups: dict[tuple[str, str, str], list[Failure]] = {}
    for one in failures:
        groups.setdefault((one.cell.pair, one.step, one.reason), []).append(one)
    lines = []
    for (pair, step, reason), members in groups.items():
        name = members[0].cell.name if len(members) == 1 else f"{pair} ({len(members)} cells)"
        log = members[0].log + (" and others" if len({one.log for one in members}) > 1 else "")
        lines.append(f"{name}: {f'{step} ' if step else ''}failed: {reason}; log: {log}")
    return lines


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
    locks = (folder / ".train.lock", folder / "eval" / checkpoint / ".lock")
    result = Outcome(record=record or {}, finished=read_json(run.finished) or {})
    if record:
        _add_data(result, record)
        launches = (read_json(run.environment) or {}).get("launches", [])
        for key in ("git_commit", "torch", "devices"):
            result.versions[key] = list(dict.fromkeys(str(launch.get(key)) for launch in launches))
        known = [launch for launch in launches if "processes" in launch]
        result.batches = list(dict.fromkeys((launch["processes"], launch["update_freq"]) for launch in known))
    if failure:
        result.state = "failed"
        result.step, result.reason, result.log = (failure.get(key, "") for key in ("step", "reason", "log"))
    elif score := record and run.score(checkpoint):
        result.state, result.score = "done", score
    elif hosts := [host for lock in locks if (host := _holder(lock))]:
        result.state, result.host = "running", "" if socket.gethostname() in hosts else hosts[0]
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


def _holder(lock: Path) -> str:
    """The machine that holds a lock, "" where none does; on another machine a dead holder cannot be told.

    The lock is not tried: whoever wants it just then would be turned away.
    """
    try:
        holder = lock.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    host = holder.rpartition(" on ")[2]
    if host == socket.gethostname() and not any(
        Path(f"/proc/{number}").exists() for number in _PROCESS.findall(holder)
    ):
        return ""
    return host


def find_cells(results: Path) -> list[Cell]:
    """The cells that have a folder, in alphabetical order."""
    cells = []
    for folder in results.glob("*/*/seed*"):
        seed, (pair, method) = _SEED.match(folder.name), folder.parts[-3:-1]
        if seed and _PAIR.match(pair) and (failure_file(folder).exists() or RunFolder(folder).record.exists()):
            cells.append(Cell(pair, method, int(seed[1])))
    return sorted(cells, key=lambda cell: (cell.pair, cell.method, cell.seed))


def read_plan(results: Path) -> dict[str, Any]:
    """What `reproduce` was asked for in this folder: table, checkpoint, data_root, and all cells; empty without.

    Raises:
        UserError: it is damaged.
    """
    path = results / PLAN
    if not path.exists():
        return {}
    try:
        plan = read_json(path)
        cells = [Cell(str(pair), str(method), int(seed)) for pair, method, seed in plan["cells"]]
        return {"table": TABLES[plan["table"]].number, **{key: str(plan[key]) for key in _PLANNED}, "cells": cells}
    except (TypeError, ValueError, KeyError):
        raise UserError(
            f"'{path}' is damaged: restore it, or delete it (the runs stay; name all cells that are to come once more)"
        ) from None


def add_to_plan(results: Path, table: int, checkpoint: str, data_root: Path, cells: Iterable[Cell]) -> str:
    """Note what is asked for now, beside what was asked for before.

    Returns:
        The checkpoint of the folder's table: the one that was asked for first.

    Raises:
        UserError: the folder is of another table, or what was asked for before cannot be read.
    """
    old = read_plan(results)
    if old and old["table"] != table:
        raise UserError(
            f"--results '{results}' holds the runs of table {old['table']}, not of table {table}: give another folder"
        )
    together = dict.fromkeys([*old.get("cells", []), *cells])
    plan = {
        "table": table,
        "checkpoint": old.get("checkpoint", checkpoint),
        "data_root": str(data_root.resolve()),
        "cells": [[cell.pair, cell.method, cell.seed] for cell in together],
    }
    write_json(results / PLAN, plan)
    return plan["checkpoint"]
