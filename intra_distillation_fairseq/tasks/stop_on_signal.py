"""Carries a process's request to stop to all processes, with what fairseq sums over them at each update anyway."""

from __future__ import annotations

from typing import Any

from intra_distillation_fairseq import stopping

_KEY = "stop_requested"


class StopOnSignalMixin:
    """Put before any fairseq task class: SIGTERM and SIGUSR1 save and end a training with status 75.

    Attributes:
        stop_agreed: at the last update some process had been asked to; the same in all processes.
    """

    stop_agreed = False

    def train_step(self, *args: Any, **kwargs: Any):
        loss, sample_size, logging_output = super().train_step(*args, **kwargs)
        return loss, sample_size, {**logging_output, _KEY: int(stopping.request.signal is not None)}

    def reduce_metrics(self, logging_outputs, criterion) -> None:
        """As it is: the request is no metric."""
        if any(_KEY in log for log in logging_outputs):  # else validation
            self.stop_agreed = sum(float(log[_KEY]) for log in logging_outputs if _KEY in log) > 0
            logging_outputs = [{name: log[name] for name in log if name != _KEY} for log in logging_outputs]
        super().reduce_metrics(logging_outputs, criterion)
