"""Updates that go wrong: skipped on any device, and the task may have a say in each."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from fairseq.logging import metrics
from fairseq.trainer import Trainer

from intra_distillation_fairseq.compat.wrapping import wrap

logger = logging.getLogger(__name__)


class UpdateSkipped(Exception):
    """Raised between the reduction of the gradients and the optimizer's step: this update is not made."""


def let_updates_be_skipped() -> None:
    """After an overflow in float16 fairseq asks for a CUDA device, on a CPU too; other trouble it meets with a crash.

    fairseq's own answer to a gradient that is not finite is to save crash.pt, to run the batch again with a hook on
    every module, to print every gradient and to leave with a stack trace. A task with `begin_update`, `note_skipped`
    and `check_gradient` (`tasks/bad_numbers.py`) decides instead; all processes have the same gradient norm by then,
    so that they decide alike without asking each other.
    """

    def skipping(train_step: Callable) -> Callable:
        # The function inside fairseq's metrics.aggregate("train"), which an exception would leave switched on.
        inner = train_step.__wrapped__

        @metrics.aggregate("train")
        def train_step_or_skip(self: Trainer, samples: list, raise_oom: bool = False) -> Any:
            if hasattr(self.task, "begin_update"):
                self.task.begin_update()
            try:
                return inner(self, samples, raise_oom)
            except UpdateSkipped:
                self.zero_grad()
                _count_skipped()
                if self.cfg.common.fp16:
                    scale = self.optimizer.scaler.loss_scale
                    metrics.log_scalar("loss_scale", scale, priority=700, round=4, weight=0)
                metrics.log_stop_time("train_wall")
                return None  # as fairseq says of any batch that led to no update

        return train_step_or_skip

    def checking(clip_grad_norm: Callable) -> Callable:
        def clip_grad_norm_checked(self: Trainer, clip_norm: float) -> Any:
            update, scale = self.get_num_updates() + 1, loss_scale(self)
            try:
                norm = _optimizer_that_clips(self, clip_grad_norm)(clip_norm)
            except OverflowError as overflow:  # float16; the loss scale has been lowered
                lowered = loss_scale(self) < scale
                _note_skipped(self.task, update, f"overflow in float16, {overflow}", bounded=lowered)
                raise UpdateSkipped from overflow
            except FloatingPointError as error:
                raise SystemExit(
                    f"error: update {update}: {' '.join(str(error).split())} Checkpoints are as they were: "
                    "go on from an older one at a lower --lr, or train with --bf16 or in float32"
                ) from error
            if self.cfg.common.amp and self.optimizer.scaler.is_enabled():
                # fairseq lowers the loss scale and tries the batch again, a few times.
                if not math.isfinite(float(norm)) and self._amp_retries == self.cfg.common.amp_batch_retries:
                    _note_skipped(self.task, update, "overflow in float16", bounded=True)
                    _count_skipped()
            elif hasattr(self.task, "check_gradient"):
                self.task.check_gradient(float(norm), update, clip_norm)
            return norm

        return clip_grad_norm_checked

    wrap(Trainer, "train_step", skipping)
    wrap(Trainer, "clip_grad_norm", checking)


def loss_scale(trainer: Trainer) -> float:
    """That of float16's gradients; 1 in other precisions."""
    return trainer.optimizer.scaler.loss_scale if trainer.cfg.common.fp16 else 1.0


def _optimizer_that_clips(trainer: Trainer, clip_grad_norm: Callable) -> Callable:
    if trainer.cfg.common.amp and not trainer.optimizer.scaler.is_enabled():
        return trainer.optimizer.fp32_optimizer.clip_grad_norm  # --amp on a CPU: fairseq's own looks for a loss scale
    return lambda clip_norm: clip_grad_norm(trainer, clip_norm)


def _count_skipped() -> None:
    metrics.log_scalar_sum("skipped", 1, priority=710)


def _note_skipped(task: Any, update: int, why: str, bounded: bool) -> None:
    if hasattr(task, "note_skipped"):
        task.note_skipped(update, why, bounded)
    else:
        logger.info("update %d skipped: %s", update, why)
