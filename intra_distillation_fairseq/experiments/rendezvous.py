"""How the processes of one training find each other: what torchrun or srun tells, and launches that cannot work.

fairseq has flags for it (--distributed-world-size, -rank, -init-method, -no-spawn, -backend) and, without them, guesses
from the environment, in ways that train nothing, train several times into one folder or wait for ever.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from intra_distillation_fairseq.errors import UserError

# Step ids from here on are SLURM's own, as of a batch script; srun counts from 0.
_FIRST_RESERVED_STEP = 2**32 - 16


class Launched(NamedTuple):
    """This process, as its launcher counts it.

    Attributes:
        by: torchrun or srun.
        rank: its number among all processes, from 0.
        world_size: how many there are.
        local_rank: its number on this machine, from 0.
        init_method: where they meet, as --distributed-init-method takes it.
    """

    by: str
    rank: int
    world_size: int
    local_rank: int
    init_method: str

    def flags(self, gpus: int) -> list[str]:
        """fairseq's flags for this process.

        Args:
            gpus: those that this process sees and may use.
        Raises:
            UserError: more processes than GPUs on this machine.
        """
        if self.world_size == 1:
            return ["--distributed-world-size", "1"] if gpus > 1 else []
        words = ["--distributed-world-size", str(self.world_size), "--distributed-rank", str(self.rank)]
        words += ["--distributed-init-method", self.init_method, "--distributed-no-spawn"]
        if not gpus:
            return [*words, "--distributed-backend", "gloo"]
        device = 0 if gpus == 1 else self.local_rank  # a launcher may show each process its own GPU only
        if device >= gpus:
            raise UserError(
                f"{self.by} started at least {self.local_rank + 1} processes on this machine, which has {gpus} GPUs: "
                "start one for each GPU"
            )
        return [*words, "--distributed-backend", "nccl", "--device-id", str(device)]


def launched(environment: Mapping[str, str]) -> Launched | None:
    """What the launcher of this process says, or None where it was started by itself.

    Args:
        environment: torchrun's WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or what srun sets. Under
            srun MASTER_ADDR and MASTER_PORT may say where the processes meet, else they do on the first node, at a
            port that follows from the number of the job.
    Raises:
        UserError: a variable is missing or no number.
    """
    tasks = _tasks_of_srun(environment)
    if environment.get("WORLD_SIZE") and not (tasks and "RANK" not in environment):
        return _by_torchrun(environment)
    if tasks < 2:
        return None
    job, step = _number(environment, "SLURM_JOB_ID", 0), _number(environment, "SLURM_STEP_ID", 0)
    host = environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST") or "127.0.0.1")
    port = environment.get("MASTER_PORT") or 10000 + (7 * job + step) % 20000  # below those that systems give out
    rank = _number(environment, "SLURM_PROCID")
    return Launched("srun", rank, tasks, _number(environment, "SLURM_LOCALID", rank), f"tcp://{host}:{port}")


def processes_here(environment: Mapping[str, str], by: Launched) -> int:
    """How many processes of a training its launcher has started on this machine; all of them where it does not say.

    Args:
        environment: torchrun's LOCAL_WORLD_SIZE, or srun's SLURM_STEP_TASKS_PER_NODE, as in 8(x3),4, and SLURM_NODEID.
        by: what `launched` found in it.
    """
    if by.by == "torchrun":
        return _number(environment, "LOCAL_WORLD_SIZE", by.world_size)
    nodes = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        nodes += [int(tasks)] * int(times or 1)
    node = _number(environment, "SLURM_NODEID", 0)
    return nodes[node] if node < len(nodes) else by.world_size


def _by_torchrun(environment: Mapping[str, str]) -> Launched | None:
    size = _number(environment, "WORLD_SIZE")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing and size < 2:
        return None
    if missing:
        raise UserError(
            f"WORLD_SIZE is '{size}', but {missing[0]} is not set, without which the processes cannot find each other: "
            "start them with torchrun, or unset WORLD_SIZE for a training of its own"
        )
    rank = _number(environment, "RANK")
    return Launched("torchrun", rank, size, _number(environment, "LOCAL_RANK", rank), "env://")


def _tasks_of_srun(environment: Mapping[str, str]) -> int:
    """0 outside srun; a batch script has some of its variables, too."""
    if not 0 <= _number(environment, "SLURM_STEP_ID", -1) < _FIRST_RESERVED_STEP:
        return 0
    return _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 0))


def _number(environment: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    text = environment.get(name, "")
    if not text and otherwise is not None:
        return otherwise
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{name} is '{text}': a launcher sets it to a whole number; start the processes with one")
    return int(text)


def _first_host(nodes: str) -> str:
    """Of a list as SLURM writes it: node[07-09,12],gpu3 -> node07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0]) if first else nodes


def on_this_machine() -> list[str]:
    """Flags with which the processes that fairseq itself starts meet here, whatever a batch system's variables say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return ["--distributed-init-method", f"tcp://127.0.0.1:{free.getsockname()[1]}"]


class Told(NamedTuple):
    """fairseq's flags by which the processes find each other, as they will count."""

    world_size: int
    rank: int
    init_method: str | None
    no_spawn: bool
    backend: str


def why_not(told: Told, by: Launched | None, gpus: int, environment: Mapping[str, str]) -> str | None:
    """Why a launch would train nothing, several times into one folder, or never begin (P9); None if it trains.

    Args:
        told: the flags.
        by: the launcher, see `launched`.
        gpus: those that this process may use.
        environment: of this process.
    """
    size = told.world_size
    several = by is not None and by.world_size > 1
    alone = "for trainings of their own, each in a folder of its own, unset "
    alone += "WORLD_SIZE" if by and by.by == "torchrun" else "SLURM_STEP_ID"
    if size == 1 and told.init_method is None:
        if not several:
            return None
        return (
            f"{by.by} started {by.world_size} processes, but --distributed-world-size is 1: each would train alone "
            "into the same folder; use train.sh, which takes over what the launcher says, or give "
            f"--distributed-world-size and the other flags of docs/distributed.md ({alone})"
        )
    if not told.no_spawn:
        return _why_not_spawn(told, by, gpus, environment)
    if told.init_method is None and (gpus == 0 or not several):
        return f"--distributed-no-spawn without --distributed-init-method: the {size} processes cannot meet; add it"
    if several and told.init_method is not None and (told.rank, size) != (by.rank, by.world_size):
        variables = "$RANK and $WORLD_SIZE" if by.by == "torchrun" else "$SLURM_PROCID and $SLURM_NTASKS"
        return (
            f"{by.by} started this process as rank {by.rank} of {by.world_size}, but --distributed-rank is "
            f"'{told.rank}' and --distributed-world-size '{size}': the processes would wait for each other for ever; "
            f"give {variables} ({alone})"
        )
    if not 0 <= told.rank < size:
        return f"--distributed-rank is '{told.rank}': allowed is 0 to {size - 1}, as --distributed-world-size is {size}"
    if told.backend == "nccl" and gpus == 0:
        return "--distributed-backend is 'nccl', which needs a GPU for each process: give gloo"
    return None


def _why_not_spawn(told: Told, by: Launched | None, gpus: int, environment: Mapping[str, str]) -> str | None:
    """Where fairseq is to start the processes of this machine itself, one for each GPU."""
    if gpus == 0:
        return (
            f"--distributed-world-size '{told.world_size}' without a GPU: fairseq would start no process and train "
            "nothing; start it with torchrun, or each process yourself with --distributed-rank R "
            "--distributed-init-method tcp://HOST:PORT --distributed-no-spawn --distributed-backend gloo"
        )
    if by and by.by == "torchrun" and by.world_size > 1 and told.init_method is not None:
        return (
            f"torchrun started {by.world_size} processes, and each would start as many again as there are GPUs: add "
            "--distributed-no-spawn"
        )
    tasks = _number(environment, "SLURM_NTASKS", 1) if environment.get("SLURM_JOB_ID") else 1
    if by is None and told.init_method is None and tasks > 1:
        return (
            f"this SLURM job has {tasks} tasks, but srun did not start this process: fairseq would wait for the others "
            "for ever; put srun before the command"
        )
    return None
