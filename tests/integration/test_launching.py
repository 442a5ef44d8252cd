"""train.sh started by torchrun and, as far as it can see, by srun; processes that die; what is kept of several."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fairseq_commands import TINY_MODEL, TINY_RECIPE, TRAINING, USER_DIR, Running
from several_processes import free_port
from test_training import OURS, assert_same_parameters, logged

from intra_distillation_fairseq.cli import main

TRAIN = Path(main.__file__).resolve().parents[2] / "scripts" / "train.sh"
TORCHRUN = Path(sys.executable).parent / "torchrun"
UPDATES = 6
CONFIG = (
    TINY_RECIPE
    + f"""
  label-smoothing: 0.1
  optimizer: adam
  lr: 0.01
  max-tokens: 60
  update-freq: 4
  max-update: {UPDATES}
  num-workers: 0
  log-interval: 1
methods:
  id_x: {{criterion: intra_distillation, id-num-passes: 2}}
"""
)


@pytest.fixture(scope="module")
def words(tiny_data, tmp_path_factory) -> list[str]:
    """Arguments of train.sh but for --save-dir."""
    folder = tmp_path_factory.mktemp("prepared é")
    (folder / "bin").symlink_to(tiny_data)
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "source_lang": "xx", "target_lang": "en"}))
    (folder / "config.yaml").write_text(CONFIG)
    return [str(folder), "--method", "id_x", "--config", str(folder / "config.yaml")]


def environment(**more: object) -> dict[str, str]:
    """As outside of any launcher."""
    ours = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("SLURM_")}
    return {**kept, **{name: str(value) for name, value in more.items()}}


def by_torchrun(words, save_dir, *flags: str) -> subprocess.CompletedProcess:
    command = [TORCHRUN, "--nproc_per_node", "2", "--master_port", str(free_port()), *flags, "--no-python"]
    command += ["bash", TRAIN, *words, "--save-dir", save_dir]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)


def by_srun(words, save_dir, tasks: int = 2, **more: object) -> list[tuple[int, str]]:
    """Each task's exit status and standard error."""
    common = {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": tasks, "SLURM_NTASKS": tasks,
              "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": free_port(), **more}  # fmt: skip
    running = [
        subprocess.Popen(
            ["bash", TRAIN, *words, "--save-dir", save_dir],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**common, SLURM_PROCID=rank, SLURM_LOCALID=rank),
        )
        for rank in range(tasks)
    ]
    said = [process.communicate(timeout=300)[1] for process in running]
    return [(process.returncode, text) for process, text in zip(running, said)]


@pytest.fixture(scope="module")
def trained(words, tmp_path_factory) -> tuple[Path, str]:
    """By torchrun, and what it said."""
    folder = tmp_path_factory.mktemp("runs") / "torchrun é"
    done = by_torchrun(words, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stderr


def test_torchrun_trains_once(trained):
    folder, said = trained
    assert said.count(f"trained {UPDATES} updates") == 1
    assert "2 processes: update-freq 2, so a batch has 2 x 2 x 60 = 240 tokens, as the recipe's" in said
    (launch,) = json.loads((folder / "environment.json").read_text())["launches"]
    assert (launch["processes"], launch["update_freq"]) == (2, "2")
    assert json.loads((folder / "run.json").read_text())["settings"]["flags"] == []  # one process may go on with it
    updates = logged((folder / "train.log").read_text(encoding="utf-8"))
    assert [u["num_updates"] for u in updates] == [str(n + 1) for n in range(UPDATES)]
    assert not logged((folder / "train.rank1.log").read_text(encoding="utf-8"))


def test_srun_trains_the_same(trained, words, tmp_path):
    ended = by_srun(words, tmp_path / "run")
    assert [status for status, _ in ended] == [0, 0], ended
    assert_same_parameters(trained[0] / "checkpoint_last.pt", tmp_path / "run" / "checkpoint_last.pt")


@pytest.mark.parametrize("noted", [True, False])
def test_all_processes_leave_a_finished_run_alone(trained, words, noted):
    folder, _ = trained
    if not noted:  # as if the first one had been killed before it could
        (folder / "finished.json").unlink()
    before = (folder / "checkpoint_last.pt").read_bytes()
    for status, said in by_srun(words, folder):
        assert (status, "already finished, nothing to do" in said) == (0, True)
    assert (folder / "checkpoint_last.pt").read_bytes() == before
    assert (folder / "finished.json").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_all_processes_refuse_other_settings(trained, words, tmp_path, finished):
    """Else the others would wait for the first one."""
    folder = shutil.copytree(trained[0], tmp_path / "copy")
    if not finished:
        (folder / "finished.json").unlink()
        (folder / "train.log").unlink()
    for status, said in by_srun([*words, "--seed", "2"], folder):
        assert status == 2
        assert "--seed is '2' (there '1')" in said


def test_two_machines_with_torchrun(trained, words, tmp_path, full):
    """Two agents on one machine, one process each."""
    if not full:
        pytest.skip("only with --full")
    port = free_port()
    command = [TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "1"]
    command += ["--rdzv_endpoint", f"127.0.0.1:{port}", "--no-python", "bash", TRAIN, *words]
    agents = [
        subprocess.Popen(
            [*command, "--save-dir", tmp_path / "run"], stderr=subprocess.PIPE, text=True, env=environment()
        )
        for _ in range(2)
    ]
    said = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert_same_parameters(trained[0] / "checkpoint_last.pt", tmp_path / "run" / "checkpoint_last.pt")


def test_a_dead_process_ends_the_others(tiny_data, tmp_path):
    """Over gloo at once: the connection is closed. Nothing waits for ever."""
    address = f"tcp://127.0.0.1:{free_port()}"
    first, second = (
        Running(
            "train", tiny_data, "--user-dir", USER_DIR, "--save-dir", tmp_path / "run", *TINY_MODEL, *TRAINING, *OURS,
            "--max-update", 100000, "--distributed-world-size", 2, "--distributed-rank", rank,
            "--distributed-init-method", address, "--distributed-no-spawn", "--distributed-backend", "gloo",
        )
        for rank in (0, 1)
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while len(logged(first.output())) < 3:
        assert time.monotonic() < deadline and not first.ended(within=0.1), "nothing happened"
    os.kill(second.pid, signal.SIGKILL)
    assert second.wait().returncode == -signal.SIGKILL
    done = first.wait(timeout=200)
    assert done.returncode not in (0, -signal.SIGKILL)  # it ended, and not because we stopped waiting
    assert "onnection" in done.stderr
