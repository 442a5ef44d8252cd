"""How fairseq's commands end where the user made a mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable

from intra_distillation_fairseq.compat.wrapping import wrap
from intra_distillation_fairseq.errors import UserError


def end_with_one_line() -> None:
    """Under fairseq's commands print an error of the user as `error: ...`, without a traceback; the exit code stays 1.

    As where a checkpoint is refused: fairseq has no place to catch it. Python programs that import the plugin keep
    their tracebacks.
    """

    def wrapper(show: Callable) -> Callable:
        def show_in_one_line(kind, error, trace) -> None:
            if isinstance(error, UserError) and "fairseq_cli" in sys.modules:
                print(f"error: {error}", file=sys.stderr)
            else:
                show(kind, error, trace)

        return show_in_one_line

    wrap(sys, "excepthook", wrapper)
