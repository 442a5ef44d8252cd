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
    every module, to print every gradient and to leave with a stack trace; in float16 every such gradient is an overflow
    to it, that of a loss of NaN too. A task with `begin_update`, `check_loss`, `check_gradient` and `note_skipped`
    (`tasks/bad_numbers.py`) decides instead.
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
                if getattr(self.optimizer, "scaler", self) is None:
                    # bfloat16: what fairseq was to multiply this gradient by, which it forgets only in the other
                    # precisions. It may be NaN itself.
                    self.optimizer._multiply_factor = 1.0
                _count_skipped()
                if self.cfg.common.fp16:
                    scale = self.optimizer.scaler.loss_scale
                    metrics.log_scalar("loss_scale", scale, priority=700, round=4, weight=0)
                metrics.log_stop_time("train_wall")
                return None  # as fairseq says of any batch that led to no update

        return train_step_or_skip

    def checking(clip_grad_norm: Callable) -> Callable:
        def clip_grad_norm_checked(self: Trainer, clip_norm: float) -> Any:
            update, scale = self.get_num_updates() + 1, LossScale(self)
            try:
                norm = _optimizer_that_clips(self, clip_grad_norm)(clip_norm)
            except (OverflowError, FloatingPointError) as error:  # the loss scale has been lowered, or cannot be
                _ask_about_loss(self, update, "the gradient is not finite", scale)
                raise _answer_to_overflow(self, update, error, scale) from error
            value = float(norm)
            if math.isfinite(value):
                if hasattr(self.task, "check_gradient"):
                    self.task.check_gradient(value, update, clip_norm)
                return norm
            _ask_about_loss(self, update, f"the gradient is not finite (norm {value})", scale)
            # --amp: fairseq lowers the loss scale and tries the batch again, a few times.
            if scale.is_used and self._amp_retries == self.cfg.common.amp_batch_retries:
                _note_skipped(self.task, update, "overflow in float16", bounded=True)
                _count_skipped()
            return norm

        return clip_grad_norm_checked

    wrap(Trainer, "train_step", skipping)
    wrap(Trainer, "clip_grad_norm", checking)


def _ask_about_loss(trainer: Trainer, update: int, why: str, scale: LossScale) -> None:
    """Called in every process where the gradient is not finite: it is all of them or none, as they have the same one.

    Returns where it may be an overflow, which a lower loss scale mends, and where the task has no say.
    """
    if not hasattr(trainer.task, "check_loss"):
        return
    try:
        trainer.task.check_loss(update, why, _processes_with_this_gradient(trainer), may_be_overflow=scale.is_used)
    except UpdateSkipped:
        scale.restore()
        raise


def _answer_to_overflow(trainer: Trainer, update: int, overflow: ArithmeticError, scale: LossScale) -> BaseException:
    if isinstance(overflow, FloatingPointError):
        return SystemExit(
            f"error: update {update}: {' '.join(str(overflow).split())} Checkpoints are as they were: train on in "
            "another --save-dir with --continue-once CHECKPOINT, an older one, and a lower --lr, or anew in bfloat16 "
            "or float32"
        )
    _note_skipped(trainer.task, update, f"overflow in float16, {overflow}", bounded=scale.was_lowered())
    return UpdateSkipped()


class LossScale:
    """That of float16's gradients, as it is before an update; other precisions use none."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._is_amp = _scales_amp(trainer)
        self.is_used = self._is_amp or trainer.cfg.common.fp16
        self._before = vars(trainer.optimizer.scaler).copy() if trainer.cfg.common.fp16 else {}

    def was_lowered(self) -> bool:
        """In float16 without --amp."""
        return self._trainer.optimizer.scaler.loss_scale < self._before["loss_scale"]

    def restore(self) -> None:
        """Undo what a gradient that is not finite did to it, for an update that fairseq hears no more of."""
        if self._is_amp:
            scaler = self._trainer.optimizer.scaler
            scaler.update(scaler.get_scale())  # which has not been lowered yet; ready for the next gradient
            self._trainer._amp_retries = 0
        elif self.is_used:
            vars(self._trainer.optimizer.scaler).update(self._before)


def _scales_amp(trainer: Trainer) -> bool:
    return trainer.cfg.common.amp and trainer.optimizer.scaler.is_enabled()  # not on a CPU


def _processes_with_this_gradient(trainer: Trainer) -> Any:
    """A process group, or None for this process alone: one, or each with a gradient of its own, as fairseq knows it."""
    own = trainer.cfg.optimization.use_bmuf or trainer.cfg.distributed_training.ddp_backend == "slowmo"
    return None if own or trainer.data_parallel_world_size == 1 else trainer.data_parallel_process_group


def _optimizer_that_clips(trainer: Trainer, clip_grad_norm: Callable) -> Callable:
    if trainer.cfg.common.amp and not _scales_amp(trainer):
        return trainer.optimizer.fp32_optimizer.clip_grad_norm  # --amp on a CPU: fairseq's own looks for a loss scale
    return lambda clip_norm: clip_grad_norm(trainer, clip_norm)


def _count_skipped() -> None:
    metrics.log_scalar_sum("skipped", 1, priority=710)


def _note_skipped(task: Any, update: int, why: str, bounded: bool) -> None:
    if hasattr(task, "note_skipped"):
        task.note_skipped(update, why, bounded)
    else:
        logger.info("update %d skipped: %s", update, why)
