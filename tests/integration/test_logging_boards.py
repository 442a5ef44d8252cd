"""--tensorboard-logdir and --wandb-project show our terms beside fairseq's own, also after a resume."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import pytest
from fairseq_commands import TINY_MODEL, TRAINING, USER_DIR, command

OURS = "--task translation_intra_distillation --label-smoothing 0.1".split()
TERMS = {"loss", "nll_loss", "ls_loss", "id_loss", "id_alpha"}
# A module named wandb that writes down what it is told.
STAND_IN = """
import json, os

run = None

def _note(what, values):
    with open(os.environ["WANDB_NOTES"], "a", encoding="utf-8") as file:
        file.write(json.dumps([what, values]) + "\\n")

def init(**settings):
    global run
    run = object()
    _note("init", settings)

def log(values, step):
    _note("log", {**values, "step": step})

class config:
    @staticmethod
    def update(settings):
        _note("config", sorted(settings))
"""


def curves(folder: Path) -> list[dict[str, list[tuple[int, float]]]]:
    """For each event file, the oldest first: name -> (step, value) in their order."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*"), key=lambda file: file.stat().st_mtime_ns):
        content, at, points = path.read_bytes(), 0, {}
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])  # each has a checksum before and behind it
            at += 12 + length + 4
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    points.setdefault(value.tag, []).append((event.step, value.simple_value))
        found.append(points)
    return found


def logged(text: str, kind: str) -> dict[str, list[tuple[int, float]]]:
    """The same of the JSON lines of fairseq's log."""
    points = {}
    for line in map(json.loads, re.findall(rf"\| {kind} \| (\{{.*\}})", text)):
        values = {name.removeprefix(f"{kind}_"): value for name, value in line.items()}
        for name, value in values.items():
            points.setdefault(name, []).append((int(values["num_updates"]), float(value)))
    return points


def assert_same_curves(board: dict, log: dict, names: set[str]) -> None:
    for name in names:
        assert [step for step, _ in board[name]] == [step for step, _ in log[name]], name
        # the log has 3 to 6 digits, an event file float32
        assert [value for _, value in board[name]] == pytest.approx([value for _, value in log[name]], rel=1e-3), name


@pytest.fixture(scope="module")
def watched(tiny_data, tmp_path_factory) -> tuple[Path, str, str]:
    """Folder of a student of a tiny teacher, with experts, on a board; the logs of its beginning and of its resume."""
    folder = tmp_path_factory.mktemp("watched")
    common = ["train", tiny_data, "--user-dir", USER_DIR, *TRAINING, *OURS, "--dropout", 0.1]
    sizes = TINY_MODEL[2:]
    taught = command(*common, "--arch", "transformer_small", *sizes, "--criterion", "label_smoothed_cross_entropy",
                     "--max-update", 1, "--save-dir", folder / "teacher")  # fmt: skip
    assert taught.returncode == 0, taught.stderr[-3000:]
    student = [*common, "--arch", "switch_transformer_small", *sizes, "--switch-experts", 2]
    student += ["--criterion", "self_distillation", "--teacher", folder / "teacher" / "checkpoint_last.pt"]
    student += ["--id-num-passes", 2, "--save-interval-updates", 2, "--validate-interval-updates", 2]
    student += ["--save-dir", folder / "run", "--tensorboard-logdir", folder / "board", "--max-update"]
    begun = command(*student, 4)
    assert begun.returncode == 0, begun.stderr[-3000:]
    # As after a kill at update 4: the last checkpoint is that of update 2.
    (folder / "run" / "checkpoint_1_2.pt").replace(folder / "run" / "checkpoint_last.pt")
    resumed = command(*student, 6)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    return folder / "board", begun.stdout, resumed.stdout


@pytest.mark.parametrize("kind", ["train_inner", "train", "valid"])
def test_tensorboard_shows_what_the_log_says(watched, kind):
    board, *texts = watched
    ours = {"loss", "nll_loss"} if kind == "valid" else {*TERMS, "kd_loss", "balance_loss", "dropped"}
    files = curves(board / kind)
    assert len(files) == len(texts) == 2
    for points, text in zip(files, texts):
        assert_same_curves(points, logged(text, kind), ours)
    assert files[0].keys() == files[1].keys()


def test_a_resume_goes_on_in_a_file_of_its_own_from_its_checkpoint(watched):
    first, second = curves(watched[0] / "train_inner")
    assert [step for step, _ in first["id_loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in second["id_loss"]] == [3, 4, 5, 6]
    assert first["id_alpha"][0][1] == 0 and second["id_alpha"][-1][1] == 5


def test_wandb_is_told_the_same_and_started_once(tiny_data, tmp_path):
    (tmp_path / "wandb.py").write_text(STAND_IN, encoding="utf-8")
    notes = tmp_path / "notes"
    done = command(
        "train", tiny_data, "--user-dir", USER_DIR, *TINY_MODEL, *TRAINING, *OURS, "--criterion", "intra_distillation",
        "--max-update", 4, "--validate-interval-updates", 2, "--save-dir", tmp_path / "trial", "--wandb-project", "id",
        fresh=True, env={**os.environ, "PYTHONPATH": str(tmp_path), "WANDB_NOTES": str(notes)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
    assert [values for what, values in told if what == "init"] == [{"project": "id", "reinit": False, "name": "trial"}]
    assert "criterion" in next(values for what, values in told if what == "config")
    for kind, names in (("train_inner", TERMS), ("train", TERMS), ("valid", {"loss", "nll_loss"})):
        points = {}
        for values in (values for what, values in told if what == "log"):
            for name, value in values.items():
                if name.startswith(f"{kind}/"):
                    points.setdefault(name.removeprefix(f"{kind}/"), []).append((values["step"], value))
        assert_same_curves(points, logged(done.stdout + done.stderr, kind), names)
