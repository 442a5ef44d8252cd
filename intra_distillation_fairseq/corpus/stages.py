"""Stages of a data folder: made under a temporary name, checked, renamed, stamped; not made twice.

A stamp holds a digest of everything that decides the stage's bytes (settings and input files). A stage whose stamp
still fits its files is skipped, so a run killed anywhere goes on, and a changed setting redoes what depends on it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.errors import UserError

_TEMPORARY = ".making-"
# Raise it with a change of this code that changes the bytes of any stage: older stamps then no longer fit.
_CODE_VERSION = 1


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Read JSON; None where the file is missing or broken, which for a stamp both mean: do it again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def _fingerprint(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": file_sha256(path)}


def _unchanged(path: Path, known: dict[str, Any]) -> bool:
    """Tell whether a file still has the bytes of its fingerprint; they are read only where its time has changed."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    if status.st_size != known["bytes"]:
        return False
    return status.st_mtime_ns == known["mtime_ns"] or file_sha256(path) == known["sha256"]


@contextmanager
def lock(path: Path, what: str, say_waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock while the body runs; the system frees it however the process ends.

    Args:
        path: the lock file; its folder is made.
        what: what is locked, for the message.
        say_waiting: prints one line and waits where another process holds the lock. None: do not wait.

    Raises:
        UserError: another process holds the lock; the message says which.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"{what} '{path.parent}' cannot be written ({error.strerror}): give another folder, or free this one"
        ) from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            used = f"{what} '{path.parent}' is in use by {stream.read().strip() or 'another process'}"
            if say_waiting is None:
                raise UserError(f"{used}: wait for it, or stop it first") from None
            say_waiting(f"{used}: waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        stream.truncate()
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        try:
            yield
        finally:
            stream.seek(0)
            stream.truncate()


class FileDigests:
    """SHA-256 of the user's input files, remembered by path, size and time, so that a rerun need not read them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, dict[str, Any]] = read_json(path) or {}

    def sha256(self, path: Path) -> str:
        """Digest of one file; its bytes are read only if size or time differ from last time."""
        name = str(path.resolve())
        status = path.stat()
        known = self._known.get(name)
        if not known or (known["bytes"], known["mtime_ns"]) != (status.st_size, status.st_mtime_ns):
            self._known[name] = known = _fingerprint(path)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._known)
        return known["sha256"]


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Attributes:
        name: a verb, printed and used for the stamp's name.
        settings: every option and version that decides the output's bytes; JSON values.
        inputs: name of an input file -> its SHA-256.
        make: writes the outputs into the folder it is given, checks them, and returns what to remember (JSON values).
    """

    name: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    make: Callable[[Path], dict[str, Any]]

    def key(self) -> str:
        """Digest of all that decides the outputs."""
        text = json.dumps([_CODE_VERSION, self.name, self.settings, self.inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class DataFolder:
    """A folder in which stages put their outputs. Use it under `lock`.

    Attributes:
        path: the folder.
        force: make every stage again.
        say: prints one line of progress.
        done: names of the stages that this run made (and did not find made).
    """

    path: Path
    force: bool = False
    say: Callable[[str], None] = print
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.path / "stages").mkdir(parents=True, exist_ok=True)
        for left_over in self.path.glob(_TEMPORARY + "*"):  # of a run that was killed
            shutil.rmtree(left_over)

    def run(self, stage: Stage) -> dict[str, Any]:
        """Make a stage's outputs unless they are there; returns its stamp.

        The stamp has `outputs` (path within the folder -> bytes, mtime_ns, sha256), `settings`, `inputs` and `report`,
        what `make` returned.
        """
        stamp_path = self.path / "stages" / f"{stage.name}.json"
        stamp = read_json(stamp_path)
        if not self.force and stamp and stamp["key"] == stage.key() and self._intact(stamp):
            return stamp
        self.say(f"{stage.name} ...")
        temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{stage.name}-", dir=self.path))
        try:
            report = stage.make(temporary)
            files = sorted(p for p in temporary.rglob("*") if p.is_file())
            outputs = {p.relative_to(temporary).as_posix(): _fingerprint(p) for p in files}
            stamp_path.unlink(missing_ok=True)
            for entry in sorted(temporary.iterdir()):
                self._publish(entry)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        stamp = {
            "stage": stage.name,
            "key": stage.key(),
            "settings": stage.settings,
            "inputs": stage.inputs,
            "outputs": outputs,
            "report": report,
        }
        write_json(stamp_path, stamp)
        self.done.append(stage.name)
        return stamp

    def _intact(self, stamp: dict[str, Any]) -> bool:
        return all(_unchanged(self.path / name, known) for name, known in stamp["outputs"].items())

    def _publish(self, entry: Path) -> None:
        """Move a finished file or folder to its place; what was there goes away as a whole."""
        place = self.path / entry.name
        if place.is_dir():
            # A folder cannot be replaced in one step: the old one steps aside first, and goes with the temporary one.
            os.replace(place, entry.with_name(f".old-{entry.name}"))
        os.replace(entry, place)


def digests(stamp: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Name -> SHA-256 of a stage's outputs whose path starts with `prefix`: the inputs of the next stage."""
    return {name: known["sha256"] for name, known in stamp["outputs"].items() if name.startswith(prefix)}
