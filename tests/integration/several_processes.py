"""fairseq-train in several processes on the CPU."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

from fairseq_commands import TINY_MODEL, TRAINING, USER_DIR, Running


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_several(number: int, data: Path, save_dir: Path, *flags: object) -> list[subprocess.CompletedProcess]:
    """fairseq-train in so many processes, over gloo; what each of them ended with, rank 0 first."""
    address = f"tcp://127.0.0.1:{free_port()}"
    processes = [
        Running(
            "train", data, "--user-dir", USER_DIR, "--save-dir", save_dir, *TINY_MODEL, *TRAINING, *flags,
            "--distributed-world-size", number, "--distributed-rank", rank, "--distributed-init-method", address,
            "--distributed-no-spawn", "--distributed-backend", "gloo",
        )
        for rank in range(number)
    ]  # fmt: skip
    return [process.wait() for process in processes]


def several_processes(number: int, data: Path, save_dir: Path, *flags: object) -> list[str]:
    """fairseq-train in so many processes, all of which must succeed; their logs, that of rank 0 first."""
    done = run_several(number, data, save_dir, *flags)
    assert [d.returncode for d in done] == [0] * number, "".join(d.stderr[-3000:] for d in done)
    return [d.stdout for d in done]
