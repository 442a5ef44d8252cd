"""The rounds of self-distillation and their table, with commands that leave made-up run folders in no time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from intra_distillation_fairseq.cli import main
from intra_distillation_fairseq.experiments import processes
from intra_distillation_fairseq.experiments.prepared import open_prepared
from intra_distillation_fairseq.experiments.recipes import evaluation_as_dict, read_recipe
from intra_distillation_fairseq.experiments.reproduction import INTRA_DISTILLATION
from intra_distillation_fairseq.experiments.table_text import number
from intra_distillation_fairseq.files import Held, file_sha256, read_json, write_json

CONFIG = Path(main.__file__).resolve().parents[2] / "configs" / "iwslt14_transformer_small.yaml"
RECIPE = read_recipe(CONFIG)
SETTINGS = {"split": "train", "batches": 100, "tokens": 4321, "seed": 1, "dropout": True, "average": "absolute"}
SETTINGS |= {"objective": "cross_entropy", "normalised": False}
SUMMARY = {"std": 0.25, "std_trimmed": 0.125, "ratio": 8.0, "gini": 0.5}


class Commands:
    """Stands for `processes.run_logged`: notes each command, and leaves the records that it would leave."""

    def __init__(self) -> None:
        self.called: list[list[str]] = []
        self.fails: dict[str, str] = {}  # command -> the line of its error

    def __call__(self, command, log, *, follow, started, pass_fds) -> int:
        started(4711)
        name, *words = command[len(INTRA_DISTILLATION) :]
        self.called.append([name, *words])
        if name in self.fails:
            follow(self.fails[name])
            return 2
        getattr(self, name)(words)
        return 0

    def train(self, words: list[str]) -> None:
        dashes = words.index("--")
        options = dict(zip(words[1:dashes:2], words[2:dashes:2], strict=True))
        data, folder = open_prepared(Path(words[0]), ()), Path(options["--save-dir"])
        settings = {"method": options["--method"], "options": RECIPE.options(options["--method"]), "precision": "fp32"}
        settings |= {"data_digest": data.digest, "seed": int(options["--seed"]), "flags": words[dashes + 1 :]}
        record = {"format": 1, "settings": settings, "data": words[0], "dictionary_digest": data.dictionary_digest}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", {**record, "evaluation": evaluation_as_dict(RECIPE.evaluation)})
        (folder / "checkpoint_best.pt").write_text(json.dumps(settings))
        write_json(folder / "finished.json", {"time": "2022-12-07"})

    def evaluate(self, words: list[str]) -> None:
        out = Path(words[0]) / "eval" / "best"
        out.mkdir(parents=True, exist_ok=True)
        score = {"bleu": 30.0, "bleu_signature": "tok:13a", "valid_loss": 4.0, "update": 9, "finished": "2022-12-07"}
        write_json(out / "score.json", {**score, "inputs": {"evaluation": evaluation_as_dict(RECIPE.evaluation)}})
        for name in ("hypotheses.txt", "references.txt"):
            (out / name).write_text("a b c d\n")

    def sensitivity(self, words: list[str]) -> None:
        (Path(words[0]) / "analysis").mkdir(exist_ok=True)
        digest = open_prepared(Path(words[words.index("--data") + 1]), ()).digest
        record = {"settings": SETTINGS, "asked": {"data": digest}, "summary": SUMMARY}
        record["checkpoint_sha256"] = file_sha256(Path(words[0]) / "checkpoint_best.pt")
        write_json(measurement(Path(words[0])), record)


def measurement(run: Path) -> Path:
    return run / "analysis" / "sensitivity_best.json"


@pytest.fixture
def commands(monkeypatch) -> Commands:
    monkeypatch.setattr(processes, "run_logged", made_up := Commands())
    return made_up


def make_data(folder: Path, corpus: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    names = [f"{split}.xx-en.{side}" for split in ("train", "valid", "test") for side in ("xx", "en")]
    for name in ["dict.xx.txt", "dict.en.txt", *(f"{name}.{end}" for name in names for end in ("bin", "idx"))]:
        (folder / "bin" / name).write_text("a 1\n")
    write_json(folder / "manifest.json", {"format": 1, "source_lang": "xx", "target_lang": "en", "corpus": corpus})
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    return make_data(tmp_path / "data", "one")


def distil(capsys, data: Path, results: Path, *words: object) -> tuple[int, str]:
    status = main.main(
        ["self-distill", str(data), "--rounds", "1", "--config", str(CONFIG), "--results", str(results)]
        + [str(word) for word in words]
    )
    return status, capsys.readouterr().err


def test_whoever_is_kept_out_is_told_of_the_step(commands, data, tmp_path, capsys, monkeypatch):
    told = []
    monkeypatch.setattr(Held, "tell", lambda self, who: told.append(who))
    assert distil(capsys, data, tmp_path / "results")[0] == 0
    me = f"intra-distillation self-distill (process {os.getpid()})"
    assert told[1:4] == [f"{me} and its {step} (4711)" for step in ("train", "evaluate", "sensitivity")]


def test_a_baseline_is_scored_and_measured_as_its_students_are(commands, data, tmp_path, capsys):
    """Its own score may be of another test set or search, and its own data may be gone."""
    assert distil(capsys, data, tmp_path / "old")[0] == 0
    baseline, other = tmp_path / "old" / "round0", make_data(tmp_path / "other", "two")
    record = read_json(baseline / "run.json")
    write_json(baseline / "run.json", {**record, "evaluation": {**record["evaluation"], "beam": 1}})
    commands.called.clear()
    assert distil(capsys, other, tmp_path / "new", "--baseline", baseline)[0] == 0
    on_best = ["--data", str(other), "--checkpoint", "best"]
    assert commands.called[:2] == [[name, str(baseline), *on_best] for name in ("evaluate", "sensitivity")]
    assert read_json(baseline / "run.json") == record


def test_a_moved_folder_with_an_unfinished_student(commands, data, tmp_path, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    assert distil(capsys, data, old)[0] == 0
    (old / "round1" / "finished.json").unlink()
    old.rename(new)
    note = (new / "round1" / "teacher.json").read_bytes()
    commands.called.clear()
    status, said = distil(capsys, data, new)
    student, teacher = new / "round1", Path("round0") / "checkpoint_best.pt"
    assert status == 2 and not commands.called
    assert said.endswith(
        f"error: round 1: the unfinished student in '{student}' was begun with its teacher at '{old / teacher}', which "
        f"is at '{new / teacher}' now: move it back to where it was and repeat that command, or delete '{student}' to "
        "train this student anew\n"
    )
    assert (student / "teacher.json").read_bytes() == note
    new.rename(old)
    assert distil(capsys, data, old)[0] == 0  # goes on


def test_a_finished_student_keeps_its_note_wherever_it_is(commands, data, tmp_path, capsys):
    assert distil(capsys, data, tmp_path / "old")[0] == 0
    new = (tmp_path / "old").rename(tmp_path / "new")
    note = (new / "round1" / "teacher.json").read_bytes()
    commands.called.clear()
    assert distil(capsys, data, new)[0] == 0
    assert "train" not in [name for name, *_ in commands.called]
    commands.fails["train"] = "error: holds a run with other settings"
    assert distil(capsys, data, new, "--student", "id_x")[0] == 2
    assert (new / "round1" / "teacher.json").read_bytes() == note


def test_the_table_says_how_sensitivity_was_measured(commands, data, tmp_path, capsys):
    assert distil(capsys, data, tmp_path)[0] == 0
    text = (tmp_path / "table1.md").read_text()
    assert (
        "\nSensitivity: of the cross-entropy loss on 100 batches of train (4,321 target tokens), seed 1, dropout on, "
        "average: absolute, not normalised.\n"
    ) in text
    assert text.count("0.25 |") == 2


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"settings": {**SETTINGS, "batches": 20, "split": "valid"}},
         "split (train in round 0, valid in round 1); batches (100 in round 0, 20 in round 1)"),
        ({"asked": {"data": "f" * 64}}, "data ({} in round 0, ffffffffffff in round 1)"),
    ],
)  # fmt: skip
def test_sensitivities_of_different_settings_are_left_out(commands, data, tmp_path, capsys, changes, differs):
    assert distil(capsys, data, tmp_path)[0] == 0
    path = measurement(tmp_path / "round1")
    write_json(path, {**read_json(path), **changes})
    assert distil(capsys, data, tmp_path, "--skip-sensitivity")[0] == 0
    text = (tmp_path / "table1.md").read_text()
    differs = differs.format(open_prepared(data, ()).digest[:12])
    note = f"\nSensitivity: left out, as the rounds were measured with different settings: {differs}.\n"
    assert note in text and "0.25" not in text and "std of sensitivity" in text
    rows = [line.split("|") for line in text.splitlines() if line.startswith(("| 0 ", "| 1 "))]
    assert [[cell.strip() for cell in row[-5:-1]] for row in rows] == [["-"] * 4] * 2
    assert "0.25" not in (tmp_path / "table1.tsv").read_text()


def test_a_measurement_that_is_refused_stops_the_rounds(commands, data, tmp_path, capsys):
    commands.fails["sensitivity"] = "error: 'sensitivity_best.json' was measured with other settings: --force"
    status, said = distil(capsys, data, tmp_path)
    assert status == 2 and [name for name, *_ in commands.called] == ["train", "evaluate", "sensitivity"]
    *_, reason, last = said.splitlines()
    assert reason.endswith(commands.fails["sensitivity"])
    assert "error: failed in round 0, see above: with that mended, the same command goes on; logs: " in last


def test_numbers_of_a_table():
    assert [number(0.5, "+.2f"), number(None, "+.2f"), number(None, ".1f", "")] == ["+0.50", "-", ""]
