"""The run folder: what was run in it, with what, and whether it has finished."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.files import read_json, write_json, write_text

FORMAT = 1
# What decides the numbers of a run, and how to name it to the user. Not the evaluation: it may change afterwards.
SETTINGS = {
    "method": "--method",
    "options": "--config",
    "data_digest": "DATA",
    "seed": "--seed",
    "precision": "--precision",
    "flags": "flags after --",
}
_PACKAGES = ("torch", "fairseq", "fairseq-fixed", "numpy", "sentencepiece", "sacrebleu", "sacremoses")
_EPOCH_CHECKPOINT = re.compile(r"checkpoint(\d+)\.pt\Z")
_NUMBERED_CHECKPOINT = re.compile(r"checkpoint(\d+|_\d+_\d+)\.pt\Z")


class RunFolder:
    """Paths and records of one run.

    Args:
        folder: the folder given as --save-dir; it need not exist.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.record = self.folder / "run.json"
        self.finished = self.folder / "finished.json"
        self.environment = self.folder / "environment.json"
        self.command = self.folder / "command.sh"
        self.log = self.folder / "train.log"
        self.curves = self.folder / "curves.csv"
        self.last_checkpoint = self.folder / "checkpoint_last.pt"

    def read(self) -> dict[str, Any] | None:
        """run.json, or None in a folder where no run was started.

        Raises:
            UserError: the folder is a file, or run.json is not one of this version.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"run folder '{self.folder}' is a file: choose another folder")
        if not self.record.exists():
            return None
        record = read_json(self.record)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise UserError(f"'{self.record}' is damaged or of another version (this one reads format {FORMAT})")
        return record

    def checkpoints(self) -> list[Path]:
        """Every checkpoint file, of whatever kind."""
        return sorted(self.folder.glob("checkpoint*.pt"))

    def epoch_checkpoints(self) -> list[Path]:
        """checkpoint<epoch>.pt, the newest first."""
        numbered = [
            (int(match[1]), path) for path in self.checkpoints() if (match := _EPOCH_CHECKPOINT.match(path.name))
        ]
        return [path for _, path in sorted(numbered, reverse=True)]

    def numbered_checkpoints(self) -> list[Path]:
        """checkpoint<epoch>.pt and checkpoint_<epoch>_<update>.pt: all but the best and the last ones."""
        return [path for path in self.checkpoints() if _NUMBERED_CHECKPOINT.match(path.name)]

    def score(self, checkpoint: str) -> dict[str, Any] | None:
        """score.json of the model that the finished training left, or None.

        An evaluation may also run beside the training: its score is of a model that the training has replaced since.

        Args:
            checkpoint: best, last or averageN.
        """
        path = self.folder / "eval" / checkpoint / "score.json"
        finished, score = read_json(self.finished), read_json(path)
        if not finished or not score:
            return None
        if "finished" in score and "time" in finished:
            return score if score["finished"] == finished["time"] else None
        # Of a version that did not note it.
        return score if path.stat().st_mtime_ns >= self.finished.stat().st_mtime_ns else None

    def _of_another_origin(self) -> Path | None:
        """A file with the name of one of ours in a folder without run.json, which train.sh writes before any other."""
        ours = [self.finished, self.environment, self.command, self.log, self.curves, *self.checkpoints()]
        found = next((path for path in ours if path.exists()), None)
        return None if self.record.exists() else found  # asked last: another process of the same run may be writing it

    def admit(self, settings: dict[str, Any]) -> None:
        """Check that a run with these settings may start or go on here.

        A folder without a checkpoint has nothing to lose, so there a corrected command may replace a failed one.

        Raises:
            UserError: the folder holds a run with other settings (all are named), or files of unknown origin.
        """
        old = self.read()
        if foreign := self._of_another_origin():
            raise UserError(
                f"'{self.folder}' holds '{foreign.name}' but no run.json, so it was not made by train.sh, which would "
                "replace that file: choose another --save-dir"
            )
        if old is None or not self.checkpoints():
            return
        differences = [
            difference
            for key, name in SETTINGS.items()
            if (difference := _difference(name, old["settings"].get(key), settings[key]))
        ]
        if differences:
            raise UserError(
                f"'{self.folder}' holds a run with other settings: {'; '.join(differences)}; "
                "repeat its settings to go on, or choose another --save-dir"
            )

    def write_record(self, record: dict[str, Any]) -> None:
        """Write run.json."""
        write_json(self.record, {"format": FORMAT, **record})

    def write_command(self, command: list[str], environment: dict[str, str]) -> None:
        """Write command.sh: the exact fairseq-train command, one option per line.

        Args:
            command: the words of the command.
            environment: variables that were set and decide numbers (OMP_NUM_THREADS and the like).
        """
        lines, line = [], shlex.quote(command[0])
        for word in command[1:]:
            if word.startswith("--"):
                lines.append(line)
                line = f"    {shlex.quote(word)}"
            else:
                line += f" {shlex.quote(word)}"
        lines.append(line)
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(environment.items()))
        text = (
            "#!/usr/bin/env bash\n"
            "# The fairseq-train command that train.sh ran in this folder, for reading and for use elsewhere.\n"
            "# Once the run has finished, this would train on by one update: use train.sh, which does not.\n"
            f"{exports}exec " + " \\\n".join(lines) + "\n"
        )
        write_text(self.command, text, mode=0o755)

    def add_environment(self, device: dict[str, Any], *, processes: int = 1, update_freq: str = "1") -> list[str]:
        """Add this launch to environment.json.

        Args:
            device: what `devices.probe` found.
            processes: how many train together.
            update_freq: --update-freq in force: batches of each process that make one update.
        Returns:
            The facts that differ from the launch before and can change the last digits of a resumed run.
        """
        launches = (read_json(self.environment) or {}).get("launches", [])
        now = {**environment(), **device, "processes": processes, "update_freq": update_freq}
        changed = [
            f"{key} was {launches[-1].get(key)} and is now {now[key]}"
            for key in ("torch", "fairseq", "fairseq-fixed", "numpy", "threads", "devices")
            if launches and launches[-1].get(key) != now.get(key)
        ]
        write_json(self.environment, {"launches": [*launches, now]})
        return changed


def environment() -> dict[str, Any]:
    """Versions and machine facts that a result depends on; None for a package that is not installed."""
    facts: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }
    for name in _PACKAGES:
        facts[name] = _version(name)
    facts["intra-distillation-fairseq"] = _version("intra-distillation-fairseq")
    facts["git_commit"] = _git_commit(Path(__file__).resolve().parents[2])
    return facts


def _difference(name: str, old: Any, new: Any) -> str | None:
    if old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return f"{name} has " + ", ".join(f"{key} {_show(new.get(key))} (there {_show(old.get(key))})" for key in keys)
    return f"{name} is {_show(new)} (there {_show(old)})"


def _show(value: Any) -> str:
    if isinstance(value, list):
        return f"'{shlex.join(value)}'"
    return "not set" if value is None else f"'{value}'"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit(root: Path) -> str | None:
    """The commit of a checkout, with -dirty where files differ from it; None for an installed package."""
    if not (root / ".git").exists():
        return None
    try:
        words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
