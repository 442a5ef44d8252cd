"""Commands stopped at a chosen moment, with everything they have started."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Read by every Python that a command starts. It counts what is done to the files of a folder, in all processes
# together, and from the wanted event on holds each process that comes to one: what is killed then is in a state that
# does not depend on how fast the machine is.
_HOOK = """
import os, signal, sys

def watch(folder, counter, last):
    file = os.open(counter, os.O_WRONLY | os.O_APPEND)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event, arguments):
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "subprocess.Popen"):
            return
        if event == "open" and not arguments[2] & writing:
            return
        if event != "subprocess.Popen":
            path = arguments[0]
            if not isinstance(path, (str, bytes)) or not os.path.abspath(os.fsdecode(path)).startswith(folder):
                return
        os.write(file, b".")
        while last and os.fstat(file).st_size >= last:
            signal.pause()

    sys.addaudithook(hook)

watch(os.environ["WATCHED"], os.environ["WATCHED_COUNTER"], int(os.environ["WATCHED_LAST"]))
"""
# `python -c AT_EVENT EVENT:NUMBER FOLDER COMMAND ...` runs a command of ours, which kills itself when an event has come
# NUMBER times: just before a file or folder gets its name in FOLDER (its path there), just before pairs are written
# to a text ("write"), or just after a program has been started ("start").
AT_EVENT = """
import os, signal, subprocess, sys

(wanted, left), folder = sys.argv[1].split(":"), sys.argv[2]
sys.argv, left = ["intra-distillation", *sys.argv[3:]], int(left)

def comes(event):
    global left
    left -= event == wanted
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

from intra_distillation_fairseq.corpus import pairs
from intra_distillation_fairseq.cli.main import main

replace, write, Popen = os.replace, pairs.PairWriter.write, subprocess.Popen

def watched_replace(source, place):
    comes(os.path.relpath(place, folder))
    replace(source, place)

def watched_write(*arguments):
    comes("write")
    write(*arguments)

def watched_popen(*arguments, **options):
    child = Popen(*arguments, **options)
    comes("start")
    return child

pairs._CHUNK_PAIRS = 100
os.replace, pairs.PairWriter.write, subprocess.Popen = watched_replace, watched_write, watched_popen
sys.exit(main())
"""
_DEADLINE = 600  # seconds; only where something hangs
_numbers = itertools.count()


@dataclass(frozen=True)
class Moment:
    """When a command is stopped, and how.

    Attributes:
        event: after so many changes to files of the watched folder; 0: by the clock.
        seconds: after so long; for states between two events.
        number: SIGKILL for every process of the command at once, or a signal for the first one alone.
    """

    event: int = 0
    seconds: float = 0.0
    number: int = signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a command came to its end.

    Attributes:
        stopped: by us; else it had ended before the moment came.
        status: its exit status, negative for a signal.
        events: changes to files of the watched folder.
        seconds: how long it took.
        output: of standard output and standard error.
    """

    stopped: bool
    status: int
    events: int
    seconds: float
    output: str


def run(words: Sequence[str], watched: Path, scratch: Path, moment: Moment | None = None) -> Ended:
    """Run a command in a folder and stop it at a moment, or let it end.

    Args:
        words: of the command.
        watched: its working directory, whose events count.
        scratch: a folder outside, for what is needed to watch.
        moment: None: let it end.
    """
    mark = f"{os.getpid()}-{next(_numbers)}"
    counter, output = scratch / f"counter-{mark}", scratch / f"output-{mark}"
    counter.touch()
    (scratch / "sitecustomize.py").write_text(_HOOK, encoding="utf-8")
    hold = moment.event if moment and moment.number == signal.SIGKILL else 0
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(scratch), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "WATCHED": str(watched),
        "WATCHED_COUNTER": str(counter),
        "WATCHED_LAST": str(hold),
        "OMP_NUM_THREADS": "1",
    }
    began = time.monotonic()
    with open(output, "wb") as stream:
        process = subprocess.Popen(
            words, cwd=watched, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        stopped = moment is not None and _comes(moment, process, counter, began)
        if stopped and moment.number != signal.SIGKILL:
            process.send_signal(moment.number)
        elif stopped:
            _kill_all(str(counter))
        status = process.wait(_DEADLINE)
        end = time.monotonic() + _DEADLINE
        while processes_of(str(counter)):  # they end by themselves after their parent
            assert time.monotonic() < end, f"processes left behind: {processes_of(str(counter))}"
    finally:
        _kill_all(str(counter))
        process.wait()
    text = output.read_text(encoding="utf-8", errors="replace")
    return Ended(stopped, status, counter.stat().st_size, time.monotonic() - began, text)


def _comes(moment: Moment, process: subprocess.Popen, counter: Path, began: float) -> bool:
    """Wait for the moment; False where the process has ended before."""
    while process.poll() is None:
        if moment.event and counter.stat().st_size >= moment.event:
            return True
        if not moment.event and time.monotonic() - began >= moment.seconds:
            return True
        assert time.monotonic() - began < _DEADLINE, "neither the moment nor the end has come"
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.005)
    return False


def processes_of(mark: str) -> list[int]:
    """Every process with a text in its environment: those of a command, whatever has become of their parents."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def _kill_all(mark: str) -> None:
    while alive := processes_of(mark):
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
