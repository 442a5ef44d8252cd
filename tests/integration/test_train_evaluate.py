"""scripts/train.sh and scripts/evaluate.sh on a tiny prepared folder, through the real commands."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from fairseq_commands import TINY_RECIPE, command

from intra_distillation_fairseq import checkpoints, stopping
from intra_distillation_fairseq.cli import main, train
from intra_distillation_fairseq.experiments import logs, translation

SCRIPTS = Path(main.__file__).resolve().parents[2] / "scripts"
UPDATES = 240
CONFIG = (
    TINY_RECIPE
    + f"""
  label-smoothing: 0.1
  optimizer: adam
  lr: 0.01
  max-tokens: 200
  max-update: {UPDATES}
  save-interval-updates: 40
  keep-interval-updates: 1
  keep-last-epochs: 2
  num-workers: 0
  log-interval: 5
methods:
  transformer: {{criterion: label_smoothed_cross_entropy}}
  id_x: {{criterion: intra_distillation, id-num-passes: 2, id-alpha: 5, id-p: 5, id-q: 10}}
evaluate: {{beam: 2, lenpen: 1.0, max-len-a: 1.5, max-len-b: 5, lowercase: true}}
"""
)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A data folder as the prepare scripts make it: 200/9/11 sentences of syllables, the target in reverse order."""
    folder = tmp_path_factory.mktemp("prepared") / "daten für de-en"
    for name in ("raw", "pieces"):
        (folder / name).mkdir(parents=True)
    rng = random.Random(1)
    for split, size in {"train": 200, "valid": 9, "test": 11}.items():
        sentences = [
            [[rng.choice("bkm") + rng.choice("aeiou") for _ in range(2)] for _ in range(rng.randint(2, 6))]
            for _ in range(size)
        ]
        for lang, order in (("xx", 1), ("en", -1)):
            texts = [[word[::order] for word in sentence[::order]] for sentence in sentences]
            _write(folder / "raw" / f"{split}.{lang}", [" ".join(map("".join, t)).capitalize() for t in texts])
            words = [" ".join("▁" + " ".join(word) for word in text) for text in texts]
            _write(folder / "pieces" / f"{split}.{lang}", words)
    done = command(
        "preprocess", "--source-lang", "xx", "--target-lang", "en", "--joined-dictionary", "--destdir", folder / "bin",
        *(word for split in ("train", "valid", "test") for word in (f"--{split}pref", folder / "pieces" / split)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "source_lang": "xx", "target_lang": "en"}))
    return folder


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "winzig é.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def arguments(prepared: Path, config: Path, folder: Path, *flags: str, method: str = "id_x") -> list[str]:
    return [str(prepared), "--method", method, "--config", str(config), "--save-dir", str(folder), *flags]


def script(name: str, *words: object) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(SCRIPTS / name), *map(str, words)], capture_output=True, text=True, check=False)


def here(capsys, *words: object) -> tuple[int, str]:
    """The command in this process, for what ends before torch is needed: exit status and standard error."""
    capsys.readouterr()
    status = main.main([str(word) for word in words])
    return status, capsys.readouterr().err


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def trained(prepared, config, tmp_path_factory) -> Path:
    """A finished run of id_x; tests that write into it copy it first."""
    folder = tmp_path_factory.mktemp("runs") / "lauf 1 é"
    done = script("train.sh", *arguments(prepared, config, folder))
    assert done.returncode == 0, done.stderr
    assert f"trained {UPDATES} updates" in done.stderr
    return folder


@pytest.fixture
def run_copy(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture(scope="session")
def evaluated(trained) -> tuple[Path, str]:
    done = script("evaluate.sh", trained)
    assert done.returncode == 0, done.stderr
    return trained / "eval" / "best", done.stdout


# -- training


def test_what_stands_in_a_run_folder(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"checkpoint_best.pt", "checkpoint_last.pt", "command.sh", "environment.json", "run.json"} <= names
    assert {"train.log", "curves.csv", "finished.json"} <= names
    finished = json.loads((trained / "finished.json").read_text())
    assert finished["updates"] == UPDATES
    assert (finished["skipped_updates"], finished["spikes"], finished["sentences_left_out"]) == (0, 0, {})
    record = json.loads((trained / "run.json").read_text())
    assert (record["settings"]["method"], record["settings"]["seed"], record["pair"]) == ("id_x", 1, "xx-en")
    launches = json.loads((trained / "environment.json").read_text())["launches"]
    assert len(launches) == 1 and launches[0]["torch"] == torch.__version__
    command_text = (trained / "command.sh").read_text(encoding="utf-8")
    assert "--task translation_intra_distillation" in command_text and "--seed 1" in command_text
    assert len(list(trained.glob("checkpoint[0-9]*.pt"))) == 2  # keep-last-epochs


def test_curves_show_learning_and_the_schedule(trained):
    rows = logs.read_curves(trained / "train.log")
    assert rows[-1]["update"] == UPDATES
    assert rows[-1]["valid_loss"] < rows[0]["valid_loss"]
    assert rows[-1]["id_alpha"] == 5
    assert 0 < rows[0]["id_alpha"] < 5
    assert all(row["id_loss"] > 0 for row in rows)
    assert len((trained / "curves.csv").read_text().split("\n")) == len(rows) + 2


def test_what_was_left_out_and_skipped_is_said_and_counted(prepared, config, tmp_path):
    flags = ["--max-update", 3, "--memory-efficient-fp16", "--fp16-init-scale", 2**20]
    flags += ["--max-target-positions", 10, "--skip-invalid-size-inputs-valid-test"]
    done = script("train.sh", *arguments(prepared, config, tmp_path / "run", "--", *map(str, flags)))
    assert done.returncode == 0, done.stderr
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert finished["updates"] == 3
    assert finished["skipped_updates"] > 2
    assert f"over all launches, {finished['skipped_updates']} skipped (the log names their sentences): " in done.stderr
    assert set(finished["sentences_left_out"]) == {"train", "valid"}
    for name, number in finished["sentences_left_out"].items():
        assert number > 0
        assert f"note: {number} sentences of the set '{name}' are too long and left out" in done.stderr


def test_a_finished_run_is_left_as_it_is(prepared, config, run_copy):
    before = digests(run_copy)
    done = script("train.sh", *arguments(prepared, config, run_copy))
    assert done.returncode == 0
    assert "already finished, nothing to do" in done.stderr
    assert digests(run_copy) == before


def test_finished_is_seen_even_if_nobody_could_note_it(prepared, config, run_copy, capsys):
    (run_copy / "finished.json").unlink()
    curves = (run_copy / "curves.csv").read_text()
    (run_copy / "curves.csv").write_text(curves[: curves.rindex("\n", 0, -1) + 1])  # nor write its last row
    checkpoint = (run_copy / "checkpoint_last.pt").read_bytes()
    status, said = here(capsys, "train", *arguments(prepared, config, run_copy))
    assert (status, "already finished" in said) == (0, True), said
    assert (run_copy / "checkpoint_last.pt").read_bytes() == checkpoint
    assert json.loads((run_copy / "finished.json").read_text())["updates"] == UPDATES
    assert (run_copy / "curves.csv").read_text() == curves


def test_a_finished_run_without_its_checkpoints_says_how_to_train_again(
    prepared, config, run_copy, capsys, monkeypatch
):
    for path in run_copy.glob("checkpoint*.pt"):
        path.unlink()
    before = digests(run_copy)
    status, said = here(capsys, "train", *arguments(prepared, config, run_copy))
    assert (status, digests(run_copy)) == (2, before)
    assert f"has finished, but its checkpoint_last.pt is gone: delete '{run_copy}/finished.json' to train it" in said
    assert said.count("\n") == 1

    (run_copy / "finished.json").unlink()  # as it was told
    launched = []
    monkeypatch.setattr(train, "_launch", lambda *args: launched.append(args) or 0)
    assert here(capsys, "train", *arguments(prepared, config, run_copy))[0] == 0
    assert len(launched) == 1


def test_a_finished_run_that_was_to_save_nothing_is_left_as_it_is(prepared, config, run_copy, capsys):
    record = json.loads((run_copy / "run.json").read_text())
    record["settings"]["flags"] = ["--no-save"]
    (run_copy / "run.json").write_text(json.dumps(record))
    for path in run_copy.glob("checkpoint*.pt"):
        path.unlink()
    status, said = here(capsys, "train", *arguments(prepared, config, run_copy, "--", "--no-save"))
    assert (status, "already finished" in said) == (0, True), said


def test_a_foreign_folder_is_not_written_into(prepared, config, tmp_path, capsys):
    (tmp_path / "train.log").write_text("of another program\n")
    status, said = here(capsys, "train", *arguments(prepared, config, tmp_path))
    assert status == 2
    assert f"'{tmp_path}' holds 'train.log' but no run.json, so it was not made by train.sh" in said
    assert (tmp_path / "train.log").read_text() == "of another program\n"
    assert not (tmp_path / "command.sh").exists()


@pytest.mark.parametrize("in_recipe", [False, True])
def test_a_precision_flag_and_several_gpus(prepared, config, tmp_path, capsys, monkeypatch, in_recipe):
    other, folder = tmp_path / "other.yaml", tmp_path / "run"
    text = config.read_text(encoding="utf-8")
    other.write_text(text.replace("train:\n", "train:\n  amp: true\n") if in_recipe else text, encoding="utf-8")
    flags = [] if in_recipe else ["--", "--amp"]
    found = {"devices": ["a GPU", "a GPU"], "cuda": "13", "threads": 1}
    monkeypatch.setattr(train.devices, "probe", lambda: found)
    monkeypatch.setattr(train, "_launch", lambda *args: 0)
    status, said = here(capsys, "train", *arguments(prepared, other, folder, *flags))
    assert (status, said) == (
        0,
        "note: each of the 2 GPUs takes max-tokens 200, so a batch is 2 times the recipe's: "
        "-- --max-tokens 100 keeps the recipe's batch\n",
    )
    settings = json.loads((folder / "run.json").read_text())["settings"]
    assert (settings["precision"], settings["flags"]) == ("fp32", flags[1:])
    command_text = (folder / "command.sh").read_text(encoding="utf-8")
    assert "--amp" in command_text and "--fp16" not in command_text


@pytest.mark.parametrize(
    ("launcher", "gpus", "said"),
    [
        (
            {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
            8,
            "note: 8 GPUs are here, 1 of them train: start a process for each GPU\n",
        ),
        ({"SLURM_STEP_TASKS_PER_NODE": "2"}, 2, ""),
    ],
)
def test_gpus_that_are_left_idle_are_told_of(prepared, config, tmp_path, capsys, monkeypatch, launcher, gpus, said):
    launcher |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train.devices, "probe", lambda: {"devices": ["a GPU"] * gpus, "cuda": "13", "threads": 1})
    monkeypatch.setattr(train, "_launch", lambda *args: 0)
    status, told = here(capsys, "train", *arguments(prepared, config, tmp_path / "run", "--", "--max-tokens", "9"))
    assert (status, told) == (0, said)


def test_a_changed_evaluate_section_is_taken_over_without_training(prepared, config, run_copy, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text(encoding="utf-8").replace("beam: 2", "beam: 3"), encoding="utf-8")
    assert here(capsys, "train", *arguments(prepared, other, run_copy))[0] == 0
    assert json.loads((run_copy / "run.json").read_text())["evaluation"]["beam"] == 3


def test_other_settings_are_refused_and_nothing_is_touched(prepared, config, run_copy, capsys):
    before = digests(run_copy)
    words = arguments(prepared, config, run_copy, "--seed", "2", "--", "--max-update", "250", method="transformer")
    status, said = here(capsys, "train", *words)
    assert status == 2
    for part in (
        "--method is 'transformer' (there 'id_x')",
        "--seed is '2' (there '1')",
        "flags after -- is '--max-update 250' (there '')",
        "id-alpha not set (there '5')",
    ):
        assert part in said
    assert digests(run_copy) == before


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
            pytest.fail("the training ended before it could be stopped")


def saved(folder: Path) -> int:
    return logs.read_log(folder / "train.log").saved


def test_stopped_twice_and_resumed_equals_never_stopped(prepared, config, trained, tmp_path):
    folder = tmp_path / "unterbrochen é"
    words = ["bash", str(SCRIPTS / "train.sh"), *arguments(prepared, config, folder)]

    # A polite stop: told to train.sh, passed on to fairseq.
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: saved(folder) >= 40, process)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == stopping.STATUS, said
    assert re.search(r"stopped by a signal at update \d+, saved: the same command goes on; log: ", said), said
    assert not (folder / "finished.json").exists()
    stopped_at = saved(folder)

    # train.sh killed outright: its fairseq-train lives on and still holds the folder.
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    wait_for(lambda: saved(folder) > stopped_at, process)
    process.kill()
    process.wait()
    holder = (folder / ".train.lock").read_text(encoding="utf-8")
    child = int(holder.rpartition("fairseq-train (")[2].partition(")")[0])
    os.kill(child, signal.SIGSTOP)
    refused = subprocess.run(words, capture_output=True, text=True, check=False)
    os.kill(child, signal.SIGKILL)
    assert refused.returncode == 2
    assert "is in use by intra-distillation train (process " in refused.stderr
    assert f"fairseq-train ({child})" in refused.stderr

    wait_for_end_of(child)
    (folder / "checkpoint_last.pt.tmp").write_bytes(b"half a checkpoint")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (folder / "checkpoint_last.pt.tmp").exists()
    assert len(json.loads((folder / "environment.json").read_text())["launches"]) == 3
    for name in ("checkpoint_last.pt", "checkpoint_best.pt"):
        one, other = (checkpoints.load(run / name)["model"] for run in (folder, trained))
        assert all(torch.equal(one[key], other[key]) for key in other), name
    ours, theirs = (logs.read_curves(run / "train.log") for run in (folder, trained))
    assert [(row["update"], row["valid_loss"]) for row in ours] == [
        (row["update"], row["valid_loss"]) for row in theirs
    ]


def wait_for_end_of(pid: int) -> None:
    """Of a process that is not our child."""
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < end


def test_a_failure_shows_the_log_and_may_be_corrected(prepared, config, tmp_path):
    folder = tmp_path / "run"
    failed = script("train.sh", *arguments(prepared, config, folder, "--", "--no-such-flag"))
    assert failed.returncode == 2
    assert "unrecognized arguments: --no-such-flag" in failed.stderr
    assert (
        f"error: fairseq-train ended with exit status 2; its log, of which this is the end: {folder}" in failed.stderr
    )
    assert not (folder / "finished.json").exists()
    words = arguments(prepared, config, folder, "--verbose", "--", "--max-update", "3", method="transformer")
    corrected = script("train.sh", *words)
    assert corrected.returncode == 0, corrected.stderr
    assert "| train_inner |" not in corrected.stderr and "begin training epoch 1" in corrected.stderr
    assert "--no-such-flag" not in (folder / "train.log").read_text(encoding="utf-8")
    assert json.loads((folder / "finished.json").read_text())["updates"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--method": "rdrop"}, "method 'rdrop' is not in"),
        ({"--config": "configs/none"}, "config 'configs/none' does not exist"),
        ({"--precision": "fp16"}, "--precision 'fp16' needs a GPU"),
        ({"DATA": "/nowhere"}, "data folder '/nowhere' does not exist: make it with scripts/prepare_iwslt14.sh"),
        ({"after": ["--save-dir", "x"]}, "'--save-dir' cannot be given after --: it comes from --save-dir of train.sh"),
        ({"after": ["--max-update", "0"]}, "the training would never end"),
        ({"after": ["--distributed-world-size", "2"]}, "fairseq would start no process and train nothing"),
    ],
)
def test_mistakes_before_training(prepared, config, tmp_path, capsys, monkeypatch, change, message):
    if torch.cuda.is_available() and ("--precision" in change or "--distributed-world-size" in str(change)):
        pytest.skip("about machines without a GPU")
    folder = tmp_path / "run"
    after = change.pop("after", [])
    words = arguments(Path(change.pop("DATA", prepared)), config, folder)
    for name, value in change.items():
        words += [name, value]
    status, said = here(capsys, "train", *words, "--", *after)
    assert status == 2
    assert message in said and said.count("\n") == 1
    assert not (folder / "run.json").exists()


def test_flags_after_the_dashes_are_for_train_only(trained, capsys):
    with pytest.raises(SystemExit):
        main.main(["evaluate", str(trained), "--", "--beam", "3"])
    assert "evaluate takes nothing after --: '--beam 3'" in capsys.readouterr().err


def test_another_rank_does_not_wait_for_a_finished_run(prepared, config, trained, capsys):
    words = ["--", "--distributed-world-size", "2", "--distributed-rank", "1", "--distributed-no-spawn"]
    status, said = here(capsys, "train", *arguments(prepared, config, trained), *words)
    assert (status, "already finished" in said) == (0, True), said


# -- evaluation


def test_a_score_and_its_files(evaluated, prepared):
    folder, said = evaluated
    score = json.loads((folder / "score.json").read_text())
    assert score["sentences"] == 11
    assert score["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert score["checkpoint"] == "best" and 0 < score["update"] <= UPDATES
    rows = logs.read_curves(folder.parents[1] / "train.log")
    assert score["valid_loss"] == min(row["valid_loss"] for row in rows)
    assert f"BLEU {score['bleu']:.2f}, chrF {score['chrf']:.2f}, 11 sentences" in said and said.count("\n") == 1
    hypotheses = (folder / "hypotheses.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(hypotheses) == 11 and not any("▁" in line or "@@" in line for line in hypotheses)
    references = (folder / "references.txt").read_text(encoding="utf-8")
    assert references == (prepared / "raw" / "test.en").read_text(encoding="utf-8").lower()
    # Sentences stand in the order of the references: the model has learnt at least how long they are.
    assert all(line for line in hypotheses)


def test_a_finished_evaluation_is_not_repeated(evaluated, trained, capsys):
    before = digests(evaluated[0])
    status, said = here(capsys, "evaluate", trained)
    assert (status, said) == (0, "already evaluated, nothing to do (--force does it again)\n")
    assert digests(evaluated[0]) == before


def test_the_score_is_named_by_the_path_the_user_gave(evaluated, trained, capsys, monkeypatch):
    monkeypatch.chdir(trained.parent)
    assert main.main(["evaluate", trained.name]) == 0
    assert capsys.readouterr().out.endswith(f" s -> {trained.name}/eval/best/score.json\n")


def test_average_of_the_newest_epochs(run_copy):
    shutil.rmtree(run_copy / "eval", ignore_errors=True)
    done = script("evaluate.sh", run_copy, "--checkpoint", "average2")
    assert done.returncode == 0, done.stderr
    score = json.loads((run_copy / "eval" / "average2" / "score.json").read_text())
    assert score["files"] == [path.name for path in sorted(run_copy.glob("checkpoint[0-9]*.pt"), reverse=True)[:2]]
    assert score["valid_loss"] is None and score["sentences"] == 11
    assert not list((run_copy / "eval" / "average2").glob(".*.pt"))


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("average9", "--checkpoint 'average9' needs 9 epoch checkpoints (checkpoint<epoch>.pt)"),
        ("average0", "--checkpoint is 'average0': allowed are best, last and averageN, as in average5"),
        ("newest", "--checkpoint is 'newest': allowed are best, last and averageN"),
    ],
)
def test_checkpoints_that_are_not_there(trained, capsys, checkpoint, message):
    status, said = here(capsys, "evaluate", trained, "--checkpoint", checkpoint)
    assert status == 2
    assert message in said and said.count("\n") == 1


def test_too_few_epochs_say_how_to_keep_more(trained, capsys):
    said = here(capsys, "evaluate", trained, "--checkpoint", "average9")[1]
    assert "has 2: train more epochs, and keep more of them with keep-last-epochs in the config" in said


def test_a_missing_checkpoint_names_those_there_are(run_copy, capsys):
    (run_copy / "checkpoint_best.pt").unlink()
    status, said = here(capsys, "evaluate", run_copy)
    assert status == 2
    assert "checkpoint_best.pt' does not exist (the folder has checkpoint" in said


def test_what_is_no_run_folder(tmp_path, capsys):
    status, said = here(capsys, "evaluate", tmp_path)
    assert status == 2
    assert "is not a run folder, it has no run.json: train it with scripts/train.sh first" in said


@pytest.fixture
def data_copy(prepared, tmp_path) -> Path:
    return shutil.copytree(prepared, tmp_path / "data")


def test_a_count_mismatch_is_refused_before_translating(run_copy, data_copy, capsys):
    references = data_copy / "raw" / "test.en"
    _write(references, references.read_text(encoding="utf-8").split("\n")[:-2])
    status, said = here(capsys, "evaluate", run_copy, "--data", data_copy)
    assert status == 2
    assert "would give 11 hypotheses for the 10 references of" in said and "prepare the data folder again" in said


def test_a_count_mismatch_is_refused_after_translating(run_copy, monkeypatch, capsys):
    def translate_ten(command, output, errors, *, follow, dies_with_us):
        assert dies_with_us  # else an orphan would go on writing into the files of the next translation
        output.write_text("".join(f"D-{number}\t-1\ta\n" for number in range(10)), encoding="utf-8")
        return 0

    monkeypatch.setattr(translation.processes, "run_logged", translate_ten)
    status, said = here(capsys, "evaluate", run_copy, "--force")
    assert status == 2
    assert "has 10 hypotheses and" in said and "has 11 references: nothing was scored" in said
    assert not (run_copy / "eval" / "best" / "score.json").exists()


def test_other_dictionaries_are_refused(run_copy, data_copy, capsys):
    with open(data_copy / "bin" / "dict.en.txt", "a", encoding="utf-8") as dictionary:
        dictionary.write("new 1\n")
    status, said = here(capsys, "evaluate", run_copy, "--data", data_copy)
    assert status == 2
    assert "are not those the model was trained with: evaluate on" in said


def test_a_damaged_checkpoint_is_named(run_copy):
    path = run_copy / "checkpoint_best.pt"
    path.write_bytes(path.read_bytes()[:2000])
    done = script("evaluate.sh", run_copy)
    assert done.returncode == 2
    assert f"error: checkpoint '{path}' is not a whole file" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (run_copy / "eval" / "best" / "score.json").exists()


def test_a_test_sentence_longer_than_the_model_takes_is_said_in_one_line(run_copy):
    path = run_copy / "checkpoint_best.pt"
    state = torch.load(path, weights_only=False)
    state["cfg"]["model"].max_source_positions = 6
    torch.save(state, path)
    done = script("evaluate.sh", run_copy)
    assert done.returncode == 1
    said = [line for line in done.stderr.split("\n") if line]
    assert len(said) == 2, done.stderr
    assert re.match(
        r"error: \d+ of 11 sentences of the set 'test' are longer than \(6, 1024\) tokens .*: sentences \d", said[0]
    )
    assert said[1].startswith("error: fairseq-generate ended with exit status 1; its log, ")
