"""fairseq's translation task, which tells the criterion the update number, adds routers' losses and resumes exactly."""

# No `from __future__ import annotations` here: fairseq reads the types of a configuration's fields when it is imported.
from dataclasses import dataclass
from typing import Any

from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from intra_distillation_fairseq.tasks.bad_numbers import BadNumbersConfig, BadNumbersMixin
from intra_distillation_fairseq.tasks.long_sentences import LongSentencesMixin
from intra_distillation_fairseq.tasks.rank_masks import RankMasksMixin
from intra_distillation_fairseq.tasks.router_loss import RouterLossMixin
from intra_distillation_fairseq.tasks.sensitivity_log import SensitivityLogConfig, SensitivityLogMixin
from intra_distillation_fairseq.tasks.stop_on_signal import StopOnSignalMixin

# fairseq composes a fresh training's batches at its first epoch.
FIRST_EPOCH = 1


class UpdateNumberMixin:
    """Put before any fairseq task class to let a criterion see the number of completed updates.

    fairseq itself tells nobody but the model. The number is 0 in the first step and stays the same over the batches of
    `--update-freq` and after an overflow in float16.
    """

    hands_on_update_number = True

    def train_step(self, sample, model, criterion, optimizer, update_num, *args, **kwargs):
        if hasattr(criterion, "set_num_updates"):
            criterion.set_num_updates(update_num)
        return super().train_step(sample, model, criterion, optimizer, update_num, *args, **kwargs)


class ExactResumeMixin:
    """Makes training resumed in a later epoch equal to training that never stopped (docs/fairseq.md, P2).

    fairseq-fixed composes batches under seed + epoch and keeps them: a run that started in epoch 1 trains on the
    batches of epoch 1 for ever, one that resumes in epoch 3 on those of epoch 3. Here they are composed for epoch 1 in
    both; the order of the batches still changes from epoch to epoch.
    """

    def get_batch_iterator(self, dataset, *args: Any, **kwargs: Any):
        if kwargs.get("update_epoch_batch_itr") or kwargs.get("disable_iterator_cache"):
            return super().get_batch_iterator(dataset, *args, **kwargs)  # new batches in each epoch were asked for
        epoch = kwargs.get("epoch", FIRST_EPOCH)
        is_cached = dataset in self.dataset_to_epoch_iter
        epoch_iterator = super().get_batch_iterator(dataset, *args, **{**kwargs, "epoch": FIRST_EPOCH})
        if not is_cached:
            dataset.set_epoch(epoch)
            epoch_iterator.epoch = max(epoch, FIRST_EPOCH)
        return epoch_iterator


@dataclass
class TranslationIntraDistillationConfig(TranslationConfig, SensitivityLogConfig, BadNumbersConfig):
    """That of `translation`, the flags of the measurement while training, and what to do about bad numbers."""


@register_task("translation_intra_distillation", dataclass=TranslationIntraDistillationConfig)
class TranslationIntraDistillationTask(
    StopOnSignalMixin,
    BadNumbersMixin,
    LongSentencesMixin,
    RankMasksMixin,
    UpdateNumberMixin,
    SensitivityLogMixin,
    RouterLossMixin,
    ExactResumeMixin,
    TranslationTask,
):
    """Validation, generation and every other criterion behave as under `translation`."""
