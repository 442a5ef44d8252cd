"""What becomes of an update whose numbers go wrong: skipped, counted and named, or the end of the training."""

# No `from __future__ import annotations` here: fairseq reads the types of a configuration's fields when it is imported.
import logging
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import torch
import torch.distributed as dist
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from torch import Tensor

from intra_distillation_fairseq.compat.overflow import UpdateSkipped

logger = logging.getLogger(__name__)

# A bad batch passes; a model that gives no finite number any more never recovers.
MOST_SKIPPED_IN_A_ROW = 10

# Settings of a run cannot change in its folder; fairseq reads this flag while --save-dir has no checkpoint_last.pt.
ELSEWHERE = "train on in another --save-dir with --continue-once CHECKPOINT"

# A spike is a gradient norm above FACTOR times its running mean, over about the last MEMORY updates; there is none
# before that many. The norm of one batch seldom is twice that of the next.
SPIKE_FACTOR = 10.0
SPIKE_MEMORY = 50


@dataclass
class BadNumbersConfig(FairseqDataclass):
    """Flags of the policy."""

    id_nan_policy: ChoiceEnum(["skip", "stop"]) = field(
        default="skip",
        metadata={
            "help": "where the gradient is NaN or infinite, and in float16 the loss, too: skip the update, and stop "
            f"after {MOST_SKIPPED_IN_A_ROW} in a row; or stop at the first one"
        },
    )


class _Batch(NamedTuple):
    """One of --update-freq batches of an update. Nothing of it is read, and waited for, before there is trouble."""

    ids: Optional[Tensor]
    logging_output: dict[str, Any]
    # Of a batch in place of an empty share, which counts 0 times: finite or not is all that it tells.
    loss_of_stand_in: Optional[Tensor]


class _Told(NamedTuple):
    """What one process says of its batches of an update."""

    rank: int
    words: str
    is_finite: bool  # all terms of the loss


class BadNumbersMixin:
    """Put before any fairseq task class to say what happens to an update whose gradient is not finite.

    The trainer calls `begin_update` and, with the same gradient in each process, `check_gradient`, or `check_loss` and
    `note_skipped` (`compat/overflow.py`). A skipped update leaves parameters, optimizer and number of updates as they
    were; the log counts such updates as `skipped` and spikes as `spikes`, each per log interval and per epoch.
    """

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any):
        super().__init__(cfg, *args, **kwargs)
        self._nan_policy = str(getattr(cfg, "id_nan_policy", "skip"))
        self._batches: list[_Batch] = []
        self._skipped_in_a_row = 0
        self._norms = RunningMean()

    def train_step(self, sample, *args, **kwargs):
        """As it is, with a note of which sentences gave which terms of the loss."""
        loss, sample_size, logging_output = super().train_step(sample, *args, **kwargs)
        loss_of_stand_in = loss.detach() if kwargs.get("ignore_grad") else None
        self._batches.append(_Batch(sample.get("id"), logging_output, loss_of_stand_in))
        return loss, sample_size, logging_output

    def begin_update(self) -> None:
        """Called before the first batch of an update."""
        self._batches.clear()

    def check_loss(self, update: int, why: str, group: Optional[dist.ProcessGroup], may_be_overflow: bool) -> None:
        """Called where the gradient is not finite, by all processes of the group together.

        They tell each other about their losses, so that all have the same words, which name the guilty ones.

        Args:
            update: number that it would have had.
            why: in words.
            group: the processes with this gradient; None for this one alone.
            may_be_overflow: the gradient comes from a scaled loss, so that it may be infinite where the loss is not.

        Raises:
            UpdateSkipped: the policy is to go on.
            SystemExit: the policy is to stop, now or after so many.
        """
        # One exchange for each gradient that is not finite, whatever policy and precision: nobody waits in vain.
        # What is decided below depends only on what all have been told.
        told = _exchange(self._tell(), group)
        guilty = [one for one in told if not one.is_finite]
        if may_be_overflow and not guilty:
            return
        named = _in_words(guilty or told)
        if self._nan_policy == "stop":
            raise SystemExit(
                f"error: update {update}: {why}; {named}; checkpoints are as they were: look at these sentences; the "
                "same command with --id-nan-policy skip goes on without this batch; for another --lr or --clip-norm "
                f"{ELSEWHERE}"
            )
        self._skip(update, why, named, bounded=False, tells=told[0].rank == distributed_utils.get_global_rank())
        raise UpdateSkipped

    def note_skipped(self, update: int, why: str, bounded: bool) -> None:
        """Called after `check_loss` for an overflow in float16, whose update is not made, to say so.

        Args:
            update: number that it would have had.
            why: in words.
            bounded: the least loss scale sees to it that this does not go on for ever.

        Raises:
            SystemExit: it has been going on for too long.
        """
        mine = self._tell()
        self._skip(update, why, _in_words([mine]), bounded, tells=mine.rank == 0)

    def check_gradient(self, norm: float, update: int, clip_norm: float) -> None:
        """Called when the gradient of all processes is known and finite, before the optimizer makes its step.

        Args:
            norm: of the gradient, not yet clipped; the same in each process.
            update: number that this update will have.
            clip_norm: --clip-norm, 0 for none.
        """
        self._skipped_in_a_row = 0
        usual = self._norms.value
        if self._norms.is_spike(norm):
            metrics.log_scalar_sum("spikes", 1, priority=410)
            outcome = f"clipped to {clip_norm:g}" if clip_norm > 0 else "not clipped (--clip-norm is 0)"
            logger.warning(
                f"update {update}: a spike: gradient norm {norm:.4g}, {norm / usual:.0f} times the usual {usual:.4g}, "
                f"{outcome}; {_in_words([self._tell()])}"
            )
        self._norms.take(norm)

    def reduce_metrics(self, logging_outputs, criterion) -> None:
        """As it is; nothing is divided by the 0 tokens of a batch of padding."""
        sizes = [[log.get(name) for log in logging_outputs] for name in ("ntokens", "sample_size")]
        if any(None not in values and sum(values) == 0 for values in sizes):
            metrics.log_scalar("loss", 0.0, weight=0)  # of weight 0: no part of any mean
            return
        super().reduce_metrics(logging_outputs, criterion)

    def _skip(self, update: int, why: str, named: str, bounded: bool, tells: bool) -> None:
        self._skipped_in_a_row += not bounded
        if self._skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise SystemExit(
                f"error: update {update}: {why}: the {MOST_SKIPPED_IN_A_ROW}th batch in a row that leads to no update; "
                f"{named}; checkpoints are as they were: the model itself gives no finite numbers any more: {ELSEWHERE}"
                ", an older one, and a lower --lr or a --clip-norm"
            )
        if tells:
            level = logging.INFO if bounded else logging.WARNING
            logger.log(level, f"update {update} skipped: {why}; {named}")

    def _tell(self) -> _Told:
        """Of several batches only those with a term that is not finite, if there is one."""
        described = [_describe(batch) for batch in self._batches]
        guilty = [text for text, is_finite in described if not is_finite]
        words = "; ".join(guilty or [text for text, _ in described]) or "no batch"
        return _Told(distributed_utils.get_global_rank(), words, not guilty)


class RunningMean:
    """Exponential mean of the gradient norm. It is not saved: after a resume it starts anew."""

    def __init__(self) -> None:
        self.value = 0.0
        self._seen = 0

    def is_spike(self, norm: float) -> bool:
        """Whether a norm is out of all proportion to those before it."""
        return self._seen >= SPIKE_MEMORY and norm > SPIKE_FACTOR * self.value > 0

    def take(self, norm: float) -> None:
        """Take in the next norm; a spike counts as the least one, so that a lasting change becomes the usual."""
        norm = min(norm, SPIKE_FACTOR * self.value) if self.is_spike(norm) else norm
        self._seen += 1
        self.value += (norm - self.value) / min(self._seen, SPIKE_MEMORY)


def _exchange(mine: _Told, group: Optional[dist.ProcessGroup]) -> list[_Told]:
    """What each process says, in the order of their ranks. Sentences may be many, so it has no limit of length."""
    if group is None:
        return [mine]
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, mine, group=group)
    return told


def _in_words(told: list[_Told]) -> str:
    return "; ".join(f"rank {one.rank}: {one.words}" for one in told)


def _describe(batch: _Batch) -> tuple[str, bool]:
    """(sentences and terms in words, all terms are finite). Terms per token and base 2, as in the log."""
    log = batch.logging_output
    scale = max(float(log.get("ntokens", 1)), 1.0) * math.log(2)
    terms = {name: float(value) / scale for name, value in log.items() if name.endswith("loss")}
    ids = "unknown" if batch.ids is None else " ".join(map(str, torch.as_tensor(batch.ids).flatten().tolist()))
    alpha = f", id_alpha {float(log['id_alpha']):.4g}" if "id_alpha" in log else ""
    if batch.loss_of_stand_in is not None:
        terms, alpha = {"loss": float(batch.loss_of_stand_in)}, ""
        ids += " in place of an empty share"
    named = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
    return f"sentences {ids} ({named}{alpha})", all(math.isfinite(value) for value in terms.values())
