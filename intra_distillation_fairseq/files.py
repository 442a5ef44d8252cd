"""Files written whole or not at all, checksums, JSON and locks; knows nothing of what is in the files."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from intra_distillation_fairseq.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what the body writes there takes its place, unless the body fails.

    Its bytes are on the disk before it has the name: after a power cut, a renamed file could else be empty.
    """
    _remove_leftovers(path.parent)
    temporary = path.with_name(f".{path.name}{_temporary_ending()}{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_ending() -> str:
    """With the machine, since process ids mean nothing on another one that shares the folder."""
    return f".{socket.gethostname()}."


def _remove_leftovers(folder: Path) -> None:
    """Temporary files of processes of this machine that were killed; those of live ones stay."""
    with suppress(OSError):  # whatever is wrong with the folder, the file's writer will tell
        for path in folder.iterdir():
            name, ending, process = path.name.rpartition(_temporary_ending())
            if name.startswith(".") and ending and process.isdigit() and not Path(f"/proc/{process}").exists():
                path.unlink()


def sync(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def write_text(path: Path, text: str, mode: int | None = None) -> None:
    """Write UTF-8 text as it is, whole or not at all.

    Args:
        path: the file.
        text: line feeds stay line feeds.
        mode: permissions, as in 0o755. None: the usual ones.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        if mode is not None:
            temporary.chmod(mode)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a record; None where the file is missing, broken or no JSON object, which all mean: it tells nothing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's `bytes` (its size), `mtime_ns` and `sha256`."""
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": file_sha256(path)}


def unchanged(path: Path, known: dict[str, Any]) -> bool:
    """Tell whether a file still has the bytes of its fingerprint; they are read only where its time has changed."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    if status.st_size != known["bytes"]:
        return False
    return status.st_mtime_ns == known["mtime_ns"] or file_sha256(path) == known["sha256"]


class Held:
    """A lock that this process holds.

    Args:
        file: the open lock file.
    """

    def __init__(self, file: TextIO):
        self._file = file

    def fileno(self) -> int:
        """For `pass_fds`: a child that inherits it holds the lock as well."""
        return self._file.fileno()

    def tell(self, who: str) -> None:
        """Name the holder, for whoever is kept out."""
        self._file.truncate(0)
        self._file.write(f"{who} on {socket.gethostname()}\n")
        self._file.flush()


@contextmanager
def lock(path: Path, what: str, say_waiting: Callable[[str], None] | None = None) -> Iterator[Held]:
    """Hold a folder for one process while the body runs; the system frees it however the process ends.

    The lock goes with the open file, so a child that inherits it holds it too: where train.sh is killed and
    fairseq-train lives on, a second run is still kept out.

    Args:
        path: the lock file; its folder is made.
        what: what is locked, for the message.
        say_waiting: prints one line and waits where another process holds the lock. None: do not wait.

    Yields:
        The lock, for a child to inherit and to name other holders.

    Raises:
        UserError: another process holds the lock (the message says which), or the folder cannot be written or locked.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"{what} '{path.parent}' cannot be written ({error.strerror}): give another folder, or free this one"
        ) from None
    with file:
        try:
            _acquire(file, f"{what} '{path.parent}'", say_waiting)
        except OSError as error:
            raise UserError(
                f"{what} '{path.parent}' cannot be locked ({error.strerror}): give a folder on another file system"
            ) from None
        held = Held(file)
        held.tell(f"process {os.getpid()}")
        try:
            yield held
        finally:
            file.truncate(0)


def _acquire(file: TextIO, place: str, say_waiting: Callable[[str], None] | None) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        used = f"{place} is in use by {file.read().strip() or 'another process'}"
        if say_waiting is None:
            raise UserError(f"{used}: wait for it, or stop it first") from None
        say_waiting(f"{used}: waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)
