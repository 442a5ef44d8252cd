"""Preparing data and filling a table, stopped at random moments: the rerun ends with what was to be, to the byte.

A moment is a change to a file of the folder, counted over all processes, or a time for what lies between two of them.
Most kills are SIGKILL for every process at once, as when a machine goes down; some are a signal for the first one alone.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fairseq_commands import TINY_RECIPE
from killing import Moment, run
from wit3_sample import sentence

from intra_distillation_fairseq.cli import main
from intra_distillation_fairseq.experiments.reproduction import INTRA_DISTILLATION

# A training of a second, with a checkpoint every ten updates to go on from.
CONFIG = (
    TINY_RECIPE
    + """
  optimizer: adam
  lr: 0.01
  max-tokens: 100
  max-update: 60
  save-interval-updates: 10
  no-epoch-checkpoints: true
  num-workers: 0
  log-interval: 5
methods:
  transformer: {criterion: label_smoothed_cross_entropy}
  id_x: {criterion: intra_distillation, id-num-passes: 2, id-alpha: 5, id-p: 5, id-q: 10}
  sage: {criterion: label_smoothed_cross_entropy, optimizer: sage_adam}
evaluate: {beam: 2, max-len-a: 1.2, max-len-b: 5, lowercase: true}
"""
)
# Exit statuses of a command that was told to stop: of the signal itself or 128 + its number, and of a training that saved.
STOPPED = {signal.SIGTERM: (-15, 143, 75), signal.SIGINT: (130,)}


def moments(rng: random.Random, events: int, seconds: float):
    """Endlessly: changes to files and times in turn, each third with a signal that asks instead of one that kills."""
    while True:
        for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGINT):
            yield Moment(event=rng.randint(1, events), number=number)
            yield Moment(seconds=rng.uniform(0, seconds), number=signal.SIGKILL)


def survive(
    words: list[str],
    begin: Callable[[], Path],
    result: Callable[[Path], dict[str, str]],
    scratch: Path,
    *,
    single: int,
    in_a_row: int,
    seed: int,
) -> int:
    """Compare an undisturbed run with runs that were stopped.

    Args:
        words: the command, run in the folder that `begin` makes.
        begin: makes a new folder with the command's input.
        result: name -> digest of what must be the same.
        scratch: a folder for what is needed to watch.
        single: how often to stop it once and run it again to the end.
        in_a_row: how often to stop it, and the run after that, and so on, before one comes to its end.
        seed: of the moments.
    Returns:
        Number of times that it was stopped.
    """
    folder = begin()
    undisturbed = run(words, folder, scratch)
    assert undisturbed.status == 0, undisturbed.output
    expected = result(folder)
    assert undisturbed.events > 20 and expected
    when, stops, folder = moments(random.Random(seed), undisturbed.events, undisturbed.seconds), 0, begin()
    left = [in_a_row, *[1] * single]
    while left:
        moment = next(when) if left[0] else None
        ended = run(words, folder, scratch, moment)
        context = f"{moment}\n{ended.output}"
        if ended.stopped:
            assert moment.number == signal.SIGKILL or ended.status in (*STOPPED[moment.number], 0), context
            stops, left[0] = stops + 1, left[0] - 1
            records_are_whole(folder)
            continue
        assert ended.status == 0, context
        assert result(folder) == expected, context
        assert leftovers(folder) == [], context
        if not left[0]:  # else it was faster than the moment, and the stops that are left are for the next one
            left.pop(0)
        shutil.rmtree(folder)
        folder = begin()
    return stops


def records_are_whole(folder: Path) -> None:
    for path in folder.rglob("*.json"):
        if not path.name.startswith("."):
            json.loads(path.read_text(encoding="utf-8"))


def leftovers(folder: Path) -> list[str]:
    """What has a temporary name: it would pile up, run after run."""
    temporary = re.compile(r"\.making-|\.source\d|\.tmp|^\..*\.\d+$")
    return [str(path) for path in folder.rglob("*") if temporary.search(path.name)]


def digests(folder: Path) -> dict[str, str]:
    """Every file with its checksum, without logs, locks and the stamps' times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and not {"logs", "stages", "download"} & set(path.parts)
    }


@pytest.fixture
def new_folder(tmp_path):
    """new_folder() makes an empty folder: the same name each time would hide what depends on it."""

    def make() -> Path:
        number = len(list(tmp_path.glob("run *")))
        folder = tmp_path / f"run {number} é"
        folder.mkdir()
        return folder

    return make


@pytest.fixture
def scratch(tmp_path) -> Path:
    folder = tmp_path / "watch"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "2014-01.tgz"
    assert main.main(["demo-archive", "--out", str(path), "--train", "300", "--test", "12"]) == 0
    return path


def test_prepare_parallel(new_folder, scratch, full, record_property):
    def begin() -> Path:
        folder, rng = new_folder(), random.Random(5)
        for split, lines in (("train", 2500), ("valid", 20), ("test", 30)):
            for lang in ("de", "en"):
                text = "".join(sentence(rng) + "\n" for _ in range(lines))
                (folder / f"{split}.{lang}").write_text(text, encoding="utf-8")
        return folder

    words = [*INTRA_DISTILLATION, "prepare-parallel", "--src", "de", "--tgt", "en", "--out", "out", "--moses"]
    words += ["--train", "train", "--valid", "valid", "--test", "test", "--vocab-size", "100", "--jobs", "3"]
    counts = {"single": 10, "in_a_row": 10} if full else {"single": 0, "in_a_row": 4}
    stops = survive(words, begin, lambda folder: digests(folder / "out"), scratch, **counts, seed=1)
    record_property("kills survived", stops)


def test_prepare_iwslt14(archive, new_folder, scratch, full, record_property):
    def begin() -> Path:
        folder = new_folder()
        shutil.copy(archive, folder)
        return folder

    words = [*INTRA_DISTILLATION, "prepare-iwslt14", "--langs", "de", "--archive", "2014-01.tgz", "--out", "out"]
    words += ["--vocab-size", "150", "--jobs", "2"]
    counts = {"single": 10, "in_a_row": 10} if full else {"single": 0, "in_a_row": 2}
    stops = survive(words, begin, lambda folder: digests(folder / "out"), scratch, **counts, seed=2)
    record_property("kills survived", stops)


def test_table(archive, new_folder, scratch, full, record_property):
    methods = ("transformer", "id_x", "sage") if full else ("id_x",)

    def begin() -> Path:
        folder = new_folder()
        shutil.copy(archive, folder)
        (folder / "tiny.yaml").write_text(CONFIG, encoding="utf-8")
        return folder

    def result(folder: Path) -> dict[str, str]:
        """The table without what is measured of a machine, and all that it is made from; the data beside it."""
        found = digests(folder / "data")
        lines = (folder / "runs" / "table.md").read_text(encoding="utf-8").split("\n")
        found["table.md"] = "\n".join(without_measurements(line) for line in lines if "the commit differs" not in line)
        found["table.tsv"] = (folder / "runs" / "table.tsv").read_text(encoding="utf-8")
        for method in methods:
            cell = folder / "runs" / "de-en" / method / "seed1"
            curves = (cell / "curves.csv").read_text(encoding="utf-8").splitlines()
            assert len(curves) == 1 + 60 // 10
            found[f"{method} curves"] = "\n".join(line.rpartition(",")[0] for line in curves)
            found[f"{method} hypotheses"] = (cell / "eval" / "best" / "hypotheses.txt").read_text(encoding="utf-8")
        return found

    words = [*INTRA_DISTILLATION, "reproduce", "--table", "2", "--archive", "2014-01.tgz", "--data-root", "data"]
    words += ["--config", "tiny.yaml", "--results", "runs", "--langs", "de", "--methods", " ".join(methods)]
    words += ["--prepare-flags=--vocab-size 150 --jobs 2", "--", "--cpu"]
    counts = {"single": 3, "in_a_row": 17} if full else {"single": 0, "in_a_row": 3}
    stops = survive(words, begin, result, scratch, **counts, seed=3)
    record_property("kills survived", stops)


def without_measurements(line: str) -> str:
    """A line of the table without its columns of time, speed and memory."""
    cells = [cell.strip() for cell in line.split("|")]
    return "|".join(cells[:4] + cells[7:] if len(cells) == 10 else cells)
