"""Runs jobs side by side, each a sequence of commands in a place of its own: some GPUs, or some cores."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.processes import POLL_SECONDS, Signals, passed_on_signals


@dataclass(frozen=True)
class Place:
    """Where one job at a time runs.

    Attributes:
        name: for the reader, as in `GPU 0`.
        environment: variables that keep a command to this place.
    """

    name: str
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """Commands to run one after the other; the first that fails ends the job.

    Attributes:
        name: unique.
        steps: name and words of each command.
        log: file to which their output is added.
    """

    name: str
    steps: tuple[tuple[str, list[str]], ...]
    log: Path


@dataclass
class _Running:
    job: Job
    place: Place
    began: float
    step: int
    process: subprocess.Popen


def gpu_places(count: int, limit: int | None, each: int | None, side_by_side: int) -> list[Place]:
    """Places on GPUs.

    Args:
        count: GPUs that are visible.
        limit: --gpus, how many of them to use; None for all.
        each: GPUs of one job; None for all of them.
        side_by_side: jobs at a time on the same GPUs.
    Raises:
        UserError: more are asked for than there are.
    """
    use = count if limit is None else limit
    each = use if each is None else each
    if use > count or each > use:
        flag, asked = ("--gpus", use) if use > count else ("--gpus-per-cell", each)
        raise UserError(f"{flag} '{asked}': {count if use > count else use} are there, give that many at most")
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = (given or [str(number) for number in range(count)])[:use]
    groups = [",".join(names[start : start + each]) for start in range(0, use - each + 1, each)]
    # All GPUs get a job before any of them gets a second one.
    return [Place(f"GPU {group}", {"CUDA_VISIBLE_DEVICES": group}) for _ in range(side_by_side) for group in groups]


def cpu_places(side_by_side: int) -> list[Place]:
    """Places that share the cores of this machine evenly, unless OMP_NUM_THREADS is set."""
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS") or (str(max(1, cores // side_by_side)) if side_by_side > 1 else "")
    return [Place("CPU", {"OMP_NUM_THREADS": threads} if threads else {})] * side_by_side


def run_jobs(
    jobs: Sequence[Job],
    places: Sequence[Place],
    *,
    started: Callable[[Job, Place], None],
    ended: Callable[[Job, str, int, float], None],
    changed: Callable[[list[int]], None],
    pass_fds: tuple[int, ...] = (),
) -> int:
    """Run all jobs, in their order, as places become free.

    SIGINT, SIGHUP, SIGTERM and SIGUSR1 are passed on to the running commands, without repetitions of the same request
    (`stopping.Requests`); no other job is started then.

    Args:
        jobs: what to run.
        places: how many at a time, and where.
        started: called when a job starts.
        ended: called when one ends by itself, with its last step, that one's exit status and the job's time (s).
        changed: called with the process ids of all running commands whenever they change.
        pass_fds: file descriptors that the commands inherit.
    Returns:
        0, or the number of the first signal.
    """
    waiting, free, running = deque(jobs), deque(places), list[_Running]()

    def launch(job: Job, place: Place, step: int, signals: Signals) -> subprocess.Popen:
        process = _launch(job, place, step, pass_fds)
        signals.send_to(process)
        return process

    with passed_on_signals(second_kills=False) as signals:
        try:
            while running or (waiting and not signals.received):
                before = [one.process.pid for one in running]
                while waiting and free and not signals.received:
                    job, place = waiting.popleft(), free.popleft()
                    started(job, place)
                    running.append(_Running(job, place, time.monotonic(), 0, launch(job, place, 0, signals)))
                for one in list(running):
                    status = one.process.poll()
                    if status == 0 and one.step + 1 < len(one.job.steps) and not signals.received:
                        one.step += 1
                        one.process = launch(one.job, one.place, one.step, signals)
                    elif status is not None:
                        running.remove(one)
                        free.append(one.place)
                        if status == 0 and one.step + 1 == len(one.job.steps) or not signals.received:
                            code = status if status >= 0 else 128 - status
                            ended(one.job, one.job.steps[one.step][0], code, time.monotonic() - one.began)
                now = [one.process.pid for one in running]
                if now != before:
                    changed(now)
                if running:
                    with suppress(subprocess.TimeoutExpired):
                        running[0].process.wait(POLL_SECONDS)
        finally:
            for one in running:  # only where this loop itself failed
                one.process.terminate()
    return signals.received[0] if signals.received else 0


def _launch(job: Job, place: Place, step: int, pass_fds: tuple[int, ...]) -> subprocess.Popen[Any]:
    _, words = job.steps[step]
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        log.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(words)}\n".encode(errors="surrogateescape"))
        log.flush()
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **place.environment},
            pass_fds=pass_fds,
            start_new_session=True,  # a Ctrl-C reaches only this process, which passes it on once
        )
