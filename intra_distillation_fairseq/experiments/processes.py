"""Runs one of fairseq's commands: output into files, signals passed on, the end of the log shown when it fails."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from intra_distillation_fairseq import stopping
from intra_distillation_fairseq.corpus.workers import die_with_parent
from intra_distillation_fairseq.errors import UserError

POLL_SECONDS = 0.2
PASSED_ON = (signal.SIGINT, signal.SIGHUP, *stopping.SIGNALS)
# Warnings that fairseq raises on today's PyTorch and hydra whatever one does. Each line: start of the message, category
# and module, in Python's own format for PYTHONWARNINGS; nothing else is hidden.
HARMLESS_WARNINGS = (
    "ignore:'pin_memory' argument is set as true:UserWarning",
    "ignore:`torch.cuda.amp.autocast(args...)` is deprecated:FutureWarning",
    "ignore:`torch.cuda.amp.GradScaler(args...)` is deprecated:FutureWarning",
    "ignore:Support for mismatched key_padding_mask:UserWarning",
    # Messages of hydra begin with a line break or hold a colon, neither of which this format can name. So these lines
    # hide every UserWarning of a module; "sys" is where Python puts those it cannot trace to a module.
    "ignore::UserWarning:hydra.experimental.initialize",
    "ignore::UserWarning:hydra.experimental.compose",
    "ignore::UserWarning:hydra.core.default_element",
    "ignore::UserWarning:hydra.compose",
    "ignore::UserWarning:sys",
)


def fairseq_command(name: str) -> str:
    """Path of one of fairseq's commands, of the environment this program runs in.

    Raises:
        UserError: fairseq is not installed there.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise UserError(f"'{name}' is not installed beside {sys.executable}: run scripts/setup.sh")
    return found


def run_logged(
    command: list[str],
    output: Path,
    errors: Path | None = None,
    *,
    follow: Callable[[str], None],
    started: Callable[[int], None] = lambda pid: None,
    pass_fds: tuple[int, ...] = (),
    append: bool = False,
    dies_with_us: bool = False,
) -> int:
    """Run a command to its end.

    The command writes straight into the files, so that it does not depend on this process being alive. The signals of
    `passed_on_signals` are passed on to it; a second one kills it.

    Args:
        command: words of the command.
        output: file for its standard output.
        errors: file for its standard error; None for the same file.
        follow: called with each complete line of `output`, soon after it is written.
        started: called once with the process id of the command.
        pass_fds: file descriptors that the command inherits.
        append: keep what is in `output`, and follow only what is new.
        dies_with_us: end it if this process is killed, for a command whose result nobody else would read.
    Returns:
        Exit status; 128 + signal where a signal ended it, or where this process was sent one and the command did not
        fail for a reason of its own, nor save and end with `stopping.STATUS`.
    """
    with passed_on_signals() as signals:
        with open(output, "ab" if append else "wb") as out, open(errors or os.devnull, "wb") as err:
            start = out.tell()
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err if errors else subprocess.STDOUT,
                env=_environment(),
                pass_fds=pass_fds,
                start_new_session=True,  # a Ctrl-C reaches only this process, which passes it on once
                preexec_fn=die_with_parent if dies_with_us else None,
            )
        signals.send_to(child)
        started(child.pid)
        _follow(child, output, start, follow)
    # Whoever is asked to stop may still find the disk full. An interrupt from the keyboard may look like an error.
    failed = child.returncode > 0 and (child.returncode == stopping.STATUS or signals.received[:1] != [signal.SIGINT])
    if signals.received and not failed:
        return 128 + signals.received[0]
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _follow(child: subprocess.Popen, output: Path, start: int, follow: Callable[[str], None]) -> None:
    """Hand over each line of the file from byte `start` on, until the child has ended."""
    with open(output, "rb") as lines:
        lines.seek(start)
        rest = b""
        while True:
            ended = child.poll() is not None  # asked first, so that the last lines are read after the end
            *complete, rest = (rest + lines.read()).split(b"\n")
            for line in complete:
                follow(line.decode("utf-8", errors="replace"))
            if ended:
                break
            with suppress(subprocess.TimeoutExpired):
                child.wait(POLL_SECONDS)


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a text file."""
    with open(path, "rb") as handle:
        handle.seek(max(0, path.stat().st_size - 65536))
        return "\n".join(handle.read().decode("utf-8", errors="replace").rstrip("\n").split("\n")[-lines:])


def describe_status(status: int) -> str:
    """An exit status in words."""
    if status == stopping.STATUS:
        return "a signal"
    if status <= 128:
        return f"exit status {status}"
    name = signal.Signals(status - 128).name if status - 128 in list(signal.Signals) else f"signal {status - 128}"
    return f"{name} (too little memory is the usual reason)" if name == "SIGKILL" else name


def was_stopped(status: int) -> bool:
    """Whether an exit status means that a signal asked for the end, so that the same command goes on."""
    return status == stopping.STATUS or status - 128 in PASSED_ON


def _environment() -> dict[str, str]:
    warnings = [text for text in (",".join(HARMLESS_WARNINGS), os.environ.get("PYTHONWARNINGS")) if text]
    # Unbuffered and UTF-8: the log is read while it is written, and paths may hold any letter whatever the locale.
    return {
        **os.environ,
        "PYTHONWARNINGS": ",".join(warnings),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }


class Signals(stopping.Requests):
    """Passes signals on to the process groups of children.

    Args:
        second_kills: a second signal kills the children at once; else they are given it as it is.
    """

    def __init__(self, second_kills: bool) -> None:
        super().__init__()
        self._second_kills = second_kills
        self._children: list[subprocess.Popen] = []

    def __call__(self, number: int, frame: object) -> None:
        if not self.add(number):
            return
        for child in self._children:
            self._pass_on(child)

    def send_to(self, child: subprocess.Popen) -> None:
        """From now on to this child, too; also what came while it was being started."""
        self._children = [*(one for one in self._children if one.returncode is None), child]
        if self.received:
            self._pass_on(child)

    def _pass_on(self, child: subprocess.Popen) -> None:
        if child.returncode is not None:
            return
        kill = self._second_kills and len(self.received) > 1
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL if kill else self.received[0])


@contextmanager
def passed_on_signals(second_kills: bool = True) -> Iterator[Signals]:
    """Handle SIGINT, SIGHUP, SIGTERM and SIGUSR1; set before a child starts, which so gets the default handlers.

    Args:
        second_kills: see `Signals`.
    Yields:
        What has been received, and whom to pass it on to.
    """
    signals = Signals(second_kills)
    if threading.current_thread() is not threading.main_thread():
        yield signals  # Python lets only the main thread handle signals
        return
    before = {number: signal.signal(number, signals) for number in PASSED_ON}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
