"""Batches: every sentence is in one, and every one counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fairseq.data import data_utils
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer

from intra_distillation_fairseq.compat.wrapping import wrap


def keep_last_batch() -> None:
    """P1: fairseq-fixed drops the end of a set whose size is no multiple of --required-batch-size-multiple."""

    def wrapper(batch_by_size: Callable) -> Callable:
        def batch_by_size_keeping_all(indices, *args, **kwargs):
            if not isinstance(indices, np.ndarray):
                indices = np.fromiter(indices, dtype=np.int64)
            if len(indices) == 0:
                return []
            batches = batch_by_size(indices, *args, **kwargs)
            kept = sum(len(batch) for batch in batches)
            return [*batches, indices[kept:]] if kept < len(indices) else batches

        return batch_by_size_keeping_all

    wrap(data_utils, "batch_by_size", wrapper)


def count_batches_beside_an_empty_one() -> None:
    """P12: of several processes with --update-freq, the last ones may end an epoch with batches and then an empty one.

    fairseq computes something for the empty one, so that all processes take part, and then forgets the whole group:
    the gradient of its other batches counts, but their tokens do not, neither in what the gradient is divided by nor in
    the log. Here the empty one comes first, after which fairseq counts the group, and counts as nothing itself.
    """

    def empty_first(train_step: Callable) -> Callable:
        def train_step_empty_first(self, samples, *args, **kwargs):
            return train_step(self, sorted(samples, key=bool), *args, **kwargs)

        return train_step_empty_first

    def counting_nothing(train_step: Callable) -> Callable:
        def train_step_counting_nothing(self, *args, ignore_grad=False, **kwargs):
            loss, size, log = train_step(self, *args, ignore_grad=ignore_grad, **kwargs)
            if ignore_grad:
                size, log = _nothing(size), {name: _nothing(value) for name, value in log.items()}
            return loss, size, log

        return train_step_counting_nothing

    wrap(Trainer, "train_step", empty_first)
    wrap(FairseqTask, "train_step", counting_nothing)


def _nothing(value: Any) -> Any:
    if torch.is_tensor(value):
        return torch.zeros_like(value)
    return type(value)(0) if isinstance(value, (int, float)) else value  # a criterion of somebody's may log anything
