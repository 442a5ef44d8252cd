"""How far a long step is and how much time it has left: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

# Each of the latest points is at least this long after the one before, so the rate is that of the last five minutes, or
# of the last hundred points where they come more rarely.
_POINTS, _APART_S = 100, 3.0
# In a file: a line when a fifth of the time so far has passed since the line before, within these limits.
_SHARE, _LEAST_S, _MOST_S = 0.2, 10.0, 600.0
_REFRESH_S = 0.1  # of the bar


def duration(seconds: float) -> str:
    """A time to wait, as exact as it is worth: `40 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def rest(left: int, total: int, unit: str, seconds: float | None) -> str:
    """What is left of a series: `3 of 8 cells left, about 2 h 10 min`.

    Args:
        left: how many.
        total: how many in all.
        unit: the name of one of them, in the plural.
        seconds: that they will take, None where it cannot be told.
    """
    text = f"{left} of {total} {unit} left"
    return f"{text}, about {duration(seconds)}" if left and seconds else text


class Pace:
    """Time left by the rate of the latest progress, not since the beginning: a resumed step begins in the middle.

    Args:
        total: how many units in all, 0 if nobody knows.
        clock: seconds.
    """

    def __init__(self, total: float, clock: Callable[[], float] = time.monotonic):
        self._total, self._clock = total, clock
        self._points: deque[tuple[float, float]] = deque(maxlen=_POINTS)

    def note(self, done: float) -> None:
        """So many units are done now. Fewer than before: it goes on from there."""
        points, now = self._points, self._clock()
        if points and done < points[-1][1]:
            points.clear()
        if len(points) > 1 and now - points[-2][0] < _APART_S:
            points.pop()
        points.append((now, done))

    def seconds_left(self) -> float | None:
        """None where it cannot be told (yet)."""
        if not self._total or not self._points:
            return None
        (began, first), (now, done) = self._points[0], self._points[-1]
        if done >= self._total:
            return 0.0
        return (self._total - done) * (now - began) / (done - first) if done > first and now > began else None

    def text(self) -> str:
        """As in `12 min left`; "" where it cannot be told, or nothing is left."""
        seconds = self.seconds_left()
        return f"{duration(seconds)} left" if seconds else ""

    def rest(self, unit: str) -> str:
        """What is left, where units are few and each takes long; as of `rest`."""
        done = self._points[-1][1] if self._points else 0
        return rest(int(self._total - done), int(self._total), unit, self.seconds_left())


class Progress:
    """Progress of one long step, on stderr.

    Args:
        label: what is going on.
        total: how many units, 0 if nobody knows.
        unit: the name of the units.
        clock: seconds.
        stream: instead of stderr.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ):
        self._label, self._total, self._unit = label, total, unit
        self._clock, self._stream = clock, stream or sys.stderr
        self._pace = Pace(total, clock)
        self._began = self._shown = clock()
        self._latest: tuple[int, dict[str, float]] | None = None  # not shown yet
        self._has_spoken = False
        self._bar = _bar(label, total, unit, self._stream) if self._stream.isatty() else None

    def show(self, done: int, values: dict[str, float] | None = None) -> None:
        """So many units are done; `values` stand beside that."""
        self._pace.note(done)
        waited, so_far = self._clock() - self._shown, self._clock() - self._began
        wait = _REFRESH_S if self._bar is not None else min(max(_SHARE * so_far, _LEAST_S), _MOST_S)
        self._latest = done, values or {}
        if waited >= wait:
            self._print(*self._latest)

    def milestone(self, done: int, values: dict[str, float]) -> None:
        """The same at a point that is worth a line of its own in a file."""
        self._pace.note(done)
        self._print(done, values)

    def write(self, line: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Show the end, in a file where there were lines before, and leave the bar on the screen."""
        if self._latest and (self._bar is not None or self._has_spoken):
            self._print(*self._latest)
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self, done: int, values: dict[str, float]) -> None:
        self._shown, self._latest, self._has_spoken = self._clock(), None, True
        notes = [
            note for note in (self._pace.text(), *(f"{name} {value:.4g}" for name, value in values.items())) if note
        ]
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix_str(", ".join(notes))
            return
        of = f"/{self._total} {self._unit} ({done / self._total:.0%})" if self._total else f" {self._unit}"
        print(", ".join([f"{self._label}: {done}{of}", *notes]), file=self._stream, flush=True)


def _bar(label: str, total: int, unit: str, stream: TextIO):
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread: processes are forked while a bar is drawn
    done = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}" if total else "{n_fmt}"
    form = "{desc}: " + done + " {unit}{postfix}"
    return tqdm(total=total or None, desc=label, unit=unit, dynamic_ncols=True, bar_format=form, file=stream)
