"""Curves on boards: --wandb-project."""

from __future__ import annotations

from collections.abc import Callable

from fairseq.logging import progress_bar

from intra_distillation_fairseq.compat.wrapping import wrap


def start_wandb_once() -> None:
    """Every epoch and every validation calls wandb.init() anew, which today leaves an empty folder each time."""

    def wrapper(start: Callable) -> Callable:
        def __init__(self, wrapped_bar, wandb_project, run_name=None):
            if getattr(progress_bar.wandb, "run", None) is None:
                start(self, wrapped_bar, wandb_project, run_name)
            else:
                self.wrapped_bar = wrapped_bar  # it logs to the run that is there

        return __init__

    wrap(progress_bar.WandBProgressBarWrapper, "__init__", wrapper)
