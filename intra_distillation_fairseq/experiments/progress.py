"""Shows progress on stderr: a bar on a terminal, a line now and then where the output goes to a file."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Progress:
    """Progress of one long step.

    Args:
        label: what is going on.
        total: how many units, 0 if nobody knows.
        unit: the name of one unit.
    """

    def __init__(self, label: str, total: int, unit: str):
        self._label, self._total, self._unit = label, total, unit
        self._bar = (
            tqdm(total=total or None, desc=label, unit=unit, dynamic_ncols=True) if sys.stderr.isatty() else None
        )

    def show(self, done: int, values: dict[str, float] | None = None) -> None:
        """Move the bar to `done` units and show values beside it."""
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix(values or {}, refresh=True)

    def milestone(self, done: int, values: dict[str, float]) -> None:
        """The same at a point worth a line of its own in a file."""
        self.show(done, values)
        if self._bar is None:
            of = f"/{self._total}" if self._total else ""
            text = "".join(f", {name} {value:.4g}" for name, value in values.items())
            print(f"{self._label}: {done}{of} {self._unit}{text}", file=sys.stderr, flush=True)

    def write(self, line: str) -> None:
        """Print a line without breaking the bar."""
        tqdm.write(line, file=sys.stderr) if self._bar is not None else print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar, leaving it on the screen."""
        if self._bar is not None:
            self._bar.close()
