"""What launchers say, fairseq's flags made of it, and launches of several processes that are refused."""

from __future__ import annotations

import pytest

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import launch, rendezvous

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "node07", "MASTER_PORT": "29400"}
SRUN = {
    "SLURM_JOB_ID": "123",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


# -- what the launcher says


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"MASTER_ADDR": "a", "RANK": "1"}, None),
        (TORCHRUN, ("torchrun", 3, 4, 1, "env://")),
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, ("torchrun", 0, 1, 0, "env://")),
        ({"WORLD_SIZE": "1"}, None),
        (SRUN, ("srun", 3, 4, 1, "tcp://node07:10861")),
        ({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, ("srun", 3, 4, 1, "tcp://10.0.0.1:29500")),
        ({**SRUN, "SLURM_STEP_ID": "1"}, ("srun", 3, 4, 1, "tcp://node07:10862")),
        # One task: as if it were started alone; fairseq starts a process for each of its GPUs.
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, None),
        # A batch script itself, which also has a rank in some versions of SLURM.
        ({"SLURM_JOB_ID": "123", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
        ({**SRUN, "SLURM_STEP_ID": "4294967291"}, None),
        # torchrun under srun, one agent for each node
        ({**SRUN, **TORCHRUN}, ("torchrun", 3, 4, 1, "env://")),
        # What some batch scripts export for other programs
        ({**SRUN, "WORLD_SIZE": "4"}, ("srun", 3, 4, 1, "tcp://node07:10861")),
    ],
)
def test_the_launcher_is_recognised(environment, expected):
    assert rendezvous.launched(environment) == expected


@pytest.mark.parametrize(
    ("environment", "here"),
    [
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, 2),
        (TORCHRUN, 4),
        (SRUN, 4),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_NODEID": "3"}, 1),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x1),1(x2)", "SLURM_NODEID": "1"}, 1),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, 3),
    ],
)
def test_the_processes_of_one_machine(environment, here):
    assert rendezvous.processes_here(environment, rendezvous.launched(environment)) == here


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("node[07-09,12],gpu3", "node07"),
        ("gpu3,node[07-09]", "gpu3"),
        ("rack[1-2]n[003,5]-ib", "rack1n003-ib"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert rendezvous.launched({**SRUN, "SLURM_STEP_NODELIST": nodes}).init_method == f"tcp://{first}:10861"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is '2', but RANK is not set, without which the processes cannot find each"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "WORLD_SIZE is '4', but MASTER_PORT is not set"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two': a launcher sets it to a whole number"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK is '-1': a launcher sets it to a whole number"),
        ({**SRUN, "SLURM_PROCID": ""}, "SLURM_PROCID is '': a launcher sets it to a whole number"),
    ],
)
def test_a_launcher_that_tells_too_little(environment, message):
    with pytest.raises(UserError) as caught:
        rendezvous.launched(environment)
    assert str(caught.value).startswith(message)


# -- fairseq's flags


def meeting(monkeypatch, environment, flags="", gpus=0) -> str:
    for name in [*TORCHRUN, *SRUN]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    by = rendezvous.launched(environment)
    return " ".join(launch.meeting_flags([], flags.split(), ["a GPU"] * gpus, by))


OF_RANK_3 = "--distributed-world-size 4 --distributed-rank 3 --distributed-init-method {} --distributed-no-spawn {}"


@pytest.mark.parametrize(
    ("environment", "gpus", "expected"),
    [
        ({}, 0, ""),
        ({}, 4, ""),
        (TORCHRUN, 0, OF_RANK_3.format("env://", "--distributed-backend gloo")),
        (TORCHRUN, 2, OF_RANK_3.format("env://", "--distributed-backend nccl --device-id 1")),
        (SRUN, 0, OF_RANK_3.format("tcp://node07:10861", "--distributed-backend gloo")),
        # Each task sees its own GPU only.
        (SRUN, 1, OF_RANK_3.format("tcp://node07:10861", "--distributed-backend nccl --device-id 0")),
        (SRUN, 8, OF_RANK_3.format("tcp://node07:10861", "--distributed-backend nccl --device-id 1")),
        # fairseq alone would start one process for each GPU, or read the launcher's variables.
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, 4, "--distributed-world-size 1"),
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, 1, ""),
    ],
)
def test_the_flags_of_a_process(monkeypatch, environment, gpus, expected):
    assert meeting(monkeypatch, environment, gpus=gpus) == expected


def test_cpu_keeps_off_the_gpus(monkeypatch):
    assert meeting(monkeypatch, TORCHRUN, "--cpu", gpus=2).endswith("--distributed-backend gloo")


def test_processes_started_by_hand_on_cpus_need_not_name_the_back_end(monkeypatch):
    flags = "--distributed-world-size 2 --distributed-rank 1 --distributed-init-method tcp://a:1 --distributed-no-spawn"
    assert meeting(monkeypatch, {}, flags) == "--distributed-backend gloo"
    assert meeting(monkeypatch, {}, flags, gpus=1) == ""


def test_fairseqs_own_processes_do_not_meet_where_a_slurm_job_says(monkeypatch):
    job = {"SLURM_JOB_ID": "123", "SLURM_NTASKS": "1"}
    assert meeting(monkeypatch, job, gpus=4).startswith("--distributed-init-method tcp://127.0.0.1:")
    assert meeting(monkeypatch, job, gpus=1) == meeting(monkeypatch, job) == ""


def test_more_processes_than_gpus(monkeypatch):
    with pytest.raises(UserError, match="srun started at least 4 processes on this machine, which has 2 GPUs: start"):
        meeting(monkeypatch, {**SRUN, "SLURM_LOCALID": "3"}, gpus=2)


# -- launches that would not train


@pytest.mark.parametrize(
    ("environment", "flags", "gpus", "message"),
    [
        (
            {},
            "--distributed-world-size 2",
            0,
            "--distributed-world-size '2' without a GPU: fairseq would start no proc",
        ),
        ({}, "--distributed-world-size 2 --cpu", 4, "--distributed-world-size '2' without a GPU"),
        ({}, "--distributed-world-size 2 --distributed-init-method tcp://a:1", 0, "and train nothing"),
        ({}, "--distributed-init-method=tcp://a:1", 0, "and train nothing"),
        ({}, "--distributed-world-size 2 --distributed-no-spawn", 0, "the 2 processes cannot meet"),
        ({}, "--distributed-world-size 2 --distributed-no-spawn", 2, "the 2 processes cannot meet"),
        (
            {},
            "--distributed-world-size 2 --distributed-rank 2 --distributed-init-method tcp://a:1 --distributed-no-spawn",
            0,
            "--distributed-rank is '2': allowed is 0 to 1, as --distributed-world-size is 2",
        ),
        (
            {},
            "--distributed-world-size 2 --distributed-init-method tcp://a:1 --distributed-no-spawn "
            "--distributed-backend nccl",
            0,
            "--distributed-backend is 'nccl', which needs a GPU for each process: give gloo",
        ),
        ({}, "--distributed-world-size two", 0, "--distributed-world-size is 'two': it must be a whole number"),
        (
            TORCHRUN,
            "--distributed-world-size 1",
            0,
            "torchrun started this process as rank 3 of 4, but --distributed-rank is '3' and --distributed-world-size '1'",
        ),
        (
            TORCHRUN,
            "--distributed-rank 0",
            0,
            "torchrun started this process as rank 3 of 4, but --distributed-rank is '0' and --distributed-world-size "
            "'4': the processes would wait for each other for ever; give $RANK and $WORLD_SIZE (for trainings of their "
            "own, each in a folder of its own, unset WORLD_SIZE)",
        ),
        (
            SRUN,
            "--distributed-rank 0",
            0,
            "give $SLURM_PROCID and $SLURM_NTASKS (for trainings of their own, each in a",
        ),
        (
            {"SLURM_JOB_ID": "123", "SLURM_NTASKS": "8"},
            "",
            8,
            "this SLURM job has 8 tasks, but srun did not start this process: fairseq would wait for the others for ever; "
            "put srun before the command",
        ),
    ],
)
def test_launches_that_would_not_train_are_refused(monkeypatch, environment, flags, gpus, message):
    with pytest.raises(UserError) as caught:
        meeting(monkeypatch, environment, flags, gpus)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "flags", "gpus"),
    [
        ({}, "", 0),
        ({}, "", 4),
        ({"WORLD_SIZE": "1"}, "", 0),
        ({}, "--distributed-world-size 2", 2),
        (
            TORCHRUN,
            "--distributed-world-size 4 --distributed-rank 3 --distributed-init-method tcp://a:1 --distributed-no-spawn",
            0,
        ),
        # One task for each node, fairseq starts the rest.
        ({}, "--distributed-world-size 16 --distributed-rank 8 --distributed-init-method tcp://a:1", 8),
    ],
)
def test_launches_that_train_are_let_through(monkeypatch, environment, flags, gpus):
    meeting(monkeypatch, environment, flags, gpus)


# fairseq-train without train.sh: the flags are all there is. (environment, flags, GPUs, what is wrong)
NONE = rendezvous.Told(1, 0, None, False, "nccl")
PLAIN = [
    ({}, NONE, 0, None),
    ({}, NONE._replace(world_size=4), 4, None),
    ({}, NONE._replace(world_size=2), 0, "would start no process"),
    ({}, NONE._replace(world_size=2, init_method="tcp://a:1"), 0, "would start no process"),
    ({}, NONE._replace(world_size=2, init_method="tcp://a:1", no_spawn=True, backend="gloo"), 0, None),
    ({}, NONE._replace(world_size=2, init_method="tcp://a:1", no_spawn=True), 0, "'nccl', which needs a GPU"),
    ({}, NONE._replace(world_size=2, no_spawn=True), 2, "cannot meet"),
    (TORCHRUN, NONE, 0, "torchrun started 4 processes, but --distributed-world-size is 1: each would train alone"),
    (TORCHRUN, NONE._replace(world_size=4), 0, "would start no process"),
    (TORCHRUN, NONE._replace(world_size=2), 2, None),  # fairseq reads the variables
    (TORCHRUN, NONE._replace(world_size=4, no_spawn=True, backend="gloo"), 0, "cannot meet"),
    (TORCHRUN, NONE._replace(world_size=4, init_method="env://", no_spawn=True, backend="gloo"), 0, "rank 3 of 4"),
    (TORCHRUN, rendezvous.Told(4, 3, "env://", True, "gloo"), 0, None),
    (TORCHRUN, NONE._replace(world_size=2, init_method="env://"), 2, "add --distributed-no-spawn"),
    (SRUN, NONE, 0, "srun started 4 processes, but --distributed-world-size is 1: each would train alone"),
    (SRUN, NONE._replace(world_size=2), 2, None),  # fairseq asks scontrol
    ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, NONE._replace(world_size=8), 8, "put srun before the command"),
]


@pytest.mark.parametrize(("environment", "told", "gpus", "message"), PLAIN)
def test_plain_fairseq_train(environment, told, gpus, message):
    reason = rendezvous.why_not(told, rendezvous.launched(environment), gpus, environment)
    assert (reason is None) if message is None else (message in reason)
