"""Trains and evaluates a list of runs, one after the other, and goes on past failures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from intra_distillation_fairseq import stopping
from intra_distillation_fairseq.experiments import processes
from intra_distillation_fairseq.experiments.cells import failure_file, note_failure, outcome
from intra_distillation_fairseq.experiments.jobs import Job, Place, run_jobs
from intra_distillation_fairseq.experiments.reproduction import INTRA_DISTILLATION, failure_reason
from intra_distillation_fairseq.experiments.table_text import hours
from intra_distillation_fairseq.experiments.time_left import runs_left
from intra_distillation_fairseq.files import Held

CHECKPOINT = "best"


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Attributes:
        name: unique, for the reader.
        folder: the run folder.
        method: a method of the config.
        seed: --seed of the training.
        flags: of fairseq-train.
    """

    name: str
    folder: Path
    method: str
    seed: int
    flags: tuple[str, ...]


def run_series(
    runs: Sequence[Run], data: Path, config: Path, held: Held, say: Callable[[str], None]
) -> tuple[int, dict[str, str]]:
    """Bring all runs to their end.

    Each is given to `train` and `evaluate`, whatever has been done: what has finished they leave as it is, what was
    stopped they go on with, and a folder of another run they refuse.

    Args:
        runs: what to run, in this order, on all GPUs or cores.
        data: prepared data folder of all.
        config: recipe of all.
        held: lock that the commands inherit.
        say: prints one line.
    Returns:
        0, 128 + the number of the signal that stopped it, or `stopping.STATUS` where a run alone was stopped; name of
        each failed run, and in one line why it failed.
    """
    failures: dict[str, str] = {}
    free = []
    for run in runs:
        if (now := outcome(run.folder, CHECKPOINT)).state == "running":
            failures[run.name] = f"'{run.folder}' is in use ({now.text()}): call this again when that has ended"
            say(f"FAIL  {run.name}: in use by another process")
        else:
            failure_file(run.folder).unlink(missing_ok=True)  # a new try
            free.append(run)
    by_name = {run.name: run for run in free}
    left = [run.name for run in free]

    def rest() -> str:
        done = [(_kind(run.name), run.folder) for run in runs if run.name not in left]
        return runs_left(done, map(_kind, left), CHECKPOINT, "runs")

    stopped: list[Run] = []

    def ended(job: Job, step: str, status: int, seconds: float) -> None:
        run = by_name[job.name]
        bleu = outcome(run.folder, CHECKPOINT).bleu
        if processes.was_stopped(status):
            stopped.append(run)
            say(f"stop  {job.name}: {failure_reason(job.log)}")
            return
        left.remove(job.name)
        if status == 0 and bleu is not None:
            say(f"done  {job.name}: BLEU {bleu:.2f} after {hours(seconds)}; {rest()}")
            return
        # A step that was killed could not say anything itself.
        told = 0 < status < 128
        reason = failure_reason(job.log) if told else f"{step} ended with {processes.describe_status(status)}"
        note_failure(run.folder, step, reason, job.log)
        failures[job.name] = f"{step} failed: {reason}; log: {job.log}"
        say(f"FAIL  {job.name}: {step} failed, log: {job.log}; {rest()}")

    def tell(pids: list[int]) -> None:
        commands = f" and its commands ({'), ('.join(map(str, pids))})" if pids else ""
        held.tell(f"intra-distillation ablation (process {os.getpid()}){commands}")

    number = run_jobs(
        [_job(run, data, config) for run in free],
        [Place("this machine")],
        started=lambda job, _: say(f"start {job.name}, log: {job.log}"),
        ended=ended,
        changed=tell,
        pass_fds=(held.fileno(),),
    )
    if number:
        return 128 + number, failures
    return (stopping.STATUS if stopped else 0), failures


def _kind(name: str) -> str:
    """Runs that differ in their seed alone are of one kind."""
    return name.rpartition("/")[0]


def _job(run: Run, data: Path, config: Path) -> Job:
    train = ["train", str(data), "--method", run.method, "--config", str(config), "--save-dir", str(run.folder)]
    train += ["--seed", str(run.seed), "--", *run.flags]
    evaluate = ["evaluate", str(run.folder), "--data", str(data), "--checkpoint", CHECKPOINT]
    evaluate += ["--cpu"] if "--cpu" in run.flags else []
    steps = (("train", [*INTRA_DISTILLATION, *train]), ("evaluate", [*INTRA_DISTILLATION, *evaluate]))
    return Job(run.name, steps, run.folder / "cell.log")
