"""What becomes of an update whose numbers go wrong: skipped, counted and named, or the end of the training."""

# No `from __future__ import annotations` here: fairseq reads the types of a configuration's fields when it is imported.
import logging
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from torch import Tensor

from intra_distillation_fairseq.compat.overflow import UpdateSkipped

logger = logging.getLogger(__name__)

# A bad batch passes; a model that gives no finite number any more never recovers.
MOST_SKIPPED_IN_A_ROW = 10

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
            "help": "where the gradient is NaN or infinite: skip the update, as float16 does anyway after an overflow, "
            f"and stop after {MOST_SKIPPED_IN_A_ROW} in a row; or stop at the first one"
        },
    )


class _Batch(NamedTuple):
    """One of --update-freq batches of an update. Nothing of it is read, and waited for, before there is trouble."""

    ids: Optional[Tensor]
    logging_output: dict[str, Any]


class BadNumbersMixin:
    """Put before any fairseq task class to say what happens to an update whose gradient is not finite.

    The trainer calls `begin_update`, `note_skipped` and `check_gradient` (`compat/overflow.py`), in each process with
    the same gradient norm. A skipped update leaves parameters, optimizer and number of updates as they were; the log
    counts such updates as `skipped` and spikes as `spikes`, each per log interval and per epoch.
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
        self._batches.append(_Batch(sample.get("id"), logging_output))
        return loss, sample_size, logging_output

    def begin_update(self) -> None:
        """Called before the first batch of an update."""
        self._batches.clear()

    def note_skipped(self, update: int, why: str, bounded: bool) -> None:
        """Called for an update that is not made, to say so.

        Args:
            update: number that it would have had.
            why: in words.
            bounded: somebody else sees to it that this does not go on for ever, as the least loss scale does.

        Raises:
            SystemExit: it has been going on for too long.
        """
        self._skipped_in_a_row += not bounded
        if self._skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise SystemExit(
                f"error: update {update}: {why}: the {MOST_SKIPPED_IN_A_ROW}th batch in a row that leads to no update; "
                f"{self._what_was_trained_on()}; checkpoints are as they were: the model itself gives "
                "no finite numbers any more: go on from an older checkpoint with --restore-file, at a lower --lr or "
                "with --clip-norm"
            )
        logger.log(
            logging.INFO if bounded else logging.WARNING,
            f"update {update} skipped: {why}; {self._what_was_trained_on()}",
        )

    def check_gradient(self, norm: float, update: int, clip_norm: float) -> None:
        """Called when the gradient of all processes is known, before the optimizer makes its step.

        Args:
            norm: of the gradient, not yet clipped; the same in each process.
            update: number that this update will have.
            clip_norm: --clip-norm, 0 for none.

        Raises:
            UpdateSkipped: norm is not finite, and the policy is to go on.
            SystemExit: norm is not finite, and the policy is to stop, now or after so many.
        """
        if not math.isfinite(norm):
            why = f"the gradient is not finite (norm {norm})"
            if self._nan_policy == "stop":
                raise SystemExit(
                    f"error: update {update}: {why}; {self._what_was_trained_on()}; checkpoints are as "
                    "they were: look at these sentences, lower --lr or give --clip-norm, or go on without this batch "
                    "with --id-nan-policy skip"
                )
            self.note_skipped(update, why, bounded=False)
            raise UpdateSkipped
        self._skipped_in_a_row = 0
        usual = self._norms.value
        if self._norms.is_spike(norm):
            metrics.log_scalar_sum("spikes", 1, priority=410)
            outcome = f"clipped to {clip_norm:g}" if clip_norm > 0 else "not clipped (--clip-norm is 0)"
            logger.warning(
                f"update {update}: a spike: gradient norm {norm:.4g}, {norm / usual:.0f} times the usual {usual:.4g}, "
                f"{outcome}; {self._what_was_trained_on()}"
            )
        self._norms.take(norm)

    def reduce_metrics(self, logging_outputs, criterion) -> None:
        """As it is; nothing is divided by the 0 tokens of a batch of padding."""
        sizes = [[log.get(name) for log in logging_outputs] for name in ("ntokens", "sample_size")]
        if any(None not in values and sum(values) == 0 for values in sizes):
            metrics.log_scalar("loss", 0.0, weight=0)  # of weight 0: no part of any mean
            return
        super().reduce_metrics(logging_outputs, criterion)

    def _what_was_trained_on(self) -> str:
        """The sentences and the terms of the loss; of several batches those whose terms are not finite, if any is."""
        described = [_describe(batch) for batch in self._batches]
        guilty = [text for text, is_finite in described if not is_finite]
        rank = distributed_utils.get_global_rank()
        return f"rank {rank}: {'; '.join(guilty or [text for text, _ in described]) or 'no batch'}"


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


def _describe(batch: _Batch) -> tuple[str, bool]:
    """(sentences and terms in words, all terms are finite). Terms per token and base 2, as in the log."""
    log = batch.logging_output
    scale = max(float(log.get("ntokens", 1)), 1.0) * math.log(2)
    terms = {name: float(value) / scale for name, value in log.items() if name.endswith("loss")}
    named = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
    ids = "unknown" if batch.ids is None else " ".join(map(str, torch.as_tensor(batch.ids).flatten().tolist()))
    alpha = f", id_alpha {float(log['id_alpha']):.4g}" if "id_alpha" in log else ""
    return f"sentences {ids} ({named}{alpha})", all(math.isfinite(value) for value in terms.values())
