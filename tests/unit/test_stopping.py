"""Which signals count as a request to stop, and what the processes around a training do with them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fairseq.distributed import utils as distributed_utils

import intra_distillation_fairseq  # noqa: F401  puts the mends in place
from intra_distillation_fairseq import stopping
from intra_distillation_fairseq.experiments import processes
from intra_distillation_fairseq.tasks.stop_on_signal import StopOnSignalMixin

TERM, USR1, INT, HUP = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP


@pytest.mark.parametrize(
    ("came", "counted"),
    [
        ([(TERM, 0)], [TERM]),
        ([(TERM, 0), (TERM, 4.9)], [TERM]),
        ([(TERM, 0), (USR1, 1), (TERM, 2)], [TERM]),
        ([(TERM, 0), (TERM, 5)], [TERM, TERM]),
        ([(USR1, 0), (TERM, 30)], [USR1, TERM]),
        ([(INT, 0), (INT, 0.1)], [INT, INT]),
        ([(TERM, 0), (INT, 0.1)], [TERM, INT]),
        ([(HUP, 0), (TERM, 0.1)], [HUP, TERM]),
    ],
)
def test_what_comes_soon_after_the_first_is_the_same_request(monkeypatch, came, counted):
    requests = stopping.Requests()
    for number, at in came:
        monkeypatch.setattr(stopping.time, "monotonic", lambda at=at: 100.0 + at)
        requests.add(number)
    assert requests.received == counted


# A process that watches, and says so; what comes on its standard input happens in it.
_WATCHING = """
import os, signal, sys, time
from intra_distillation_fairseq import stopping
stopping.SAME_SECONDS = float(sys.argv[1])
eval(sys.argv[2])
stopping.request.watch()
print("ready", flush=True)
for line in sys.stdin:
    print(eval(line), flush=True)
"""


class Watching:
    """An interpreter in which signals are watched, once the first expression is evaluated."""

    def __init__(self, same_seconds: float, first: str = "None"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        # With the command's own name, the package does not import fairseq.
        code = f"import sys; sys.argv[0] = 'intra-distillation'\n{_WATCHING}"
        words = [sys.executable, "-c", code, str(same_seconds), first]
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
            start_new_session=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, expression: str) -> str:
        self.process.stdin.write(expression + "\n")
        return self.process.stdout.readline().strip()


@pytest.fixture
def watching():
    started = []

    def start(*arguments) -> Watching:
        started.append(Watching(*arguments))
        return started[-1]

    yield start
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)  # and what it has forked
        one.process.communicate()


@pytest.mark.parametrize("number", [TERM, USR1])
def test_the_first_is_noted_and_the_second_ends_at_once(watching, number):
    one = watching(0.0)
    assert one.ask("stopping.request.signal") == "None"
    one.process.send_signal(number)
    assert one.ask("stopping.request.signal.name") == number.name
    one.process.send_signal(number)
    assert one.process.wait(60) == -number


def test_interrupts_and_hang_ups_are_left_alone(watching):
    now = "[signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)]"
    one = watching(0.0, f"globals().update(before={now})")
    assert one.ask(f"before == {now}") == "True"


def noticed(pid: int) -> bool:
    """Whether a process has taken in all signals; two that wait are one."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return all(int(mask, 16) == 0 for mask in re.findall(r"(?:Sig|Shd)Pnd:\s*(\w+)", status))


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end


def test_a_fork_outlives_the_signals_of_others_and_ends_by_its_parents(watching):
    one = watching(5.0)
    pid = int(one.ask("os.fork() or time.sleep(300)"))
    for number in (TERM, USR1):
        os.kill(pid, number)
    wait_until(lambda: noticed(pid))
    assert one.ask(f"os.waitpid({pid}, os.WNOHANG)") == "(0, 0)"
    assert one.ask(f"os.kill({pid}, signal.SIGTERM)") == "None"
    wait_until(lambda: one.ask(f"os.waitpid({pid}, os.WNOHANG)") == f"({pid}, 0)")
    assert one.ask("stopping.request.signal") == "None"


@pytest.mark.parametrize("awake", [True, False])
def test_a_fork_whose_parent_is_gone_can_be_ended(watching, awake):
    """Also where the parent dies, and the signal comes, before the fork has run a line."""
    one = watching(5.0, "None" if awake else "os.register_at_fork(after_in_child=lambda: time.sleep(0.2))")
    pid = int(one.ask("os.fork() or time.sleep(300)"))
    wait_until(lambda: not awake or "Threads:\t2" in Path(f"/proc/{pid}/status").read_text())
    one.process.kill()
    one.process.wait()
    os.kill(pid, TERM)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text())


def test_who_forks_keeps_what_it_held_back(watching):
    one = watching(5.0)
    one.ask("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])")
    assert int(one.ask("os.fork() or time.sleep(300)")) > 0
    assert one.ask("signal.pthread_sigmask(signal.SIG_BLOCK, [])") == "{<Signals.SIGUSR1: 10>}"


class Task:
    """What a fairseq task does with logging outputs."""

    def train_step(self, log):
        return 1.0, 2, log

    def reduce_metrics(self, logging_outputs, criterion):
        self.seen = logging_outputs


class StoppingTask(StopOnSignalMixin, Task):
    pass


def test_one_process_asked_is_all_agreed_and_no_metric():
    task = StoppingTask()
    _, _, log = task.train_step({"loss": 1})
    assert log == {"loss": 1, "stop_requested": 0}
    task.reduce_metrics([log, {"loss": 2, "stop_requested": 0}], None)
    assert (task.stop_agreed, task.seen) == (False, [{"loss": 1}, {"loss": 2}])
    # Summed over the processes by fairseq, as a tensor.
    task.reduce_metrics([{"loss": 3, "stop_requested": torch.tensor(1.0, dtype=torch.double)}], None)
    assert (task.stop_agreed, task.seen) == (True, [{"loss": 3}])
    task.reduce_metrics([{"loss": 3}], None)  # validation says nothing
    assert task.stop_agreed


class Context:
    """Of processes that torch has spawned: they end as told."""

    def __init__(self, exit_code: int):
        self._exit_code = exit_code

    def pids(self):
        return []

    def join(self):
        if not self._exit_code:
            return True
        raise torch.multiprocessing.ProcessExitedException("ended", 0, 1, self._exit_code)


@pytest.mark.parametrize(("exit_code", "status"), [(0, None), (stopping.STATUS, stopping.STATUS), (1, 1)])
def test_the_process_that_waits_ends_as_the_others(monkeypatch, exit_code, status):
    before = signal.getsignal(TERM)
    spawn = torch.multiprocessing.spawn
    monkeypatch.setattr(spawn.__closure__[0], "cell_contents", lambda *args, **kwargs: Context(exit_code))
    if status is None:
        spawn(distributed_utils.distributed_main, (), 2)
    else:
        with pytest.raises(SystemExit) as raised:
            spawn(distributed_utils.distributed_main, (), 2)
        assert raised.value.code == status
    assert signal.getsignal(TERM) is before


def test_other_ends_of_theirs_stay_errors(monkeypatch):
    spawn = torch.multiprocessing.spawn
    monkeypatch.setattr(spawn.__closure__[0], "cell_contents", lambda *args, **kwargs: Context(-signal.SIGSEGV))
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        spawn(distributed_utils.distributed_main, (), 2)


# A process that ends by an error while fairseq prepares batches ahead; it tells which threads are left at its very end.
_PREFETCHING = """
import atexit, threading
from fairseq.data.iterators import BackgroundConsumer, BufferedIterator
left = lambda: [thread for thread in threading.enumerate() if isinstance(thread, BackgroundConsumer)]
atexit.register(lambda: print(len(left())))  # after what the package does there
import intra_distillation_fairseq
batches = BufferedIterator(2, range(10**9))
next(batches)
print(len(left()))
raise SystemExit("error: as of a full disk")
"""


def test_no_thread_prepares_batches_when_python_ends():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", _PREFETCHING]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (1, "1\n0\n"), ended.stderr
    assert ended.stderr.endswith("error: as of a full disk\n")


@pytest.mark.parametrize(
    ("status", "stopped", "words"),
    [
        (75, True, "a signal"),
        (130, True, "SIGINT"),
        (129, True, "SIGHUP"),
        (138, True, "SIGUSR1"),
        (143, True, "SIGTERM"),
        (137, False, "SIGKILL (too little memory is the usual reason)"),
        (1, False, "exit status 1"),
        (0, False, "exit status 0"),
    ],
)
def test_statuses(status, stopped, words):
    assert processes.was_stopped(status) is stopped
    assert processes.describe_status(status) == words


# A command that asks the one that runs it to stop, twice within a moment, and ends as the test says.
_ENDS = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[1])))
os.kill(os.getppid(), signal.SIGTERM)
os.kill(os.getppid(), signal.SIGTERM)
while True:
    signal.pause()
"""


@pytest.mark.parametrize(("ends_with", "status"), [(stopping.STATUS, stopping.STATUS), (0, 143), (1, 1)])
def test_after_a_request_to_stop_a_command_may_have_saved_finished_or_failed(tmp_path, ends_with, status):
    words = [sys.executable, "-c", _ENDS, str(ends_with)]
    assert processes.run_logged(words, tmp_path / "log", follow=lambda line: None) == status
