"""A training is asked to stop: by which signals, how often they count, and the exit status that says it has obeyed."""

from __future__ import annotations

import os
import signal
import threading
import time

# What batch systems send before they take a machine away.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command goes on.
STATUS = 75

# That of a shell for a command that SIGTERM ended: it has been told to save nothing.
STATUS_NOT_SAVED = 128 + signal.SIGTERM

# A batch system signals every process of a job, and train.sh and the first of several processes pass on what they get:
# what comes this soon after the first signal is the same request.
SAME_SECONDS = 5.0


class Requests:
    """The signals that have come, without those that repeat the first.

    Attributes:
        received: their numbers, in order.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._first = 0.0

    def add(self, number: int) -> bool:
        """Note a signal; False where it repeats the first one."""
        now = time.monotonic()
        both = {number, *self.received[:1]}
        if self.received and both.issubset(SIGNALS) and now - self._first < SAME_SECONDS:
            return False
        if not self.received:
            self._first = now
        self.received.append(number)
        return True


class StopRequest:
    """Lets a process end when it is ready to. A second request ends it at once, as if nobody handled the signal."""

    def __init__(self) -> None:
        self._requests = Requests()
        self._process = 0
        self._shields_forks = False

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that asked, or None."""
        return signal.Signals(self._requests.received[0]) if self._requests.received else None

    def watch(self) -> None:
        """From now on a signal only notes the request. One that somebody else handles is left to them."""
        if self._process == os.getpid() or threading.current_thread() is not threading.main_thread():
            return
        self._process = os.getpid()
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, self._note)
        self.shield_forks()

    def shield_forks(self) -> None:
        """From now on the processes that this one forks end with it, and by its signals only."""
        if not self._shields_forks:
            self._shields_forks = True
            os.register_at_fork(
                before=_hold_back, after_in_parent=_let_through, after_in_child=_end_only_with_the_parent
            )

    def _note(self, number: int, frame: object) -> None:
        if self._requests.add(number) and len(self._requests.received) > 1:
            end_by(number)


def end_by(number: int) -> None:
    """End this process by a signal's default action, so that whoever waits for it sees what ended it."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class _Fork(threading.local):
    """The fork a thread is making: who makes it, and the signals that were held back there before."""

    parent = 0
    held_back: set[int] = set()


_fork = _Fork()


def _hold_back() -> None:
    """Before a fork: a signal, or the parent's end, may come before the new process runs its first line."""
    _fork.parent = os.getpid()
    _fork.held_back = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _fork.held_back)


def _end_only_with_the_parent() -> None:
    """In a process that loads data, which gets what a whole job is sent: if it ended first, the training would crash.

    A SIGTERM of the parent still ends it, and any after the parent's end.
    """
    threading.Thread(target=_wait_for_the_parent, args=(_fork.parent,), daemon=True).start()


def _wait_for_the_parent(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(SIGNALS)
        if received.si_signo == signal.SIGTERM and (received.si_pid == parent or os.getppid() != parent):
            os._exit(0)


request = StopRequest()
