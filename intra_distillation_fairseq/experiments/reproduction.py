"""Fills a results folder with the cells of a table: prepares missing data, trains, evaluates, goes on past failures."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intra_distillation_fairseq import stopping
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import launch, processes
from intra_distillation_fairseq.experiments.cells import (
    Cell,
    Failure,
    corpus_of,
    failure_file,
    note_failure,
    outcome,
)
from intra_distillation_fairseq.experiments.jobs import Job, Place, run_jobs
from intra_distillation_fairseq.experiments.prepared import PreparedData, open_prepared
from intra_distillation_fairseq.experiments.published import Published
from intra_distillation_fairseq.experiments.recipes import Recipe, evaluation_as_dict
from intra_distillation_fairseq.experiments.runs import RunFolder
from intra_distillation_fairseq.experiments.table_text import hours
from intra_distillation_fairseq.experiments.time_left import runs_left
from intra_distillation_fairseq.files import Held

SPLITS = ("train", "valid", "test")
_WAY_OUT = '(flags of the prepare command go into --prepare-flags="...")'
# The one beside this Python, so that it is this installation whatever the PATH says. Not as a module where that can be
# avoided: the package then imports torch and fairseq at once (see its __init__), for every step of every cell.
_BESIDE = Path(sys.executable).with_name("intra-distillation")
INTRA_DISTILLATION = (
    (sys.executable, str(_BESIDE))
    if _BESIDE.exists()
    else (sys.executable, "-m", "intra_distillation_fairseq.cli.main")
)


@dataclass(frozen=True)
class Task:
    """What to fill a results folder with.

    Attributes:
        table: the table of the paper.
        cells: in the order in which they are to run.
        results: the folder.
        data_root: holds a prepared data folder for each pair, or gets it.
        recipe: the settings of all methods.
        flags: for fairseq-train, after all others.
        precision: --precision of train.sh.
        checkpoint: --checkpoint of evaluate.sh.
        prepare: pair -> words of the command of ours that makes its data folder.
        archive: what all these commands need; where it is missing after a failed one, the others are not tried.
        keep_checkpoints: keep the numbered checkpoints of the cells that it trains.
    """

    table: Published
    cells: tuple[Cell, ...]
    results: Path
    data_root: Path
    recipe: Recipe
    flags: list[str]
    precision: str
    checkpoint: str
    prepare: dict[str, list[str]]
    archive: Path
    keep_checkpoints: bool

    @property
    def cpu(self) -> bool:
        """Whether the flags keep the trainings off the GPU."""
        return "--cpu" in self.flags

    def data(self, pair: str) -> PreparedData:
        """The data folder of a pair.

        Raises:
            UserError: it is not complete.
        """
        return open_prepared(self.data_root / pair, SPLITS)

    def is_done(self, cell: Cell, data: PreparedData | None) -> bool:
        """Whether a cell is trained and scored with just these settings.

        Args:
            cell: which.
            data: its data folder; None where it is gone, which is nothing to train again for.
        """
        result = outcome(cell.folder(self.results), self.checkpoint)
        settings = result.record.get("settings", {})
        wanted: dict[str, Any] = {
            "options": self.recipe.options(cell.method),
            "flags": launch.lasting_flags(self.flags),
            "method": cell.method,
            "seed": cell.seed,
        }
        if data:
            wanted["data_digest"] = data.digest
        if self.precision != "auto":
            wanted["precision"] = self.precision
        return (
            result.state == "done"
            and all(settings.get(key) == value for key, value in wanted.items())
            and result.score["inputs"]["evaluation"] == evaluation_as_dict(self.recipe.evaluation)
        )


class Reproduction:
    """One go at a task.

    Args:
        task: what to do.
        say: prints one line.
    """

    def __init__(self, task: Task, say: Callable[[str], None]) -> None:
        self._task = task
        self._say = say
        self._places = 1
        self._data: dict[str, PreparedData | None] = {}
        for pair in dict.fromkeys(cell.pair for cell in task.cells):
            try:
                self._data[pair] = data = task.data(pair)
            except UserError:
                self._data[pair] = None
                continue
            if data.pair != pair:
                raise UserError(
                    f"'{data.folder}' holds {data.pair}, not {pair}: rename it, or give another --data-root"
                )
        self._left = [cell for cell in task.cells if not task.is_done(cell, self._data[cell.pair])]
        # Those that somebody else trained keep all their files.
        self._to_train = {cell for cell in self._left if not RunFolder(cell.folder(task.results)).finished.exists()}
        self.failures: list[Failure] = []
        self._is_any_stopped = False

    @property
    def done(self) -> int:
        """Number of cells that need nothing."""
        return len(self._task.cells) - len(self._left)

    @property
    def left(self) -> int:
        """Number of cells that are neither done nor failed now."""
        return len(self._left)

    def run(self, places: list[Place], held: Held) -> int:
        """Prepare what is missing, then train and evaluate what is left.

        Args:
            places: where the cells run.
            held: the lock of the results folder, which the cells inherit.
        Returns:
            0, 128 + the number of the signal that stopped it, or `stopping.STATUS` where a cell alone was stopped.
        """
        self._tell(held, [])
        self._places = len(places)
        for cell in self._left:  # a new try
            failure_file(cell.folder(self._task.results)).unlink(missing_ok=True)
        for pair in dict.fromkeys(cell.pair for cell in self._left if self._data[cell.pair] is None):
            if status := self._prepare(pair, held):
                return status
        cells = {cell.name: cell for cell in self._left}
        number = run_jobs(
            [self._job(cell) for cell in self._left],
            places,
            started=lambda job, place: self._say(f"start {job.name} on {place.name}, log: {job.log}"),
            ended=lambda job, step, status, seconds: self._ended(cells[job.name], job, step, status, seconds),
            changed=lambda pids: self._tell(held, pids),
            pass_fds=(held.fileno(),),
        )
        if number:
            return 128 + number
        return stopping.STATUS if self._is_any_stopped else 0

    def _prepare(self, pair: str, held: Held) -> int:
        """Make a data folder; a failure is noted with each of its cells. Returns 0, or 128 + a signal's number."""
        log = self._task.results / "logs" / f"prepare-{pair}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        words, reason = self._task.prepare[pair], ""
        if corpus_of(self._task.data_root / pair)[0] not in ("", self._task.table.corpus_of(pair)):
            try:  # a damaged folder of somebody else's: not to be replaced by ours
                self._task.data(pair)
            except UserError as error:
                reason = str(error)
            log.touch()
        elif self.failures and not self._task.archive.exists():
            reason = f"there is no '{self._task.archive}', see the failure before this one"
            log.touch()
        else:
            self._say(f"prepare {pair}, log: {log}")
            command = [*INTRA_DISTILLATION, *words]
            status = processes.run_logged(
                command,
                log,
                follow=lambda line: self._say(f"  {line}"),
                started=lambda pid: self._tell(held, [pid], "prepare command"),
                pass_fds=(held.fileno(),),
            )
            self._tell(held, [])
            if processes.was_stopped(status):
                return status
            try:
                self._data[pair] = self._task.data(pair)
            except UserError as error:
                reason = f"{failure_reason(log)} {_WAY_OUT}" if status else str(error)
        if reason:
            self._fail([cell for cell in self._left if cell.pair == pair], "prepare", reason, log)
        return 0

    def _job(self, cell: Cell) -> Job:
        task, folder, data = self._task, cell.folder(self._task.results), str(self._task.data_root / cell.pair)
        train = ["train", data, "--method", cell.method, "--config", str(task.recipe.path), "--save-dir", str(folder)]
        train += ["--seed", str(cell.seed), "--precision", task.precision, "--", *task.flags]
        evaluate = ["evaluate", str(folder), "--data", data, "--checkpoint", task.checkpoint]
        evaluate += ["--cpu"] if task.cpu else []
        steps = (("train", [*INTRA_DISTILLATION, *train]), ("evaluate", [*INTRA_DISTILLATION, *evaluate]))
        return Job(cell.name, steps, folder / "cell.log")

    def _ended(self, cell: Cell, job: Job, step: str, status: int, seconds: float) -> None:
        result = outcome(cell.folder(self._task.results), self._task.checkpoint)
        if processes.was_stopped(status):
            self._is_any_stopped = True
            self._say(f"stop  {cell.name}: {failure_reason(job.log)}")
        elif status or result.bleu is None:
            # A step that was killed could not say anything itself.
            reason = (
                failure_reason(job.log)
                if 0 < status < 128
                else f"{step} ended with {processes.describe_status(status)}"
            )
            self._fail([cell], step, reason, job.log)
        else:
            self._left.remove(cell)
            self._say(f"done  {cell.name}: BLEU {result.bleu:.2f} after {hours(seconds)}; {self.rest(self._places)}")
            if cell in self._to_train and not self._task.keep_checkpoints:
                self._remove_checkpoints(cell)

    def _remove_checkpoints(self, cell: Cell) -> None:
        """Those that a finished and evaluated run needs no more: tables fill a disk with them."""
        paths = RunFolder(cell.folder(self._task.results)).numbered_checkpoints()
        size = sum(path.stat().st_size for path in paths)
        for path in paths:
            path.unlink()
        if paths:
            what = f"{len(paths)} numbered checkpoints ({size / 1e9:.1f} GB), kept best and last"
            self._say(f"      {cell.name}: removed {what}")

    def _fail(self, cells: list[Cell], step: str, reason: str, log: Path) -> None:
        """Cells of one pair."""
        for cell in cells:
            self._left.remove(cell)
            note_failure(cell.folder(self._task.results), step, reason, log)
            self.failures.append(Failure(cell, step, reason, str(log)))
        name = cells[0].name if len(cells) == 1 else f"{cells[0].pair} ({len(cells)} cells)"
        self._say(f"FAIL  {name}: {step} failed, log: {log}; {self.rest(self._places)}")

    def rest(self, side_by_side: int) -> str:
        """Cells that are neither done nor failed, and how long they will take, so many at a time."""
        task = self._task
        done = [(cell.method, cell.folder(task.results)) for cell in task.cells if cell not in self._left]
        return runs_left(done, [cell.method for cell in self._left], task.checkpoint, "cells", side_by_side)

    def _tell(self, held: Held, pids: list[int], what: str = "cells") -> None:
        """Name all holders of the results folder, for whoever is kept out."""
        cells = f" and its {what} ({'), ('.join(map(str, pids))})" if pids else ""
        held.tell(f"intra-distillation reproduce (process {os.getpid()}){cells}")


def failure_reason(log: Path) -> str:
    """What a command said last; where it showed the end of fairseq's log above its own last line, what fairseq said."""
    before, last = ["", *processes.tail(log, 2).split("\n")][-2:]
    return (before if last.startswith("error: fairseq-") else last).strip() or "it said nothing"


def clock(line: str) -> str:
    """A line with the time of day before it."""
    return f"{time.strftime('%H:%M:%S')} | {line}"
