"""Self-distillation in rounds (Table 1 of the paper): each round's student has the round before as its teacher."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import launch, processes
from intra_distillation_fairseq.experiments.prepared import PreparedData
from intra_distillation_fairseq.experiments.recipes import Recipe, evaluation_as_dict
from intra_distillation_fairseq.experiments.reproduction import INTRA_DISTILLATION
from intra_distillation_fairseq.experiments.runs import RunFolder
from intra_distillation_fairseq.files import Held, file_sha256, read_json, write_json

BASELINE = "transformer"
CHECKPOINT = "best"  # of every round, as scored and as taught by
_OURS = ("criterion", "teacher")


@dataclass(frozen=True)
class Task:
    """What to do.

    Attributes:
        data: the prepared data folder of all rounds.
        recipe: their settings.
        student: method of the rounds from 1 on; that of round 0 is BASELINE.
        rounds: the last round.
        results: gets a run folder for each round.
        baseline: a finished run that is round 0; None to train it.
        seed, precision: of train.sh.
        flags: for fairseq-train, after all others.
        sensitivity: measure it for each round.
    """

    data: PreparedData
    recipe: Recipe
    student: str
    rounds: int
    results: Path
    baseline: Path | None
    seed: int
    precision: str
    flags: list[str]
    sensitivity: bool

    @property
    def cpu(self) -> bool:
        """Whether the flags keep everything off the GPU."""
        return "--cpu" in self.flags

    def method(self, number: int) -> str:
        """The method of a round."""
        return self.student if number else BASELINE

    def folder(self, number: int) -> RunFolder:
        """The run folder of a round."""
        given = self.baseline if number == 0 else None
        return RunFolder(given or self.results / f"round{number}")

    def model(self, number: int) -> Path:
        """The checkpoint that a round is scored by, and that teaches the next one."""
        return self.folder(number).folder / f"checkpoint_{CHECKPOINT}.pt"


def check(task: Task) -> list[str]:
    """Everything that can be found wrong before anything is trained.

    Returns:
        Notes for the reader.

    Raises:
        UserError: flags that the rounds set themselves, a method that the recipe has not, a baseline that is not
            finished or has other dictionaries, or a student of another teacher.
    """
    launch.check_flags(task.flags)
    for name in _OURS:
        if launch.last_value(task.flags, name) is not None:
            raise UserError(f"'--{name}' cannot be given after --: each round sets its own")
    for number in (0, 1):
        if number or not task.baseline:
            launch.max_update(launch.as_flags(task.recipe.options(task.method(number))) + task.flags)
    notes = _check_baseline(task) if task.baseline else []
    for number in range(1, task.rounds + 1):
        _check_teacher(task, number)
    return notes


def _check_baseline(task: Task) -> list[str]:
    folder = task.folder(0)
    record = folder.read()
    if record is None or not folder.finished.exists() or not task.model(0).exists():
        raise UserError(
            f"--baseline '{task.baseline}' is not a finished run of train.sh (run.json, finished.json and "
            f"{task.model(0).name} are needed): train it first, or leave --baseline out"
        )
    if record["dictionary_digest"] != task.data.dictionary_digest:
        raise UserError(
            f"--baseline '{task.baseline}' was trained with other dictionaries (data folder '{record['data']}') than "
            f"those of '{task.data.folder}': its students need the same ones"
        )
    ours = _settings(task, 0, None)
    others = [key for key, value in ours.items() if record["settings"].get(key) != value]
    differ = f"note: --baseline '{task.baseline}' differs from what round 0 would be in its {', '.join(others)}"
    return [differ] if others else []


def _teacher_note(task: Task, number: int) -> Path:
    return task.folder(number).folder / "teacher.json"


def _check_teacher(task: Task, number: int) -> None:
    """A table must not mix a student with a teacher that has been trained again since."""
    folder, teacher, noted = task.folder(number), task.model(number - 1), _teacher_note(task, number)
    if not folder.checkpoints():
        return
    note = read_json(noted) or {}
    known = note.get("sha256")
    if known and teacher.exists() and file_sha256(teacher) == known:
        _check_place(task, number, note["checkpoint"])
        return
    what = "is not the one" if known else f"cannot be told to be the one (no '{noted.name}' there)"
    raise UserError(
        f"round {number}: the teacher '{teacher}' {what} that the student in '{folder.folder}' was begun with: put "
        f"that one back (--baseline, for round 0), give another --results or delete '{folder.folder}' to train it again"
    )


def _check_place(task: Task, number: int, old: str) -> None:
    """A run goes on with its own flags only, and the teacher's path is one of them."""
    folder, new = task.folder(number), str(task.model(number - 1))
    if old != new and not folder.finished.exists():
        raise UserError(
            f"round {number}: the unfinished student in '{folder.folder}' was begun with its teacher at '{old}', which "
            f"is at '{new}' now: move it back to where it was and repeat that command, or delete '{folder.folder}' to "
            "train this student anew"
        )


def _settings(task: Task, number: int, teacher: Path | str | None) -> dict[str, object]:
    """What run.json says of a round trained as the task wants it, but for the precision, which may be auto."""
    return {
        "method": task.method(number),
        "options": task.recipe.options(task.method(number)),
        "data_digest": task.data.digest,
        "seed": task.seed,
        "flags": launch.lasting_flags(_flags(task, teacher)),
    }


def _flags(task: Task, teacher: Path | str | None) -> list[str]:
    """Flags after `--`, which win over the recipe, so that every method's options make a student."""
    taught = [] if teacher is None else ["--criterion", "self_distillation", "--teacher", str(teacher)]
    return [*taught, *task.flags]


class Rounds:
    """Does a task, round after round; what is finished is skipped.

    Args:
        task: checked by `check`.
        held: the lock of the results folder, which the commands inherit.
        say: prints one line.
    """

    def __init__(self, task: Task, held: Held, say: Callable[[str], None]) -> None:
        self._task = task
        self._held = held
        self._say = say

    def run(self, number: int) -> int:
        """Train, evaluate and measure one round, as far as that is not done.

        Returns:
            0, or the exit status of the step that failed.
        """
        if number:
            _check_teacher(self._task, number)  # once more: the teacher's training may have gone on just now
        steps = (
            ("train", not self._is_trained(number), self._train),
            # These two see for themselves what is done, and on which data.
            ("evaluate", True, self._evaluate),
            ("sensitivity", self._task.sensitivity, self._measure),
        )
        for name, is_needed, words in steps:
            if is_needed and (status := self._step(number, name, words(number))):
                return status
        return 0

    def _step(self, number: int, name: str, words: list[str]) -> int:
        log = self._task.results / "logs" / f"round{number}-{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._say(f"round {number}: {name}, log: {log}")
        return processes.run_logged(
            [*INTRA_DISTILLATION, *words],
            log,
            follow=lambda line: self._say(f"  {line}"),
            started=lambda pid: self._held.tell(
                f"intra-distillation self-distill (process {os.getpid()}) and its {name} ({pid})"
            ),
            pass_fds=(self._held.fileno(),),
        )

    def _is_trained(self, number: int) -> bool:
        task, folder = self._task, self._task.folder(number)
        if number == 0 and task.baseline:
            return True
        if not folder.finished.exists() or not task.model(number).exists():
            return False
        # By its checksum the teacher is the same (`check`), wherever the results folder was when the student began.
        teacher = read_json(_teacher_note(task, number))["checkpoint"] if number else None
        settings = (folder.read() or {"settings": {}})["settings"]
        wanted = _settings(task, number, teacher)
        precision = task.precision in ("auto", settings.get("precision"))
        return precision and all(settings.get(key) == value for key, value in wanted.items())

    def _train(self, number: int) -> list[str]:
        task, folder, teacher = self._task, self._task.folder(number), None
        if number:
            teacher, noted = task.model(number - 1), _teacher_note(task, number)
            folder.folder.mkdir(parents=True, exist_ok=True)
            if not folder.checkpoints():  # a student that is there keeps the note of the teacher it was begun with
                write_json(noted, {"checkpoint": str(teacher), "sha256": file_sha256(teacher)})
        words = ["train", str(task.data.folder), "--method", task.method(number), "--config", str(task.recipe.path)]
        words += ["--save-dir", str(folder.folder), "--seed", str(task.seed), "--precision", task.precision]
        return [*words, "--", *_flags(task, teacher)]

    def _evaluate(self, number: int) -> list[str]:
        # evaluate.sh searches as the run's record says: in a table, all rounds as the recipe says now.
        folder, wanted = self._task.folder(number), evaluation_as_dict(self._task.recipe.evaluation)
        record = folder.read()
        if record and record["evaluation"] != wanted:
            folder.write_record({**record, "evaluation": wanted})
        return self._on_best("evaluate", number)

    def _measure(self, number: int) -> list[str]:
        return self._on_best("sensitivity", number)

    def _on_best(self, command: str, number: int) -> list[str]:
        # With the data of this task: a baseline may have been trained on another folder, which may be gone.
        words = [command, str(self._task.folder(number).folder), "--data", str(self._task.data.folder)]
        return [*words, "--checkpoint", CHECKPOINT, *(["--cpu"] if self._task.cpu else [])]
