"""A training that is asked to stop saves and leaves, at the same update in all its processes."""

from __future__ import annotations

import atexit
import logging
import math
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.data.iterators import BackgroundConsumer
from fairseq.distributed import utils as distributed_utils

from intra_distillation_fairseq import stopping
from intra_distillation_fairseq.compat.wrapping import wrap
from intra_distillation_fairseq.whole_checkpoints import LAST

logger = logging.getLogger(__name__)


def stop_when_asked() -> None:
    """fairseq dies of a signal and loses what it has trained since its last checkpoint.

    Here the training goes through what is due at an update, and then saves and leaves if its task says that a process
    was asked to stop (`tasks/stop_on_signal.py`). Under another task, and before there is anything to save, a signal
    has its default action.
    """

    def watching(load: Callable) -> Callable:
        def load_checkpoint(cfg: Any, trainer: Any, **kwargs: Any):
            stops = hasattr(trainer.task, "stop_agreed")
            if stops:
                stopping.request.shield_forks()  # in a resume the first processes that load data start in here
            loaded = load(cfg, trainer, **kwargs)
            if stops:
                # The command, and `python -m fairseq_cli.train`.
                for name in ("fairseq_cli.train", "__main__"):
                    if hasattr(sys.modules.get(name), "validate_and_save"):
                        wrap(sys.modules[name], "validate_and_save", stopping_after)
                stopping.request.watch()
            return loaded

        return load_checkpoint

    def noting(save: Callable) -> Callable:
        def save_checkpoint(cfg: Any, trainer: Any, epoch_itr: Any, val_loss: float | None):
            saved = save(cfg, trainer, epoch_itr, val_loss)
            trainer.last_save = trainer.get_num_updates()
            return saved

        return save_checkpoint

    def stopping_after(validate_and_save: Callable) -> Callable:
        def validate_save_and_stop(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch):
            done = validate_and_save(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch)
            _, is_stopping = done
            is_last = end_of_epoch and epoch_itr.next_epoch_idx > (cfg.optimization.max_epoch or math.inf)
            if getattr(task, "stop_agreed", False) and not is_stopping and not is_last:
                _save_and_leave(cfg, trainer, epoch_itr)
            return done

        return validate_save_and_stop

    wrap(checkpoint_utils, "save_checkpoint", noting)
    wrap(checkpoint_utils, "load_checkpoint", watching)


def _save_and_leave(cfg: Any, trainer: Any, epoch_itr: Any) -> None:
    update = trainer.get_num_updates()
    wanted = not (cfg.checkpoint.no_save or cfg.checkpoint.no_last_checkpoints)
    if wanted and getattr(trainer, "last_save", None) != update:
        checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # who leaves first must not take the one that saves along
    signal_name = stopping.request.signal.name if stopping.request.signal else "a signal to another process"
    stopped = f"stopped at update {update} by {signal_name}"
    if not wanted:
        logger.info(f"{stopped}, not saved (--no-save or --no-last-checkpoints)")
        raise SystemExit(stopping.STATUS_NOT_SAVED)
    if cfg.checkpoint.restore_file == LAST:
        logger.info(f"{stopped}, saved: the same command goes on")
    else:
        logger.info(f"{stopped}, saved: the same command without --restore-file goes on; with it, it would begin again")
    raise SystemExit(stopping.STATUS)


def end_prefetching_at_exit() -> None:
    """Python may abort or hang where a thread still computes as it ends: after a stop, a full disk, a crash."""
    atexit.register(_end_prefetching)


def _end_prefetching() -> None:
    """Of each thread only the batch in hand is waited for."""
    for thread in threading.enumerate():
        if isinstance(thread, BackgroundConsumer):
            thread._max_len = 0
            while thread.is_alive():
                with suppress(queue.Empty):
                    thread._queue.get(timeout=0.01)


def pass_signals_on() -> None:
    """With one process per GPU, fairseq's first process only waits: what asks it to stop is meant for the others."""

    def wrapper(spawn: Callable) -> Callable:
        def spawn_passing_signals_on(fn, args=(), nprocs=1, join=True, *more, **kwargs):
            if fn is not distributed_utils.distributed_main or not join:
                return spawn(fn, args, nprocs, join, *more, **kwargs)
            with _passed_on() as signals:
                context = spawn(fn, args, nprocs, False, *more, **kwargs)
                signals.send_to(context.pids())
                try:
                    while not context.join():
                        pass
                except torch.multiprocessing.ProcessExitedException as error:
                    if error.exit_code > 0:  # it left of its own accord, and has said why: stopped, or "error: ..."
                        raise SystemExit(error.exit_code) from None
                    if signals.received and -error.exit_code in signals.received:  # it had nothing to save yet
                        stopping.end_by(-error.exit_code)
                    raise

        return spawn_passing_signals_on

    wrap(torch.multiprocessing, "spawn", wrapper)


class _PassedOn(stopping.Requests):
    """Hands each request on to other processes; the second one ends them and this process at once."""

    def __init__(self) -> None:
        super().__init__()
        self._processes: list[int] = []

    def __call__(self, number: int, frame: object) -> None:
        if self.add(number):
            self._send()

    def send_to(self, processes: list[int]) -> None:
        """From now on to these, also what has come before."""
        self._processes = processes
        if self.received:
            self._send()

    def _send(self) -> None:
        at_once = len(self.received) > 1
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL if at_once else self.received[0])
        if at_once:
            stopping.end_by(self.received[-1])


@contextmanager
def _passed_on() -> Iterator[_PassedOn]:
    signals = _PassedOn()
    if threading.current_thread() is not threading.main_thread():
        yield signals  # Python lets only the main thread handle signals
        return
    before = {number: signal.signal(number, signals) for number in stopping.SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
