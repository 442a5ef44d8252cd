"""Batches: every sentence is in one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from fairseq.data import data_utils

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
