"""A training that is killed, asked to stop or robbed of its last checkpoint equals, bit for bit, one that never was."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from fairseq_commands import TINY_MODEL, TRAINING, USER_DIR, Running
from several_processes import free_port

from intra_distillation_fairseq import stopping

ADAM = ["--optimizer", "adam"]
SAGE = ["--optimizer", "sage_adam"]
ID = "--task translation_intra_distillation --criterion intra_distillation --label-smoothing 0.1".split()
TEACHING = (
    "--task translation_intra_distillation --criterion self_teaching --label-smoothing 0.1 --student-layers 2,1 "
    "--encoder-layers 2 --decoder-layers 2"
).split()
UPDATES = 24
# 4 batches make an epoch of the tiny corpus. Together: each pass mode, optimizer, architecture, criterion, precision,
# number of workers, update frequency and kind of checkpoint.
RUNS = {
    "stacked": [*ID, *ADAM, "--id-pass-mode", "stacked", "--save-interval-updates", 3],
    "sequential": [*ID, *ADAM, "--id-pass-mode", "sequential", "--update-freq", 2, "--num-workers", 1],
    "recompute": [*ID, *SAGE, "--id-pass-mode", "recompute", "--save-interval-updates", 2, "--keep-interval-updates", 1],
    "experts": [
        *(*ID, *ADAM, "--arch", "switch_transformer_small", "--id-pass-mode", "stacked"),
        *("--switch-jitter", 0.01, "--switch-expert-dropout", 0.1, "--update-freq", 2, "--save-interval-updates", 1),
        *("--keep-interval-updates", 2),
    ],
    "experts, sage": [
        *(*ID, *SAGE, "--arch", "switch_transformer_small", "--id-pass-mode", "recompute", "--num-workers", 1),
    ],
    "self-teaching": [*TEACHING, *ADAM, "--num-workers", 1, "--save-interval-updates", 5],
    "bf16": [
        *(*ID, *ADAM, "--arch", "switch_transformer_small", "--bf16", "--id-pass-mode", "stacked"),
        *("--save-interval-updates", 3),
    ],
    # The loss scale overflows at first, and then again whenever it has grown.
    "fp16": [
        *(*ID, *SAGE, "--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 65536, "--fp16-scale-window", 5),
        *("--id-pass-mode", "recompute", "--save-interval-updates", 4),
    ],
}  # fmt: skip
# Of the steps of writing a checkpoint (os.fsync, os.replace and os.fsync for each file), the one to be killed before.
STEPS = range(1, 28)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def die_in_a_save(step: int) -> None:
    """Kill this process before a step of writing a checkpoint."""
    left = step

    def dying(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.fsync, os.replace = dying(os.fsync), dying(os.replace)


def start(data: Path, save_dir: Path, *flags: object, before: Callable[[], None] | None = None) -> Running:
    words = (data, "--user-dir", USER_DIR, "--save-dir", save_dir, *TINY_MODEL, *TRAINING, *flags)
    return Running("train", *words, before=before)


def trained(data: Path, save_dir: Path, *flags: object) -> subprocess.CompletedProcess:
    done = start(data, save_dir, *flags).wait()
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    return done


def interrupt(running: Running, update: int, number: int) -> subprocess.CompletedProcess:
    """Send a signal when the log names an update, or let the training end where it never does."""
    wait_for_update(running, update)
    if not running.ended(0):
        os.kill(running.pid, number)
    return running.wait()


def wait_for_update(running: Running, update: int) -> None:
    end = time.monotonic() + 300
    while f'"num_updates": "{update}"' not in running.output() and not running.ended(0.002):
        assert time.monotonic() < end, running.output()[-3000:]


def assert_same(one: Path, other: Path) -> None:
    """Parameters and the optimizer's state, bit for bit; as far as a checkpoint has them, the iterator and the best."""
    ours, theirs = (torch.load(folder / "checkpoint_last.pt", weights_only=True) for folder in (one, other))
    for name in ("model", "last_optimizer_state"):
        _assert_equal(ours[name], theirs[name], name)
    for name in ("train_iterator", "best"):
        assert ours["extra_state"].get(name) == theirs["extra_state"].get(name), name
    bests = [torch.load(folder / "checkpoint_best.pt", weights_only=True)["model"] for folder in (one, other)]
    _assert_equal(*bests, "checkpoint_best.pt")


def _assert_equal(one, other, name: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            _assert_equal(one[key], other[key], f"{name}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), name
        for index, (ours, theirs) in enumerate(zip(one, other)):
            _assert_equal(ours, theirs, f"{name}/{index}")
    else:
        assert one == other, name


@pytest.fixture(scope="module")
def undisturbed(tiny_data, tmp_path_factory):
    """undisturbed(name) trains one of RUNS without a stop, once; returns its folder."""
    folders: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("undisturbed") / "run"
            trained(tiny_data, folders[name], *RUNS[name], "--max-update", UPDATES)
        return folders[name]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_interrupted_trainings_equal_undisturbed_ones(tiny_data, tmp_path, undisturbed, full, record_property, name):
    """Each is interrupted three times or more, in the first epoch or a later one, and goes on from what it has saved."""
    flags = [*RUNS[name], "--max-update", UPDATES]
    rng = random.Random(name)
    interrupted = 0
    for attempt in range(6 if full else 1):
        save_dir = tmp_path / str(attempt)
        # The kinds in another order each time.
        kinds = rng.sample(["update", "update", "asked", "saving"], 4) if full else ["update", "saving", "asked"]
        reached, before = 0, interrupted
        for kind in kinds:
            if kind == "saving":
                done = start(tiny_data, save_dir, *flags, before=partial(die_in_a_save, rng.choice(STEPS))).wait()
            else:
                number = signal.SIGKILL if kind == "update" else rng.choice(SIGNALS)
                update = rng.randint(reached + 1, min(reached + UPDATES // 3, UPDATES - 1))
                done = interrupt(start(tiny_data, save_dir, *flags), update, number)
                if kind == "asked" and done.returncode == stopping.STATUS:
                    stopped_at = int(re.findall(r"stopped at update (\d+) by SIG\w+, saved", done.stdout)[0])
                    assert updates_of(save_dir / "checkpoint_last.pt") == stopped_at
            assert done.returncode in (0, -signal.SIGKILL, stopping.STATUS), done.stderr[-3000:]
            interrupted += done.returncode != 0
            reached = max([reached, *map(int, re.findall(r'"num_updates": "(\d+)"', done.stdout))])
            reached = min(reached, UPDATES - 2)
        done = trained(tiny_data, save_dir, *flags)
        assert updates_of(save_dir / "checkpoint_last.pt") == UPDATES
        assert_same(save_dir, undisturbed(name))
        assert not list(save_dir.glob("*.tmp"))
        shutil.rmtree(save_dir)
        assert interrupted > before  # not each time: one may end before it is killed
    record_property("kills survived", interrupted)


def updates_of(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["optimizer_history"][-1]["num_updates"]


def two_started(data: Path, save_dir: Path, *flags: object, **kwargs) -> list[Running]:
    address = f"tcp://127.0.0.1:{free_port()}"
    meeting = ["--distributed-world-size", 2, "--distributed-init-method", address, "--distributed-no-spawn"]
    meeting += ["--distributed-backend", "gloo"]
    return [start(data, save_dir, *flags, *meeting, "--distributed-rank", rank, **kwargs) for rank in (0, 1)]


@pytest.mark.parametrize("asked", [0, 1])
def test_two_processes_stop_at_the_same_update_whichever_is_asked(tiny_data, tmp_path, full, record_property, asked):
    """And go on as if nothing had been; then both are killed."""
    if asked == 0 and not full:
        pytest.skip("in full only: the other process is asked without it")
    flags = [*RUNS["sequential"], "--max-update", UPDATES]
    for running in two_started(tiny_data, tmp_path / "whole", *flags):
        assert running.wait().returncode == 0
    both = two_started(tiny_data, tmp_path / "parts", *flags)
    wait_for_update(both[0], 3)
    os.kill(both[asked].pid, SIGNALS[asked])
    done = [running.wait() for running in both]
    assert [d.returncode for d in done] == [stopping.STATUS] * 2, done[0].stderr[-2000:] + done[1].stderr[-2000:]
    who = SIGNALS[0].name if asked == 0 else "a signal to another process"
    assert re.search(rf"stopped at update \d+ by {who}, saved: the same command goes on", done[0].stdout)

    both = two_started(tiny_data, tmp_path / "parts", *flags)
    wait_for_update(both[0], UPDATES // 2)
    for running in both:
        os.kill(running.pid, signal.SIGKILL)
    assert [running.wait().returncode for running in both] == [-signal.SIGKILL] * 2
    for running in two_started(tiny_data, tmp_path / "parts", *flags):
        assert running.wait().returncode == 0
    assert_same(tmp_path / "whole", tmp_path / "parts")
    record_property("kills survived", 2)


# One process per GPU, started by fairseq itself, on a machine that says it has two.
_SPAWNING = """
import sys, torch
from fairseq_cli.train import cli_main
if __name__ == "__main__":
    torch.cuda.device_count = lambda: 2
    cli_main()
"""


@pytest.mark.parametrize("whole_group", [False, True])
def test_processes_that_fairseq_started_stop_with_it(tiny_data, tmp_path, whole_group):
    (tmp_path / "spawning.py").write_text(_SPAWNING, encoding="utf-8")
    flags = [*ID, *ADAM, "--max-update", 100_000, "--max-epoch", 100_000, "--no-epoch-checkpoints"]
    flags += ["--distributed-world-size", 2, "--distributed-backend", "gloo"]
    words = [sys.executable, tmp_path / "spawning.py", tiny_data, "--user-dir", USER_DIR]
    words += ["--save-dir", tmp_path / "run", *TINY_MODEL, *(word for word in TRAINING if word != "--cpu"), *flags]
    log = tmp_path / "log"
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            list(map(str, words)),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
    try:
        end = time.monotonic() + 300
        while b'"num_updates": "3"' not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGTERM)
        assert process.wait(300) == stopping.STATUS, log.read_text()[-3000:]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    stopped_at = set(re.findall(r"stopped at update (\d+) by SIGTERM, saved", log.read_text()))
    assert stopped_at == {str(updates_of(tmp_path / "run" / "checkpoint_last.pt"))}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_to_the_whole_job_spares_the_processes_that_load_data(tiny_data, tmp_path, workers):
    """As a batch system sends it; several times, as each process of ours passes it on."""
    reached = 20
    # Without a buffer, a training that goes on within an epoch starts them while it loads its checkpoint.
    for flags in ([], ["--data-buffer-size", 0])[: 1 + (workers > 0)]:
        running = start(tiny_data, tmp_path, *ID, *ADAM, "--max-update", 100_000, "--num-workers", workers, *flags)
        wait_for_update(running, reached)
        children = Path(f"/proc/{running.pid}/task").glob("*/children")
        loaders = [int(pid) for path in children for pid in path.read_text().split()]
        assert len(loaders) >= workers
        for pid in (*loaders, running.pid, running.pid):
            os.kill(pid, signal.SIGTERM)
        done = running.wait()
        assert done.returncode == stopping.STATUS, done.stderr[-3000:]
        reached = updates_of(tmp_path / "checkpoint_last.pt") + 1


def test_a_stop_leaves_the_best_alone(tiny_data, tmp_path):
    """At an update without validation: the best one so far, its loss and its file stay."""
    running = start(tiny_data, tmp_path, *ID, *ADAM, "--max-update", 100_000, "--validate-interval", 3)
    done = interrupt(running, 30, signal.SIGTERM)
    assert done.returncode == stopping.STATUS, done.stderr[-3000:]
    last, best = (
        torch.load(tmp_path / f"checkpoint_{name}.pt", weights_only=True)["extra_state"] for name in ("last", "best")
    )
    assert last["val_loss"] is None
    assert last["best"] == best["best"] == best["val_loss"]


@pytest.mark.parametrize("flag", ["--no-save", "--no-last-checkpoints"])
def test_a_stop_saves_nothing_that_was_not_wanted_and_says_so(tiny_data, tmp_path, flag):
    running = start(tiny_data, tmp_path, *ID, *ADAM, "--max-update", 100_000, "--no-epoch-checkpoints", flag)
    done = interrupt(running, 3, signal.SIGUSR1)
    assert done.returncode == stopping.STATUS_NOT_SAVED == 143, done.stderr[-3000:]
    assert "by SIGUSR1, not saved (--no-save or --no-last-checkpoints)\n" in done.stdout
    assert not (tmp_path / "checkpoint_last.pt").exists()


def test_a_stop_of_a_training_with_restore_file_says_that_it_begins_again(tiny_data, tmp_path):
    """fairseq loads that file at every start; --continue-once, which the messages advise, at the first one only."""
    first, flags = tmp_path / "first", [*ID, *ADAM, "--max-update", 100_000]
    trained(tiny_data, first, *ID, *ADAM, "--max-update", 5)
    given = ["--restore-file", first / "checkpoint_last.pt"]
    done = interrupt(start(tiny_data, tmp_path / "a", *flags, *given), 20, signal.SIGTERM)
    assert done.returncode == stopping.STATUS, done.stderr[-3000:]
    assert ", saved: the same command without --restore-file goes on; with it, it would begin again\n" in done.stdout
    stopped_at = 0
    for _ in range(2):
        given = ["--continue-once", first / "checkpoint_last.pt"]
        done = interrupt(start(tiny_data, tmp_path / "b", *flags, *given), stopped_at + 20, signal.SIGTERM)
        assert ", saved: the same command goes on\n" in done.stdout
        loaded = int(re.findall(r"Loaded checkpoint .* @ (\d+) updates", done.stdout)[0])
        assert loaded == (stopped_at or 5)
        stopped_at = updates_of(tmp_path / "b" / "checkpoint_last.pt")
        assert stopped_at >= loaded + 15


def test_the_request_is_no_metric_and_other_criteria_stop_too(tiny_data, tmp_path):
    flags = "--task translation_intra_distillation --criterion cross_entropy --max-update 100000".split()
    done = interrupt(start(tiny_data, tmp_path, *flags, *ADAM), 3, signal.SIGTERM)
    assert done.returncode == stopping.STATUS, done.stderr[-3000:]
    assert "stop_requested" not in done.stdout


def test_another_task_dies_of_the_signal(tiny_data, tmp_path):
    flags = "--task translation --criterion cross_entropy --max-update 100000".split()
    done = interrupt(start(tiny_data, tmp_path, *flags, *ADAM), 3, signal.SIGTERM)
    assert done.returncode == -signal.SIGTERM


def test_a_finished_training_is_not_trained_on(tiny_data, tmp_path):
    """P10: fairseq itself makes an update more."""
    flags = [*ID, *ADAM, "--max-update", 5, "--save-interval-updates", 5]
    trained(tiny_data, tmp_path, *flags)
    before = (tmp_path / "checkpoint_last.pt").read_bytes()
    assert (
        "done training in 0.0 seconds: the checkpoint has --max-update updates"
        in trained(tiny_data, tmp_path, *flags).stdout
    )
    assert (tmp_path / "checkpoint_last.pt").read_bytes() == before
    (tmp_path / "checkpoint_last.pt").unlink()  # killed between the last checkpoint and its copy
    trained(tiny_data, tmp_path, *flags)
    assert updates_of(tmp_path / "checkpoint_last.pt") == 5


LARGER = ["--encoder-embed-dim", 64, "--decoder-embed-dim", 64, "--encoder-ffn-embed-dim", 256]
LARGER += ["--decoder-ffn-embed-dim", 256, *ID, *ADAM, "--save-interval-updates", 2, "--max-update", 8]
BLOCK = 65536


@pytest.fixture(scope="module")
def stopped_early(tiny_data, tmp_path_factory) -> tuple[Path, Path]:
    """A training that went to update 8, and its folder as it was at update 6; checkpoints of more than 1 MB."""
    folder = tmp_path_factory.mktemp("larger")
    trained(tiny_data, folder / "whole", *LARGER)
    shutil.copytree(folder / "whole", folder / "at 6")
    for path in (folder / "at 6").glob("*.pt"):
        if updates_of(path) > 6:
            path.unlink()
    shutil.copy(folder / "at 6" / "checkpoint_2_6.pt", folder / "at 6" / "checkpoint_last.pt")
    shutil.copy(folder / "at 6" / "checkpoint_2_6.pt", folder / "at 6" / "checkpoint_best.pt")
    assert (folder / "at 6" / "checkpoint_last.pt").stat().st_size > 1_000_000
    return folder / "whole", folder / "at 6"


def test_a_cut_last_checkpoint_is_set_aside_for_the_newest_whole_one(
    tiny_data, tmp_path, stopped_early, full, record_property
):
    whole, before = stopped_early
    sizes = list(range(0, (before / "checkpoint_last.pt").stat().st_size, BLOCK))
    chosen = sizes if full else random.Random(1).sample(sizes, 2)
    for size in chosen:
        folder = tmp_path / str(size)
        shutil.copytree(before, folder)
        with open(folder / "checkpoint_last.pt", "r+b") as file:
            file.truncate(size)
        done = trained(tiny_data, folder, *LARGER)
        assert f"checkpoint '{folder}/checkpoint_last.pt' is not taken: it is " in done.stdout
        assert "set aside as 'checkpoint_last.pt.damaged'; going on from the newest whole one, " in done.stdout
        assert (folder / "checkpoint_last.pt.damaged").stat().st_size == size
        assert re.search(r"Loaded checkpoint .* \(epoch 2 @ 6 updates\)", done.stdout)
        assert_same(folder, whole)
        shutil.rmtree(folder)
    record_property("files truncated", len(chosen))


def test_two_processes_take_the_same_checkpoint(tiny_data, tmp_path):
    flags = [*ID, *ADAM, "--ddp-backend", "legacy_ddp", "--save-interval-updates", 1, "--id-alpha-schedule", "constant"]
    for running in two_started(tiny_data, tmp_path, *flags, "--max-update", 3):
        assert running.wait().returncode == 0
    os.truncate(tmp_path / "checkpoint_last.pt", 5000)
    (tmp_path / "checkpoint_best.pt").unlink()
    (tmp_path / "checkpoint_2_3.pt").unlink()
    done = [running.wait() for running in two_started(tiny_data, tmp_path, *flags, "--max-update", 5)]
    assert [d.returncode for d in done] == [0, 0], done[0].stderr[-2000:]
    assert all("going on from the newest whole one" in d.stdout for d in done)
    assert updates_of(tmp_path / "checkpoint_last.pt") == 5
    assert f"Loaded checkpoint {tmp_path}/checkpoint1.pt (epoch 2 @ 2 updates)" in done[0].stdout

    for path in tmp_path.glob("checkpoint*.pt"):
        os.truncate(path, 5000)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = [running.wait() for running in two_started(tiny_data, tmp_path, *flags, "--max-update", 6)]
    assert [d.returncode for d in done] == [1, 1]
    for d in done:
        last = d.stderr.strip().splitlines()[-1]
        assert last.startswith(f"error: checkpoint '{tmp_path}/checkpoint_last.pt' cannot be read (it is cut off or")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_damaged_file_of_restore_file_stays_an_error(tiny_data, tmp_path, stopped_early):
    given = tmp_path / "given.pt"
    shutil.copy(stopped_early[1] / "checkpoint_last.pt", given)
    os.truncate(given, 5000)
    done = start(tiny_data, tmp_path / "run", *LARGER, "--restore-file", given).wait()
    assert done.returncode != 0
    assert f"checkpoint '{given}' is not a whole file" in done.stderr
    assert given.stat().st_size == 5000


def allow_only(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_is_full_leaves_the_old_checkpoint_and_ends_every_process(
    tiny_data, tmp_path, stopped_early, processes
):
    """By a limit on the size of a file, which the system answers with an error of the same kind."""
    shutil.copytree(stopped_early[1], tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint_last.pt").read_bytes()
    limited = partial(allow_only, 500_000)
    if processes == 1:
        running = [start(tiny_data, tmp_path / "run", *LARGER, before=limited)]
    else:  # the checkpoint is of one process, which went another way through the epoch
        running = two_started(tiny_data, tmp_path / "run", *LARGER, "--reset-dataloader", before=limited)
    done = [one.wait(120) for one in running]
    assert all(d.returncode not in (0, -signal.SIGKILL) for d in done)  # none had to be killed
    assert done[0].returncode == 1
    last = done[0].stderr.strip().splitlines()[-1]
    assert re.match(
        r"error: checkpoint '.*/run/checkpoint\w+\.pt' was not saved \(File too large\): it needs 1\.\d MB, .* MB are "
        r"free; the checkpoints before it are whole: make room, then the same command goes on from them",
        last,
    ), last
    assert (tmp_path / "run" / "checkpoint_last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_really_full_disk(tiny_data, tmp_path, stopped_early):
    """A file system of 2 MB, mounted where that is allowed without a password."""
    room = tmp_path / "room"
    room.mkdir()
    words = [sys.executable, "-m", "fairseq_cli.train", tiny_data, "--user-dir", USER_DIR, "--save-dir", room]
    train = " ".join(f"'{word}'" for word in (*words, *TINY_MODEL, *TRAINING, *LARGER))
    last = stopped_early[1] / "checkpoint_last.pt"
    script = f"mount -t tmpfs -o size=2m tmpfs '{room}' && cp '{last}' '{room}' && echo mounted && {train}; echo $?; ls '{room}'"
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, check=False)
    if "mounted" not in done.stdout:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert "was not saved (No space left on device): it needs 1." in done.stderr.strip().splitlines()[-1], done.stderr
    assert done.stdout.strip().splitlines()[-2:] == ["1", "checkpoint_last.pt"]
