"""scripts/launch/slurm_wmt17.sbatch with stand-ins for srun and scontrol."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "launch" / "slurm_wmt17.sbatch"
# Notes its arguments, and ends with STATUS at once or, with "wait", by 75 once it gets USR1; TERM would be a kill.
SRUN = r"""#!/usr/bin/env bash
trap 'echo USR1 >> "$NOTES"; exit 75' USR1
trap 'echo TERM >> "$NOTES"; exit 137' TERM
printf 'srun|%s' "$OMP_NUM_THREADS" >> "$NOTES"
printf '|%s' "$@" >> "$NOTES"
echo >> "$NOTES"
[ "$STATUS" = wait ] || exit "$STATUS"
for _ in $(seq 600); do read -r -t 0.1 <> <(:); done
"""
SCONTROL = '#!/usr/bin/env bash\necho "scontrol|$*" >> "$NOTES"\nexit "${SCONTROL_STATUS:-0}"\n'


@pytest.fixture
def start(tmp_path):
    """start(status, *arguments) runs the script in a folder with a scripts/train.sh; notes() is what was called."""
    programs, job = tmp_path / "bin", tmp_path / "a job é"
    programs.mkdir()
    (job / "scripts").mkdir(parents=True)
    (job / "scripts" / "train.sh").touch()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(status, *arguments: str, **more: str) -> subprocess.Popen:
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "NOTES": str(tmp_path / "notes")}
        environment |= {"STATUS": str(status), "SLURM_SUBMIT_DIR": str(job), "SLURM_JOB_ID": "77", **more}
        environment |= {"SLURM_CPUS_PER_TASK": "4"}
        environment.pop("OMP_NUM_THREADS", None)
        return subprocess.Popen(["bash", SCRIPT, *arguments], env=environment, stderr=subprocess.PIPE, text=True)

    run.notes = lambda: (tmp_path / "notes").read_text().splitlines() if (tmp_path / "notes").exists() else []
    run.job = job
    return run


def test_train_is_called_with_what_was_given(start):
    script = start(0, "data/my wmt", "--method", "id_x", "--", "--lr", "1")
    assert (script.wait(60), script.stderr.read()) == (0, "")
    expected = "srun|4|--wait=300|bash|scripts/train.sh|--config|configs/wmt17_transformer_big|data/my wmt|--method|id_x|--|--lr|1"
    assert start.notes() == [expected]


@pytest.mark.parametrize(
    ("status", "requeued"), [(0, False), (1, False), (2, False), (75, True), (138, True), (137, False), (143, False)]
)
def test_the_job_is_requeued_where_it_was_asked_to_stop_and_the_status_kept(start, status, requeued):
    script = start(status, "data")
    assert script.wait(60) == status
    assert start.notes()[1:] == (["scontrol|requeue 77"] if requeued else [])


def test_a_requeue_that_fails_is_said(start):
    script = start(75, "data", SCONTROL_STATUS="1")
    assert script.wait(60) == 75
    assert script.stderr.read() == "error: the job was not requeued: submit it again\n"


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_signal_reaches_the_tasks_as_usr1_and_a_cancelled_job_stays_away(start, number, requeued):
    script = start("wait", "data")
    deadline = time.monotonic() + 60
    while not start.notes():
        assert time.monotonic() < deadline and script.poll() is None
    script.send_signal(number)
    assert script.wait(60) == 75
    assert start.notes()[1:] == ["USR1", *(["scontrol|requeue 77"] if requeued else [])]


def test_submitted_from_another_folder(start):
    (start.job / "scripts" / "train.sh").unlink()
    script = start(0, "data")
    assert script.wait(60) == 2
    assert script.stderr.read() == (
        f"error: {start.job} has no scripts/train.sh: submit the job from the folder of the repository\n"
    )
    assert start.notes() == []


def test_what_slurm_is_told():
    """One task for each GPU, and what a job that goes on after a stop needs."""
    told = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", SCRIPT.read_text(), re.M))
    assert told["ntasks-per-node"] == told["gpus-per-node"]
    assert (told["open-mode"], told["requeue"], told["signal"]) == ("append", "", "USR1@300")
