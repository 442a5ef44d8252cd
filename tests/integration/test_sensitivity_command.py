"""`intra-distillation sensitivity` on a tiny trained run, and the measurement during training, through fairseq-train."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq_commands import TINY_MODEL, TRAINING, USER_DIR, Running, command
from in_process import make_criterion, make_model, make_task

from intra_distillation_fairseq import checkpoints
from intra_distillation_fairseq.analysis import balance, sensitivity
from intra_distillation_fairseq.cli import main
from intra_distillation_fairseq.losses.backends import BACKENDS
from intra_distillation_fairseq.models.switch_layer import switch_layers

MASKS = "--dropout 0.3 --label-smoothing 0.1 --criterion label_smoothed_cross_entropy --task translation_intra_distillation".split()
LOGGED = "--sensitivity-interval 2 --sensitivity-batches 3".split()


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory) -> Path:
    """A folder of checkpoints of six updates of id_x; tests that write into it copy it first."""
    folder = tmp_path_factory.mktemp("runs") / "lauf é"
    flags = [*MASKS[:4], *"--criterion intra_distillation --id-num-passes 2 --id-alpha 1 --max-update 6".split()]
    done = command(
        "train", tiny_data, "--user-dir", USER_DIR, "--save-dir", folder, "--task", "translation_intra_distillation",
        *TINY_MODEL, *TRAINING, *flags, *LOGGED,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run é"))


def here(capsys, *words: object) -> tuple[int, str, str]:
    """The command in this process: exit status, standard output and standard error."""
    capsys.readouterr()
    status = main.main(["sensitivity", *map(str, words), "--cpu"])
    said = capsys.readouterr()
    return status, said.out, said.err


def record_of(run: Path, name: str = "best") -> dict:
    return json.loads((run / "analysis" / f"sensitivity_{name}.json").read_text())


def arrays_of(run: Path, name: str = "best") -> dict[str, np.ndarray]:
    with np.load(run / "analysis" / f"sensitivity_{name}.npz") as file:
        return dict(file)


# -- the command


def test_files_and_table(run, capsys):
    status, out, err = here(capsys, run, "--batches", 2)
    assert status == 0, err
    model = checkpoints.load(run / "checkpoint_best.pt")["model"]
    arrays, record = arrays_of(run), record_of(run)
    assert {n: a.shape for n, a in arrays.items()} == {n: tuple(v.shape) for n, v in model.items() if n in arrays}
    assert not [n for n in model if n not in arrays and n.endswith((".weight", ".bias"))]
    assert all(a.dtype == np.float32 and (a >= 0).all() for a in arrays.values())
    assert record["summary"] == balance.summary(balance.in_order(arrays))
    assert record["settings"] == {
        "split": "train", "seed": 1, "dropout": True, "average": "absolute", "objective": "cross_entropy",
        "normalised": False, "batches": 2, "tokens": record["settings"]["tokens"],
    }  # fmt: skip
    assert (record["format"], record["update"], record["checkpoint"]) == (1, 6, "checkpoint_best.pt")
    assert set(record["layers"]) == {
        "encoder.embed_tokens", "encoder.layers.0", "decoder.embed_tokens", "decoder.layers.0", "decoder.output_projection",
    }  # fmt: skip
    assert sum(layer["parameters"] for layer in record["layers"].values()) == record["summary"]["parameters"]
    assert "encoder.layers.0.fc1" in record["modules"]
    for part in ("(update 6)", "Gini coefficient", "mean of the top 20%", "decoder.layers.0", "sensitivity_best.npz"):
        assert part in out


def test_it_is_what_the_plain_cross_entropy_gives(run, capsys, tiny_data):
    """Of a model trained with another criterion: the same model and batches through fairseq's own .backward()."""
    assert here(capsys, run, "--batches", 1, "--no-dropout", "--split", "valid", "--max-tokens", 100)[0] == 0
    variant = "best_no_dropout_valid"
    task = make_task(tiny_data)
    model = make_model(task)
    model.load_state_dict(checkpoints.load(run / "checkpoint_best.pt")["model"])
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    [batch] = sensitivity.choose_batches(dataset, 1, 1, max_tokens=100, multiple=8)
    sample = dataset.collater([dataset[int(i)] for i in batch])
    loss, _, log = sensitivity.cross_entropy(task, 0.1)(model.eval(), sample)
    (loss / log["ntokens"]).backward()
    for name, values in arrays_of(run, variant).items():
        parameter = dict(model.named_parameters())[name]
        expected = (parameter * parameter.grad).abs()
        torch.testing.assert_close(torch.from_numpy(values), expected.detach(), rtol=1e-4, atol=1e-9)
    assert record_of(run, variant)["loss"] == pytest.approx(loss.item() / log["ntokens"], rel=1e-5)


def test_a_second_call_does_nothing_unless_something_has_changed(run, capsys):
    words = (run, "--batches", 1, "--max-tokens", 60)
    assert "already" not in here(capsys, *words)[2]
    first = arrays_of(run)
    (run / "analysis" / "sensitivity_best.npz").touch()
    time = (run / "analysis" / "sensitivity_best.npz").stat().st_mtime_ns
    status, out, err = here(capsys, *words)
    assert (status, "already measured, nothing to do" in err, "Gini" in out) == (0, True, True)
    assert (run / "analysis" / "sensitivity_best.npz").stat().st_mtime_ns == time

    assert "already" not in here(capsys, *words, "--force")[2]
    assert all(np.array_equal(value, first[name]) for name, value in arrays_of(run).items())  # reproducible
    assert "already" not in here(capsys, *words, "--seed", 2, "--force")[2]
    assert not np.array_equal(arrays_of(run)["encoder.layers.0.fc1.weight"], first["encoder.layers.0.fc1.weight"])
    assert here(capsys, *words, "--seed", 2)[2].startswith("already measured")
    shutil.copy(run / "checkpoint_last.pt", run / "checkpoint_best.pt")
    state = checkpoints.load(run / "checkpoint_best.pt")
    checkpoints.write({**state, "extra_state": {}}, run / "checkpoint_best.pt")
    assert "already" not in here(capsys, *words, "--seed", 2)[2]


def test_another_measurement_is_not_replaced_by_the_way(run, capsys):
    file = run / "analysis" / "sensitivity_best.npz"
    assert here(capsys, run, "--batches", 1, "--max-tokens", 60)[0] == 0
    before = file.read_bytes()
    status, out, err = here(capsys, run, "--batches", 2, "--seed", 5)
    assert (status, out, file.read_bytes() == before) == (2, "", True)
    assert err == (
        f"intra-distillation sensitivity: error: '{file}' was measured with batches 1 (asked for: 2), seed 1 (asked for: "
        "5), max_tokens 60 (asked for: as trained): --force replaces it, --out FILE keeps both\n"
    )
    state = checkpoints.load(run / "checkpoint_best.pt")
    checkpoints.write({**state, "extra_state": {}}, run / "other.pt")
    words = ("--batches", 1, "--max-tokens", 60, "--checkpoint", "other.pt", "--out", file)
    status, _, err = here(capsys, run, *words)
    assert status == 2 and "was measured with checkpoint checkpoint_best.pt (asked for: other.pt): --force" in err
    assert here(capsys, run, *words, "--force")[0] == 0


def test_variants_differ_as_they_should(run, capsys):
    def measured(*flags, name="best"):
        status, _, err = here(capsys, run, "--batches", 3, "--max-tokens", 60, *flags)
        assert status == 0, err
        return arrays_of(run, name), record_of(run, name)

    plain, gradient = measured(), measured("--average", "gradient", name="best_gradient")
    for name, value in gradient[0].items():  # the mean of absolute values is the larger one
        assert (value <= plain[0][name] * 1.0001 + 1e-12).all(), name
    assert gradient[1]["summary"]["mean"] < 0.99 * plain[1]["summary"]["mean"]
    normalised = measured("--normalise", name="best_normalised")
    assert normalised[1]["summary"]["mean"] == pytest.approx(plain[1]["summary"]["mean"] / plain[1]["loss"], rel=0.1)
    # Intra-distillation has K passes and a divergence besides: a mean of other masks, and alpha' times another gradient.
    training = measured("--objective", "training", name="best_training")
    assert training[1]["settings"]["objective"] == "training"
    assert training[1]["loss"] > plain[1]["loss"]
    assert measured("--no-dropout", name="best_no_dropout")[1]["settings"]["dropout"] is False
    assert record_of(run) == plain[1]  # each has a file of its own


def test_the_training_objective_is_that_of_the_checkpoints_update(run, capsys, tiny_data):
    """Its alpha' depends on the update: adaptive up to --id-alpha 1 at max-update / p."""
    status, _, err = here(capsys, run, "--batches", 1, "--max-tokens", 60, "--objective", "training")
    assert status == 0, err
    task = make_task(tiny_data)
    model = make_model(task, dropout=0.3)
    model.load_state_dict(checkpoints.load(run / "checkpoint_best.pt")["model"])
    task.load_dataset("train")
    batches = sensitivity.choose_batches(task.dataset("train"), 1, 1, max_tokens=60, multiple=8)
    criterion = make_criterion(task, id_num_passes=2, id_alpha=1, max_update=6)
    criterion.set_num_updates(6)
    samples = sensitivity.collated(task.dataset("train"), batches, torch.device("cpu"))
    expected = sensitivity.measure(model, criterion, samples)
    assert record_of(run, "best_training")["loss"] == pytest.approx(expected.loss, rel=1e-5)
    arrays = arrays_of(run, "best_training")
    for name, value in expected.values.items():
        torch.testing.assert_close(torch.from_numpy(arrays[name]), value, rtol=1e-3, atol=1e-8)


def test_more_batches_than_there_are(run, capsys):
    status, out, err = here(capsys, run, "--split", "valid", "--out", run / "all.npz")
    assert status == 0
    assert "note: 'valid' has 2 batches, all of them are measured" in err
    assert "2 batches of valid" in out
    assert (run / "all.json").exists() and not (run / "analysis" / "sensitivity_best.npz").exists()


def test_a_checkpoint_file_by_itself(run, capsys):
    assert here(capsys, run / "checkpoint_last.pt", "--batches", 1)[0] == 0
    assert record_of(run, "last")["checkpoint"] == "checkpoint_last.pt"


def test_mistakes_are_one_line(run, capsys, tmp_path, tiny_data):
    other = Path(shutil.copytree(tiny_data, tmp_path / "other"))
    for lang in ("xx", "en"):
        with open(other / f"dict.{lang}.txt", "a", encoding="utf-8") as dictionary:
            dictionary.write("new 1\n")
    (tmp_path / "empty").mkdir()
    for words, message in (
        ((tmp_path / "none",), "none' does not exist: give a run folder of train.sh or a checkpoint file"),
        ((tmp_path / "empty",), "(the folder has no checkpoint): train first"),
        ((run, "--checkpoint", "worst"), "the folder has checkpoint"),
        ((run, "--data", other), "do not fit the dictionaries of"),
        ((run, "--batches", 0), "--batches is 0: allowed is at least 1"),
        ((run, "--seed", -1), "--seed is -1: allowed is 0 to 4294967295"),
        ((run, "--seed", 2**32), "--seed is 4294967296: allowed is 0 to 4294967295"),
        ((run, "--max-tokens", -1), "--max-tokens is -1: allowed is at least 1"),
        ((run, "--max-tokens", 1), "no sentence is short enough for batches of 1 tokens: allow more"),
        ((run, "--split", "dev"), f"--split is 'dev': '{tiny_data}' has test, train, valid"),
        ((run, "--out", tmp_path / "no" / "a.npz"), f"its folder '{tmp_path}/no' does not exist"),
        ((run, "--out", tmp_path / "a.json"), "its name must end in .npz"),
        ((run, "--objective", "training", "--no-dropout"), "--objective training and --no-dropout exclude each other"),
        (
            (tmp_path / "empty", "--during-training"),
            "nothing was measured while training: train with --sensitivity-inte",
        ),
        ((tmp_path / "none", "--during-training"), "none' does not exist"),
    ):
        status, _, err = here(capsys, *words)
        assert status == 2, words
        assert message in err and err.count("\n") == 1, err
    assert not list(run.rglob("*.npz"))


def test_a_failed_measurement_keeps_the_old_files(run, capsys):
    assert here(capsys, run, "--batches", 1)[0] == 0
    state = checkpoints.load(run / "checkpoint_best.pt")
    state["model"]["decoder.output_projection.weight"] = state["model"]["decoder.output_projection.weight"] * float(
        "nan"
    )
    checkpoints.write(state, run / "checkpoint_best.pt")
    before = (run / "analysis" / "sensitivity_best.npz").read_bytes()
    status, _, err = here(capsys, run, "--batches", 1)
    assert status == 2
    assert "of all 1 batches loss or gradient is not finite" in err
    assert (run / "analysis" / "sensitivity_best.npz").read_bytes() == before
    names = {path.name for path in (run / "analysis").iterdir()}
    assert names == {"sensitivity_best.npz", "sensitivity_best.json", ".sensitivity_best.lock"}


def test_experts_are_measured(sample, task):
    model = make_model(task, dropout=0.1, arch="switch_transformer_small")
    measured = sensitivity.measure(model, sensitivity.cross_entropy(task, 0.1), [sample])
    assert set(measured.values) == {name for name, _ in model.named_parameters()}
    names = [name for name, module in model.named_modules() if module in switch_layers(model)]
    assert names
    for name in names:
        assert measured.values[f"{name}.w1"].gt(0).any() and measured.values[f"{name}.b2"].gt(0).any()


@pytest.mark.parametrize("mode", ["stacked", "recompute"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_the_criterion_of_intra_distillation_can_be_measured(sample, task, mode, backend):
    criterion = make_criterion(
        task, id_num_passes=2, id_alpha_schedule="constant", id_alpha=1, id_pass_mode=mode, id_loss_backend=backend
    )
    model = make_model(task, dropout=0.1)
    measured = sensitivity.measure(model, criterion, [sample])
    model.train().zero_grad()
    torch.manual_seed(1)
    loss, _, log = criterion(model, sample)
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = (parameter * parameter.grad / log["ntokens"]).abs()
        torch.testing.assert_close(measured.values[name], expected.detach(), rtol=1e-4, atol=1e-9)


def test_choosing_batches_leaves_the_random_state_and_the_data_alone(task):
    task.load_dataset("train")
    dataset = task.dataset("train")
    np.random.seed(5)
    state = np.random.get_state()[1].copy()
    first, again = (sensitivity.choose_batches(dataset, 4, 3, max_tokens=60) for _ in range(2))
    assert [b.tolist() for b in first] == [b.tolist() for b in again]
    assert np.array_equal(np.random.get_state()[1], state)
    assert not task.dataset_to_epoch_iter
    other = sensitivity.choose_batches(dataset, 4, 4, max_tokens=60)
    assert [b.tolist() for b in first] != [b.tolist() for b in other]
    every = sensitivity.choose_batches(dataset, 10**6, 3, max_tokens=60)
    assert sorted(np.concatenate(every).tolist()) == list(range(100))


# -- during training


def logged(folder: Path) -> list[dict]:
    """Without what depends on the clock."""
    text = (folder / "sensitivity.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [{**json.loads(line), "seconds": 0} for line in text.split("\n")[:-1]]


def model_of(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(folder / "checkpoint_last.pt")["model"]


@pytest.mark.parametrize("flags", [[], "--update-freq 2 --num-workers 1".split()])
def test_measuring_does_not_change_the_training(train, tmp_path, flags):
    limit = [*MASKS, "--max-update", 6, *flags]
    for name, more in (("with", LOGGED), ("without", [])):
        done = train(*limit, *more, save_dir=tmp_path / name)
        assert done.returncode == 0, done.stderr
    one, other = model_of(tmp_path / "with"), model_of(tmp_path / "without")
    assert all(torch.equal(value, one[name]) for name, value in other.items())
    lines = logged(tmp_path / "with")
    assert [line["update"] for line in lines] == [2, 4, 6]
    assert lines[0]["settings"]["batches"] == 3 and lines[0]["skipped_batches"] == 0
    assert lines[0]["summary"]["gini"] != lines[1]["summary"]["gini"]
    assert not (tmp_path / "without" / "sensitivity.jsonl").exists()


def test_the_log_and_the_command_agree(run, capsys, tiny_data):
    """The last line is of the last checkpoint: the same batches, masks and plain loss under another criterion."""
    assert here(capsys, run, "--checkpoint", "last", "--batches", 3)[0] == 0
    line, record = logged(run)[-1], record_of(run, "last")
    assert line["update"] == record["update"] == 6
    assert line["settings"] == record["settings"]
    assert line["loss"] == pytest.approx(record["loss"], rel=1e-6)
    assert line["summary"] == pytest.approx(record["summary"], rel=1e-5)
    assert list(line["layers"]) == list(record["layers"])

    status, out, _ = here(capsys, run, "--during-training")
    rows = out.split("\n")
    assert status == 0 and rows[0].split()[:3] == ["update", "loss", "mean"]
    assert [row.split()[0] for row in rows[1:-1]] == ["2", "4", "6"]


@pytest.mark.parametrize("line", ['{"a":1}', "3", '{"update": 4, "loss": 2, "summary": {}}'])
def test_a_damaged_log_is_one_line(tmp_path, capsys, line):
    summary = dict.fromkeys(["mean", "std", "std_trimmed", "top_mean", "rest_mean", "ratio", "gini", "cv"], 1.0)
    whole = json.dumps({"update": 2, "loss": 3.0, "summary": summary})
    (tmp_path / "sensitivity.jsonl").write_text(f"{whole}\n")
    status, out, err = here(capsys, tmp_path, "--during-training")
    assert (status, err) == (0, "") and out.split("\n")[1].split()[:2] == ["2", "3"]
    (tmp_path / "sensitivity.jsonl").write_text(f"{whole}\n{line}\n")
    status, out, err = here(capsys, tmp_path, "--during-training")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "sensitivity.jsonl' is damaged" in err and ": remove the lines that are not whole, or train" in err


def test_a_resumed_training_leaves_the_file_of_one_that_never_stopped(train, tmp_path, run):
    flags = [*MASKS, *LOGGED]
    whole, folder = tmp_path / "whole", tmp_path / "resumed"
    assert train(*flags, "--max-update", 7, save_dir=whole).returncode == 0
    assert train(*flags, "--max-update", 5, save_dir=folder).returncode == 0
    lines = (folder / "sensitivity.jsonl").read_text()
    # As if updates 6 and 8 had been made and measured, and the process killed while it wrote the line after those.
    later = "".join(lines.split("\n")[0].replace('"update": 2', f'"update": {n}') + "\n" for n in (6, 8))
    (folder / "sensitivity.jsonl").write_text(lines + later + '{"update": 10, "lo')
    done = train(*flags, "--max-update", 7, save_dir=folder)
    assert done.returncode == 0, done.stderr
    assert [line["update"] for line in logged(whole)] == [2, 4, 6]
    assert logged(folder) == logged(whole)


def test_a_fresh_training_in_the_folder_begins_a_fresh_log(train, tmp_path, run):
    shutil.copytree(run, tmp_path / "run", dirs_exist_ok=True)
    for path in (tmp_path / "run").glob("*.pt"):
        path.unlink()
    assert train(*MASKS, *LOGGED, "--max-update", 3).returncode == 0
    assert [line["update"] for line in logged(tmp_path / "run")] == [2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sensitivity-interval -1", "error: --sensitivity-interval is -1: allowed is a number of updates, or 0"),
        ("--sensitivity-batches 0", "error: --sensitivity-batches is 0: allowed is at least 1"),
        ("--sensitivity-seed -1", "error: --sensitivity-seed is -1: allowed is 0 to 4294967295"),
    ],
)
def test_wrong_flags_end_with_one_line(train, flags, message):
    done = train(*MASKS, *flags.split(), "--max-update", 2)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr


def test_sharded_parameters_are_not_measured(tiny_data):
    with pytest.raises(SystemExit, match="^error: --sensitivity-interval does not work with --ddp-backend fully_shard"):
        make_task(tiny_data, sensitivity_interval=2, ddp_backend="fully_sharded")


def test_bfloat16_is_measured(train, tmp_path):
    done = train(*MASKS, *LOGGED, "--bf16", "--max-update", 2)
    assert done.returncode == 0, done.stderr
    [line] = logged(tmp_path / "run")
    assert line["summary"]["mean"] > 0 and line["skipped_batches"] == 0


def test_one_of_two_processes_measures_and_nothing_changes(tiny_data, tmp_path):
    """Under DistributedDataParallel, whose hooks would wait for gradients that the other process does not compute."""
    for name, more in (("with", LOGGED), ("without", [])):
        address = f"file://{tmp_path}/{name}.rendezvous"
        running = [
            Running(
                "train", tiny_data, "--user-dir", USER_DIR, "--save-dir", tmp_path / name, *TINY_MODEL, *TRAINING,
                *MASKS, *more, "--max-update", 3, "--distributed-world-size", 2, "--distributed-rank", rank,
                "--distributed-init-method", address, "--distributed-no-spawn", "--distributed-backend", "gloo",
            )
            for rank in (0, 1)
        ]  # fmt: skip
        for process in running:
            done = process.wait()
            assert done.returncode == 0, done.stderr[-3000:]
    one, other = model_of(tmp_path / "with"), model_of(tmp_path / "without")
    assert all(torch.equal(value, one[name]) for name, value in other.items())
    assert [line["update"] for line in logged(tmp_path / "with")] == [2]


# -- the benchmark


def test_the_benchmark_runs(tmp_path):
    out = tmp_path / "sensitivity.csv"
    script = Path(main.__file__).resolve().parents[2] / "benchmarks" / "sensitivity.py"
    words = [sys.executable, script, "--quick", "--device", "cpu", "--interval", "50", "--out", out]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with open(out, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["baseline", "stacked"]
    for row in rows:
        assert (row["interval"], row["measured_batches"]) == ("50", "2")
        assert {"share", "interval_for_3_percent", "parameters", "repeats"} <= row.keys()
        for name in ("update_ms", "update_ms_q20", "update_ms_q80"):  # a difference of times may be below 0
            assert 0 < float(row[name]) < math.inf, name
        for name in ("measurement_ms", "measurement_ms_q20", "measurement_ms_q80", "share"):
            assert math.isfinite(float(row[name])), name
