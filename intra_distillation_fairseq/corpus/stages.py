"""Stages of a data folder: made under a temporary name, checked, renamed, stamped; not made twice.

A stamp holds a digest of everything that decides the stage's bytes (settings and input files). A stage whose stamp
still fits its files is skipped, so a run killed anywhere goes on, and a changed setting redoes what depends on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.files import fingerprint, read_json, sync, unchanged, write_json

_TEMPORARY = ".making-"
# Raise it with a change of this code that changes the bytes of any stage: older stamps then no longer fit.
_CODE_VERSION = 1


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
            self._known[name] = known = fingerprint(path)
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
    """A folder in which stages put their outputs. Use it under a lock.

    Attributes:
        path: the folder.
        names: what the stages (and the manifest) put into it: names of files and folders.
        inputs: the user's files that the stages read.
        force: make every stage again.
        say: prints one line of progress.
        done: names of the stages that this run made (and did not find made).

    Raises:
        UserError: an input lies in an output, or one of the names is taken by something that no stage made.
    """

    path: Path
    names: tuple[str, ...]
    inputs: tuple[Path, ...] = ()
    force: bool = False
    say: Callable[[str], None] = print
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._check_nothing_is_lost()
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
            for path in files:  # a stamp vouches for size and time, which a power cut could else leave without bytes
                sync(path)
            outputs = {p.relative_to(temporary).as_posix(): fingerprint(p) for p in files}
            # A stamp without a key fits nothing, but says whose the outputs are if this run is killed from here on.
            write_json(stamp_path, {"stage": stage.name, "key": None, "outputs": outputs})
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

    def _check_nothing_is_lost(self) -> None:
        """Publishing replaces whole folders, so what the user has put there must not be in the way."""
        for path in self.inputs:
            for name in self.names:
                if path.resolve().is_relative_to((self.path / name).resolve()):
                    raise UserError(
                        f"the input '{path}' lies in '{self.path / name}', which is made anew: give another --out, or "
                        "move the input"
                    )
        stamps = [read_json(path) for path in (self.path / "stages").glob("*.json")]
        made = {Path(name).parts[0] for stamp in stamps if isinstance(stamp, dict) for name in stamp.get("outputs", ())}
        if made:
            made.add("manifest.json")  # written after the stages, without a stamp
        for name in self.names:
            if name not in made and os.path.lexists(self.path / name):
                raise UserError(
                    f"'{self.path / name}' is there and no stamp in '{self.path / 'stages'}' says that it was made "
                    "here: give another --out, or move it away"
                )

    def _intact(self, stamp: dict[str, Any]) -> bool:
        return all(unchanged(self.path / name, known) for name, known in stamp["outputs"].items())

    def _publish(self, entry: Path) -> None:
        """Move a finished file or folder to its place; what an earlier run put there goes away as a whole."""
        place = self.path / entry.name
        if place.is_dir():
            # A folder cannot be replaced in one step: the old one steps aside first, and goes with the temporary one.
            os.replace(place, entry.with_name(f".old-{entry.name}"))
        os.replace(entry, place)


def digests(stamp: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Name -> SHA-256 of a stage's outputs whose path starts with `prefix`: the inputs of the next stage."""
    return {name: known["sha256"] for name, known in stamp["outputs"].items() if name.startswith(prefix)}
