"""Run folders, launches and training logs, without training."""

import json
import os
import select
import shlex
import signal
import struct
import subprocess
import sys

import pytest

from intra_distillation_fairseq.cli import evaluate, main
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import launch, logs, processes
from intra_distillation_fairseq.experiments.generation import read_hypotheses
from intra_distillation_fairseq.experiments.prepared import PreparedData, count_binarised, open_prepared, raw_lines
from intra_distillation_fairseq.experiments.recipes import read_recipe
from intra_distillation_fairseq.experiments.runs import RunFolder, environment

SETTINGS = {
    "method": "id_x",
    "options": {"lr": 0.1, "arch": "a"},
    "data_digest": "d",
    "seed": 1,
    "precision": "fp32",
    "flags": ["--max-update", "9"],
}


# -- settings of a folder


def started(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.write_record({"settings": SETTINGS})
    (tmp_path / "checkpoint_last.pt").touch()
    return folder


def test_the_same_settings_are_admitted(tmp_path):
    started(tmp_path).admit(json.loads(json.dumps(SETTINGS)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method", "id_js", "--method is 'id_js' (there 'id_x')"),
        ("options", {"lr": 0.2, "arch": "a"}, "--config has lr '0.2' (there '0.1')"),
        ("options", {"lr": 0.1, "arch": "a", "new": 1}, "--config has new '1' (there not set)"),
        ("data_digest", "e", "DATA is 'e' (there 'd')"),
        ("seed", 2, "--seed is '2' (there '1')"),
        ("precision", "fp16", "--precision is 'fp16' (there 'fp32')"),
        ("flags", ["--max-update", "8"], "flags after -- is '--max-update 8' (there '--max-update 9')"),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path, key, value, message):
    with pytest.raises(UserError) as caught:
        started(tmp_path).admit({**SETTINGS, key: value})
    assert message in str(caught.value)
    assert "repeat its settings to go on, or choose another --save-dir" in str(caught.value)


def test_without_a_checkpoint_the_settings_may_be_corrected(tmp_path):
    folder = started(tmp_path)
    (tmp_path / "checkpoint_last.pt").unlink()
    folder.admit({**SETTINGS, "seed": 2})


@pytest.mark.parametrize(
    "name", ["checkpoint3.pt", "train.log", "command.sh", "environment.json", "curves.csv", "finished.json"]
)
def test_files_of_unknown_origin_are_left_alone(tmp_path, name):
    RunFolder(tmp_path).admit(SETTINGS)
    (tmp_path / "notes.txt").touch()
    RunFolder(tmp_path).admit(SETTINGS)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"holds '{name}' but no run.json, so it was not made by train.sh, which would"):
        RunFolder(tmp_path).admit(SETTINGS)


def test_a_damaged_record_and_a_file_as_folder_are_refused(tmp_path):
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="run.json' is damaged or of another version"):
        RunFolder(tmp_path).read()
    with pytest.raises(UserError, match="is a file: choose another folder"):
        RunFolder(tmp_path / "run.json").read()


def test_epoch_checkpoints_come_newest_first(tmp_path):
    for name in ("1", "2", "10", "_best", "_last", "_3_40", ".best_loss_1.0"):
        (tmp_path / f"checkpoint{name}.pt").touch()
    assert [path.name for path in RunFolder(tmp_path).epoch_checkpoints()] == [
        *("checkpoint10.pt", "checkpoint2.pt", "checkpoint1.pt")
    ]


def test_command_sh_is_the_command(tmp_path):
    folder = RunFolder(tmp_path)
    command = ["printf", "%s|", "--adam-betas", "(0.9, 0.98)", "--path", "a é'b", "--flag", "--x=$HOME"]
    folder.write_command(command, {"OMP_NUM_THREADS": "1"})
    lines = folder.command.read_text(encoding="utf-8")
    assert "export OMP_NUM_THREADS=1\n" in lines
    assert subprocess.run(["bash", str(folder.command)], capture_output=True, text=True, check=True).stdout == "".join(
        f"{word}|" for word in command[2:]
    )


def test_environment_keeps_every_launch_and_names_changes(tmp_path):
    folder = RunFolder(tmp_path)
    device = {"devices": [], "cuda": None, "threads": 1}
    assert folder.add_environment(device) == []
    assert folder.add_environment({**device, "threads": 2}) == ["threads was 1 and is now 2"]
    launches = json.loads(folder.environment.read_text(encoding="utf-8"))["launches"]
    assert [entry["threads"] for entry in launches] == [1, 2]
    assert launches[0]["torch"] == environment()["torch"] is not None
    assert folder.add_environment({**device, "threads": 2}, processes=3, update_freq="5") == []
    launches = json.loads(folder.environment.read_text(encoding="utf-8"))["launches"]
    assert [(one["processes"], one["update_freq"]) for one in launches] == [(1, "1"), (1, "1"), (3, "5")]


def test_checkpoints_that_a_finished_run_needs_no_more(tmp_path):
    for name in ("1", "_2_400", "_best", "_last", ".best_loss_1.0", "12.pt"):
        (tmp_path / f"checkpoint{name}.pt").touch()
    assert [path.name for path in RunFolder(tmp_path).numbered_checkpoints()] == [
        "checkpoint1.pt",
        "checkpoint_2_400.pt",
    ]


@pytest.mark.parametrize(
    ("noted", "age", "counts"),
    [
        ({"finished": "t"}, -9, True),
        ({"finished": None}, 9, False),  # scored beside the training
        ({"finished": "s"}, 9, False),  # of a training that was repeated since
        ({}, 9, True),
        ({}, -9, False),
    ],
)
def test_the_score_of_the_finished_model(tmp_path, noted, age, counts):
    folder = RunFolder(tmp_path)
    path = tmp_path / "eval" / "best" / "score.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"bleu": 1, **noted}), encoding="utf-8")
    assert folder.score("best") is None
    folder.finished.write_text('{"time": "t"}', encoding="utf-8")
    os.utime(folder.finished, (1000, 1000))
    os.utime(path, (1000 + age, 1000 + age))
    assert folder.score("best") == ({"bleu": 1, **noted} if counts else None)
    assert folder.score("last") is None


def test_a_score_notes_the_end_of_the_training(tmp_path, prepared, monkeypatch, capsys):
    """Evaluated beside the training, then again when it has ended: the same model, so nothing is translated again."""
    (prepared / "raw").mkdir()
    for ending, text in {"en": "a b c d\n" * 42}.items():
        (prepared / "raw" / f"test.{ending}").write_text(text, encoding="utf-8")
    run = RunFolder(tmp_path / "run")
    run.folder.mkdir()
    (run.folder / "checkpoint_best.pt").touch()
    digest = open_prepared(prepared, ("test",)).dictionary_digest
    evaluation = {"beam": 5, "lenpen": 1.0, "max_len_a": 0.0, "max_len_b": 200, "batch_size": 100}
    evaluation |= {"lowercase": False, "tokenize": "13a"}
    run.write_record({"data": str(prepared), "dictionary_digest": digest, "evaluation": evaluation})
    translated = []

    def translate(data, checkpoint, evaluation, out, cpu):
        translated.append(1)
        for name in ("hypotheses.txt", "references.txt"):
            (out / name).write_text("a b c d\n" * 42, encoding="utf-8")
        return {"bleu": 100.0, "chrf": 100.0, "sentences": 42}

    monkeypatch.setattr(evaluate, "translate_and_score", translate)
    monkeypatch.setattr(evaluate, "_facts", lambda path, averaged: {"update": 1, "valid_loss": 1.0})

    def noted() -> str | None:
        assert main.main(["evaluate", str(run.folder)]) == 0
        return json.loads((run.folder / "eval" / "best" / "score.json").read_text(encoding="utf-8"))["finished"]

    assert noted() is None and run.score("best") is None
    run.finished.write_text('{"time": "2026-01-01T00:00:00+00:00"}', encoding="utf-8")
    assert noted() == "2026-01-01T00:00:00+00:00" and run.score("best")["bleu"] == pytest.approx(100)
    assert translated == [1] and "already evaluated, nothing to do" in capsys.readouterr().err


# -- the command and launches that do not train

DATA = PreparedData(folder=None, source_lang="de", target_lang="en", digest="", dictionary_digest="")


def test_the_last_value_counts():
    words = shlex.split("--max-update 5 --lr 1 --max-update=7 --max-update-x 9")
    assert launch.last_value(words, "max-update") == "7"
    assert launch.max_update(words) == 7
    assert launch.last_value(words, "seed") is None


def test_a_training_without_an_end_is_refused():
    assert launch.max_update(["--max-epoch", "3"]) == 0
    with pytest.raises(UserError, match="neither max-update nor max-epoch is given: the training would never end"):
        launch.max_update(["--lr", "1"])
    with pytest.raises(UserError, match="--max-update is 'ten': it must be a whole number of updates"):
        launch.max_update(["--max-update", "ten"])


@pytest.mark.parametrize(
    "flag", ["--save-dir", "--save-d", "--seed=3", "--fp16", "--user-dir", "--log-format", "--task"]
)
def test_flags_of_train_sh_are_refused_after_the_dashes(flag):
    with pytest.raises(UserError, match=f"'{flag}' cannot be given after --: it comes from "):
        launch.check_flags(["--lr", "1", flag, "x"])


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("--restore-file", "continue-once"),
        ("--restore-file=x", "continue-once"),
        ("--reset-opt", "finetune-from-model"),
    ],
)
def test_flags_that_would_undo_a_run_when_it_goes_on_are_refused(flag, instead, tmp_path):
    why = "fairseq obeys it at every start, so that the run would lose what it has trained when it goes on after a stop"
    with pytest.raises(UserError) as caught:
        launch.check_flags(["--lr", "1", flag, "x"])
    assert str(caught.value) == (
        f"'{flag}' cannot be given after --: {why}: give {instead} FILE, which counts at the first start only"
    )
    (tmp_path / "a.yaml").write_text("train: {restore-file: x}\nmethods: {a: {criterion: a}}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"a.yaml: 'restore-file' in 'train' cannot be set: {why}"):
        read_recipe(tmp_path / "a.yaml")


def test_other_flags_are_not_refused():
    launch.check_flags(["--save-interval", "2", "--fp16-init-scale", "4", "--max-update", "3", "--lr", "-1"])


def test_precision():
    assert launch.choose_precision("auto", [], []) == "fp32"
    assert launch.choose_precision("auto", ["a GPU"], []) == "fp16"
    assert launch.choose_precision("auto", ["a GPU"], ["--cpu"]) == "fp32"
    assert launch.choose_precision("bf16", [], []) == "bf16"
    with pytest.raises(UserError, match="--precision 'fp16' needs a GPU, and there is none: use auto, fp32 or bf16"):
        launch.choose_precision("fp16", [], [])


@pytest.mark.parametrize("flag", ["--amp", "--memory-efficient-fp16", "--memory-efficient-bf16"])
def test_fairseqs_own_precision_flags_decide_alone(flag):
    for given in (flag, flag[: max(len(flag) - 3, 5)]):  # argparse takes a shortened one
        words = ["--lr", "1", given]
        assert launch.choose_precision("auto", ["a GPU"], words) == "fp32"
        assert launch.choose_precision("fp32", ["a GPU"], words) == "fp32"
        for asked in ("fp16", "bf16"):
            message = f"--precision '{asked}' and '{flag}' contradict each other: leave one of them out"
            with pytest.raises(UserError, match=message):
                launch.choose_precision(asked, ["a GPU"], words)
    assert launch.choose_precision("auto", ["a GPU"], ["--amp-init-scale", "4"]) == "fp16"


def test_tpus_are_refused():
    with pytest.raises(UserError, match="'--tpu' cannot be given to train.sh, which trains on GPUs and CPUs only"):
        launch.choose_precision("auto", [], ["--tpu"])


@pytest.mark.parametrize(
    ("words", "gpus", "expected"),
    [
        ("", 0, 1),
        ("", 4, 4),
        ("--cpu", 4, 1),
        ("--distributed-world-size 8", 2, 8),
        ("--distributed-world-size=1", 4, 1),
    ],
)
def test_processes_that_train_together(words, gpus, expected):
    assert launch.number_of_processes([], words.split(), ["a GPU"] * gpus) == expected
    assert launch.number_of_processes(words.split(), [], ["a GPU"] * gpus) == expected


def test_several_gpus_are_told_how_to_keep_the_batch():
    options = ["--lr", "1", "--max-tokens", "4096"]
    expected = (
        [],
        "each of the 4 GPUs takes max-tokens 4096, so a batch is 4 times the recipe's: "
        "-- --max-tokens 1024 keeps the recipe's batch",
    )
    assert launch.batch(options, [], ["a GPU"] * 4) == expected
    assert launch.batch([*options, "--update-freq", "1"], ["--lr", "2"], ["a GPU"] * 4) == expected


@pytest.mark.parametrize(
    ("flags", "gpus", "derived", "line"),
    [
        ("", 2, "8", "2 GPUs: update-freq 8, so a batch has 2 x 8 x 4096 = 65,536 tokens, as the recipe's"),
        ("", 16, "1", "16 GPUs: update-freq 1, so a batch has 16 x 1 x 4096 = 65,536 tokens, as the recipe's"),
        # 3 x 5 is nearer to 16 than 3 x 6, 6 x 3 nearer than 6 x 2.
        ("", 3, "5", "3 x 5 x 4096 = 61,440 tokens, the nearest to the recipe's 16 x 4096 = 65,536"),
        ("", 6, "3", "6 x 3 x 4096 = 73,728 tokens, the nearest to the recipe's 16 x 4096 = 65,536"),
        ("", 40, "1", "40 x 1 x 4096 = 163,840 tokens, the nearest to the recipe's 16 x 4096 = 65,536"),
        ("--distributed-world-size 4", 8, "4", "4 GPUs: update-freq 4, so a batch has 4 x 4 x 4096 = 65,536 tokens"),
        ("--distributed-world-size=2 --distributed-no-spawn", 0, "8", "2 processes: update-freq 8, so"),
    ],
)
def test_a_collected_batch_is_shared_by_the_processes(flags, gpus, derived, line):
    options = "--max-tokens 4096 --update-freq 16".split()
    found = launch.batch(options, flags.split(), ["a GPU"] * gpus)
    assert found.flags == ["--update-freq", derived]
    assert line in found.line


@pytest.mark.parametrize(
    ("options", "flags", "gpus"),
    [
        ("--max-tokens 4096", "", 1),
        ("--max-tokens 4096", "", 0),
        ("--max-tokens 4096", "--max-tokens 1024", 4),
        ("--max-tokens 4096", "--update-freq=2", 4),
        ("--max-tokens 4096", "--distributed-world-size 1", 4),
        ("--max-tokens 4096 --distributed-world-size 1", "", 4),
        ("--max-tokens 4096", "--cpu", 4),
        ("--batch-size 8", "", 4),
        ("--max-tokens 4096 --update-freq 16", "", 1),
        ("--max-tokens 4096 --update-freq 16", "--update-freq 16", 4),
        ("--max-tokens 4096 --update-freq 16", "--max-tokens=1024", 4),
        ("--max-tokens 4096 --update-freq 16", "--cpu", 4),
    ],
)
def test_no_note_about_the_batch(options, flags, gpus):
    assert launch.batch(options.split(), flags.split(), ["a GPU"] * gpus) is None


def test_rendezvous_flags_are_no_settings():
    flags = shlex.split(
        "--lr 1 --distributed-rank 1 --distributed-init-method=tcp://a:1 --id-nan-policy stop "
        "--distributed-world-size 2 --distributed-no-spawn --tensorboard-logdir=a --x"
    )
    assert launch.lasting_flags(flags) == ["--lr", "1", "--x"]


# -- the training log


def line(time: str, tag: str, text) -> str:
    return f"2026-01-01 {time} | INFO | {tag} | {text if isinstance(text, str) else json.dumps(text)}"


def inner(time, update, loss, **more):
    return line(time, "train_inner", {"epoch": 1, "loss": str(loss), "num_updates": str(update), **more})


def valid(time, update, loss):
    return line(
        time,
        "valid",
        {
            "epoch": 1,
            "valid_loss": str(loss),
            "valid_nll_loss": "2",
            "valid_ppl": "4",
            "valid_num_updates": str(update),
        },
    )


FIRST = [
    line("00:00:00", logs.LAUNCH_TAG, "launch: x"),
    line("00:00:01", "fairseq.trainer", "No existing checkpoint found run/checkpoint_last.pt"),
    inner("00:00:02", 10, 8.0, id_alpha="0.5", ls_loss="7", id_loss="0.4", nll_loss="6"),
    inner("00:00:03", 20, 6.0, id_alpha="1", ls_loss="5", id_loss="0.2", nll_loss="4"),
    valid("00:00:04", 20, 5.5),
    line(
        "00:00:05",
        "fairseq.checkpoint_utils",
        "Saved checkpoint c.pt (epoch 1 @ 20 updates, score 5.5) (took 1 s)",
    ),
    inner("00:00:06", 30, 5.0),
    valid("00:00:07", 30, 5.1),
]
SECOND = [
    line("00:01:00", logs.LAUNCH_TAG, "launch: x"),
    line("00:01:01", "fairseq.trainer", "Loaded checkpoint run/checkpoint_last.pt (epoch 1 @ 20 updates)"),
    inner("00:01:02", 30, 4.0),
    "a warning without any shape",
    valid("00:01:03", 30, 4.1),
    line("00:01:04", "train", {"train_loss": "9", "epoch": 1, "train_num_updates": "35"}),
    line("00:01:05", "fairseq_cli.train", "done training in 3.0 seconds"),
]


def fed(lines) -> logs.TrainingLog:
    log = logs.TrainingLog()
    for text in lines:
        log.feed(text)
    return log


def test_rows_of_a_run():
    row = fed(FIRST).rows()[0]
    assert row == {
        "update": 20,
        "epoch": 1,
        "train_loss": 7.0,
        "ls_loss": 6.0,
        "nll_loss": 5.0,
        "id_loss": 0.3,
        "id_alpha": 1.0,
        "valid_loss": 5.5,
        "valid_nll_loss": 2.0,
        "valid_ppl": 4.0,
        "seconds": 4.0,
    }


def test_a_resume_replaces_what_it_repeats():
    rows = fed([*FIRST, *SECOND]).rows()
    assert [(row["update"], row["train_loss"], row["valid_loss"]) for row in rows] == [(20, 7.0, 5.5), (30, 4.0, 4.1)]
    assert rows[1]["seconds"] == 7 + 3  # the first launch, lost work included, and the second up to the validation


def test_what_went_wrong_is_counted_once_and_forgotten_with_the_updates():
    tag = "2026-01-01 00:00:03 | WARNING | intra_distillation_fairseq.tasks.bad_numbers | "
    wrong = [f"{tag}update 4 skipped: why; rank 1: sentences 1 (loss nan); rank 3: sentences 2 (loss nan)"]
    wrong += [f"{tag}update {at}: a spike: why; rank {rank}: sentences 1 (loss 9)" for at in (7, 30) for rank in (0, 1)]
    wrong += [f"{tag}update 30 skipped: why; rank 0: sentences 1 (loss nan)"]
    wrong += [f"{tag}2 of 25 sentences of the set 'valid' are left out, since they are longer"] * 2
    log = fed([*FIRST, *wrong])
    assert (log.skipped, log.spikes, log.left_out) == ([4, 30], [7, 30], {"valid": 2})
    for line in SECOND:  # goes on from update 20
        log.feed(line)
    assert (log.skipped, log.spikes) == ([4], [7])


def test_a_fresh_start_forgets_everything():
    again = [
        FIRST[0].replace("00:00:00", "00:02:00"),
        FIRST[1].replace("00:00:01", "00:02:01"),
        inner("00:02:02", 5, 9.0),
    ]
    log = fed([*FIRST, *again])
    assert log.rows() == []
    assert (log.update, log.saved) == (5, 0)


def test_an_epoch_without_log_lines_takes_the_epoch_average():
    log = fed([FIRST[0], FIRST[1], valid("00:00:05", 35, 3.0), SECOND[5]])
    assert [(row["update"], row["train_loss"]) for row in log.rows()] == [(35, 9.0)]


def test_what_a_line_brings_is_told():
    assert [
        fed([]).feed(text) for text in (FIRST[2], FIRST[4], FIRST[1], '2026-01-01 00:00:00 | INFO | valid | {"cut')
    ] == [*("train", "valid", None, None)]


@pytest.mark.parametrize(
    ("lines", "limit", "complete"),
    [
        (FIRST, 30, False),
        (FIRST, 20, True),  # saved at the limit, killed before it could be noted
        ([*FIRST, *SECOND], 1000, True),
        ([*FIRST, *SECOND, SECOND[0]], 1000, False),
        (
            [*FIRST[:5], line("00:00:04", "f", "early stop since valid performance hasn't improved"), FIRST[5]],
            1000,
            True,
        ),
        (FIRST[:1], 0, False),
    ],
)
def test_when_a_training_is_complete(lines, limit, complete):
    assert fed(lines).complete(limit) is complete


def test_what_a_table_needs_of_a_run():
    log = fed([
        FIRST[0],
        line("00:00:01", "fairseq_cli.train", "num. shared model params: 1,633,920 (num. trained: 1,633,920)"),
        line("00:00:01", "fairseq_cli.train", "num. expert model params: 80 (num. trained: 80)"),
        inner("00:00:02", 10, 8.0, wps="100"),
        inner("00:00:03", 20, 6.0, wps="900.5"),
        inner("00:00:04", 30, 6.0, wps="300"),
        line("00:00:05", logs.LAUNCH_TAG, "peak resident memory: 812 MiB"),
        line("00:00:06", logs.LAUNCH_TAG, "peak resident memory: 400 MiB"),
    ])  # fmt: skip
    assert log.parameters == 1_634_000
    assert log.tokens_per_second() == 300
    assert log.peak_memory() == (812, "cpu")
    assert log.seconds == 6  # the line of the memory begins no launch
    assert (fed([]).parameters, fed([]).tokens_per_second(), fed([]).peak_memory()) == (None, None, (None, None))


def test_peak_memory_of_a_gpu():
    rank = "capabilities =  7.0  ; total memory = 15.782 GB ; name = Tesla V100-SXM2-16GB"
    log = fed([
        line("00:00:01", "fairseq.utils", f"rank   0: {rank}"),
        line("00:00:01", "fairseq.utils", f"rank   1: {rank.replace('15.782', '31')}"),
        *(inner(f"00:00:0{i}", i, 1.0, gb_free=free) for i, free in ((2, "13.5"), (3, "13.4"), (4, "14"))),
        line("00:00:05", logs.LAUNCH_TAG, "peak resident memory: 3000 MiB"),
    ])  # fmt: skip
    assert log.peak_memory() == (round((15.782 - 13.4) * 1024), "gpu")


def test_a_line_is_added_on_a_line_of_its_own(tmp_path):
    path = tmp_path / "train.log"
    logs.append_line(path, "one")
    path.write_bytes(path.read_bytes() + b"cut by a ki")
    logs.append_line(path, logs.memory_line(12.4))
    assert path.read_text(encoding="utf-8").split("\n")[:2] == ["one", "cut by a ki"]
    assert path.read_text(encoding="utf-8").endswith(
        " | INFO | intra_distillation.train | peak resident memory: 12 MiB\n"
    )


def test_curves_are_written_whole(tmp_path):
    logs.write_curves(fed(FIRST).rows(), tmp_path / "curves.csv")
    text = (tmp_path / "curves.csv").read_text(encoding="utf-8")
    assert text.split("\n")[0] == ",".join(logs.COLUMNS)
    assert text.split("\n")[1] == "20,1,7.0,6.0,5.0,0.3,1.0,5.5,2.0,4.0,4.0"
    assert [path.name for path in tmp_path.iterdir()] == ["curves.csv"]
    (tmp_path / "train.log").write_text("\n".join([*FIRST, *SECOND]), encoding="utf-8")
    assert [row["update"] for row in logs.read_curves(tmp_path / "train.log")] == [20, 30]
    assert logs.read_curves(tmp_path / "none.log") == []


# -- processes


def test_output_is_followed_to_the_last_line(tmp_path):
    seen = []
    code = "import sys; print('é\\u2028x'); print('last'); sys.stderr.write('oops\\n'); sys.exit(3)"
    (tmp_path / "out").write_text("old\n", encoding="utf-8")
    status = processes.run_logged(
        [sys.executable, "-c", code], tmp_path / "out", tmp_path / "err", follow=seen.append, append=True
    )
    assert (status, seen) == (3, ["é\u2028x", "last"])
    assert (tmp_path / "err").read_text(encoding="utf-8") == "oops\n"
    assert processes.tail(tmp_path / "out", 2) == "é\u2028x\nlast"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(tmp_path, number):
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "print('ready', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('told', flush=True)\n"
    )
    seen = []

    def follow(text):
        seen.append(text)
        if text == "ready":
            os.kill(os.getpid(), number)

    status = processes.run_logged([sys.executable, "-c", code], tmp_path / "out", follow=follow)
    assert (status, seen) == (128 + number, ["ready", "told"])


@pytest.mark.parametrize("dies", [True, False])
def test_a_command_may_die_with_a_parent_that_is_killed(tmp_path, dies):
    code = (
        "import sys; from pathlib import Path\n"
        "from intra_distillation_fairseq.experiments import processes\n"
        "command = [sys.executable, '-c', 'import signal; signal.pause()']\n"
        "processes.run_logged(command, Path(sys.argv[1]), follow=print, dies_with_us=sys.argv[2] == 'True',\n"
        "                     started=lambda pid: print(pid, flush=True))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out", str(dies)], stdout=subprocess.PIPE)
    child = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    try:
        assert select.select([child], [], [], 60 if dies else 0)[0] == ([child] if dies else [])
    finally:
        if not dies:
            signal.pidfd_send_signal(child, signal.SIGKILL)
        os.close(child)


def test_a_killed_command_has_the_shell_s_status(tmp_path):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert processes.run_logged([sys.executable, "-c", code], tmp_path / "out", follow=print) == 137
    assert processes.describe_status(137) == "SIGKILL (too little memory is the usual reason)"
    assert processes.describe_status(143) == "SIGTERM"
    assert processes.describe_status(2) == "exit status 2"


def test_harmless_warnings_are_hidden_and_others_are_not(tmp_path):
    code = (
        "import warnings\n"
        "warnings.warn(\"'pin_memory' argument is set as true but no accelerator is found\")\n"
        "warnings.warn('something else')\n"
    )
    processes.run_logged([sys.executable, "-c", code], tmp_path / "out", follow=lambda text: None)
    text = (tmp_path / "out").read_text(encoding="utf-8")
    assert "pin_memory" not in text.replace(code, "")
    assert "UserWarning: something else" in text


# -- the data folder and fairseq-generate's output


@pytest.fixture
def prepared(tmp_path):
    folder = tmp_path / "daten é"
    (folder / "bin").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "source_lang": "xx", "target_lang": "en"}))
    for lang in ("xx", "en"):
        (folder / "bin" / f"dict.{lang}.txt").write_text("a 1\n")
        for ending in ("bin", "idx"):
            (folder / "bin" / f"test.xx-en.{lang}.{ending}").write_bytes(
                b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, 8, 42)
            )
    return folder


def test_a_complete_data_folder(prepared):
    data = open_prepared(prepared, ("test",))
    assert (data.pair, count_binarised(data, "test")) == ("xx-en", 42)
    assert data.references == prepared / "raw" / "test.en"


def test_sizes_of_other_formats_are_not_guessed(prepared):
    (prepared / "bin" / "test.xx-en.xx.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(40))
    assert count_binarised(open_prepared(prepared, ("test",)), "test") is None


def test_incomplete_data_folders_are_refused(prepared):
    with pytest.raises(
        UserError,
        match="data folder '.*none' does not exist: make it with scripts/prepare_iwslt14.sh, prepare_wmt17.sh or",
    ):
        open_prepared(prepared / "none", ())
    with pytest.raises(
        UserError, match="not a prepared data folder, it has no manifest.json: did you mean '.*daten é'"
    ):
        open_prepared(prepared.parent, ())
    with pytest.raises(UserError, match="not a prepared data folder, it has no manifest.json: make it with"):
        open_prepared(prepared / "bin", ())
    with pytest.raises(UserError, match="train.xx-en.xx.bin' is missing: run the prepare command of this folder again"):
        open_prepared(prepared, ("train",))
    (prepared / "bin" / "test.xx-en.en.idx").write_bytes(b"")
    with pytest.raises(UserError, match="test.xx-en.en.idx' is empty"):
        open_prepared(prepared, ("test",))


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 9, "source_lang": "a", "target_lang": "b"}'])
def test_damaged_manifests_are_refused(prepared, text):
    (prepared / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="is damaged .*: prepare again|has the format '9', this version reads format 1"):
        open_prepared(prepared, ())


def test_lines_are_split_at_line_feeds_only(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("a\u2028b\r\n\n c\x0b".encode())
    assert raw_lines(path) == ["a\u2028b\r", "", " c\x0b"]
    path.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="t.txt' line 1 is not UTF-8"):
        raw_lines(path)


def test_hypotheses_are_put_in_order(tmp_path):
    path = tmp_path / "generate.txt"
    path.write_text("S-1\tx\nH-1\t-1\t▁b\nD-1\t-1\tb\u2028 c\tt\nD-0\t-2\t\nGenerate test\n", encoding="utf-8")
    assert read_hypotheses(path) == ["", "b\u2028 c\tt"]
    path.write_text("D-0\t-1\ta\nD-3\t-1\tb\n", encoding="utf-8")
    with pytest.raises(UserError, match="has no translation of 2 sentences, the first is number 1"):
        read_hypotheses(path)
    path.write_text("D-0\t-1\ta\nD-0\t-1\tb\n", encoding="utf-8")
    with pytest.raises(UserError, match="has two translations of sentence 0"):
        read_hypotheses(path)
