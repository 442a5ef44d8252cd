"""Lines of progress, on stderr; stdout has results only."""

from __future__ import annotations

import sys

from intra_distillation_fairseq.experiments.reproduction import clock


def say(line: str) -> None:
    """Print a line."""
    print(line, file=sys.stderr, flush=True)


def say_with_time(line: str) -> None:
    """Print a line with the time, for what takes hours."""
    say(clock(line))
