"""intra-distillation truncate and layers on a tiny trained run, through the real commands."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from fairseq_commands import command
from test_train_evaluate import arguments, here, prepared  # noqa: F401  a fixture

from intra_distillation_fairseq import checkpoints, load
from intra_distillation_fairseq.cli import main
from intra_distillation_fairseq.experiments import depth_curve, translation
from intra_distillation_fairseq.models.depth import first_layers

CONFIG = """
train:
  arch: transformer_small
  encoder-layers: 3
  decoder-layers: 3
  encoder-embed-dim: 16
  decoder-embed-dim: 16
  encoder-ffn-embed-dim: 32
  decoder-ffn-embed-dim: 32
  encoder-attention-heads: 2
  decoder-attention-heads: 2
  encoder-normalize-before: true
  decoder-normalize-before: true
  share-all-embeddings: true
  label-smoothing: 0.1
  optimizer: adam
  lr: 0.01
  max-tokens: 400
  max-update: 60
  num-workers: 0
  log-interval: 20
  no-epoch-checkpoints: true
methods:
  transformer: {criterion: label_smoothed_cross_entropy}
evaluate: {beam: 2, lenpen: 1.0, max-len-a: 1.5, max-len-b: 5, lowercase: false}
"""
FLAGS = ["--", "--criterion", "self_teaching", "--student-layers", "1"]


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Path:  # noqa: F811
    config = tmp_path_factory.mktemp("config") / "three.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    folder = tmp_path_factory.mktemp("runs") / "self teaching é"
    assert main.main(["train", *arguments(prepared, config, folder, method="transformer"), *FLAGS]) == 0
    return folder


@pytest.fixture
def run_copy(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture(scope="module")
def cut(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cut") / "zwei.pt"
    assert main.main(["truncate", str(trained / "checkpoint_best.pt"), "--layers", "2", "--out", str(path)]) == 0
    return path


def hypotheses(folder: Path) -> list[str]:
    return (folder / "hypotheses.txt").read_text(encoding="utf-8").split("\n")


# -- truncate


def test_a_cut_checkpoint_gives_the_logits_of_the_view(trained, cut, prepared):  # noqa: F811
    model, task, _ = load(trained)
    small = load(cut, data=prepared).model
    task.load_dataset("valid")
    dataset = task.datasets["valid"]
    batch = dataset.collater([dataset[i] for i in range(len(dataset))])["net_input"]
    with torch.no_grad():
        expected, got, whole = (m(**batch)[0] for m in (first_layers(model, 2), small, model))
    assert torch.equal(expected, got)
    assert not torch.allclose(whole, got, atol=1e-2)


def test_a_cut_checkpoint_translates_as_the_view_does(trained, cut, prepared):  # noqa: F811
    """The view through fairseq's search in this process, the checkpoint through fairseq-generate without the plugin."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fairseq_cli.generate", prepared / "bin", "--task", "translation", "--path", cut),
            *("--source-lang", "xx", "--target-lang", "en", "--gen-subset", "test", "--beam", "2", "--cpu"),
            *("--required-batch-size-multiple", "1", "--num-workers", "0", "--scoring", "sacrebleu"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "intra_distillation" not in done.stdout + done.stderr.replace(str(cut), "")
    rows = [line.split("\t") for line in done.stdout.split("\n") if line.startswith("H-")]
    got = {int(row[0][2:]): row[2] for row in rows}

    loaded = load(trained)
    view, task = first_layers(loaded.model, 2), loaded.task
    task.load_dataset("test")
    dataset = task.datasets["test"]
    generator = task.build_generator([view], Namespace(beam=2))
    batch = dataset.collater([dataset[i] for i in range(len(dataset))])
    found = zip(batch["id"].tolist(), task.inference_step(generator, [view], batch))
    expected = {number: task.target_dictionary.string(beams[0]["tokens"]) for number, beams in found}
    assert len(got) == len(dataset) == 11
    assert got == expected


def test_training_goes_on_from_a_cut_checkpoint(cut, prepared, tmp_path):  # noqa: F811
    flags = "--arch transformer_iwslt_de_en --share-all-embeddings --encoder-normalize-before".split()
    flags += "--decoder-normalize-before --encoder-layers 2 --decoder-layers 2 --optimizer adam --lr 0.001".split()
    for side in ("encoder", "decoder"):
        flags += f"--{side}-embed-dim 16 --{side}-ffn-embed-dim 32 --{side}-attention-heads 2".split()
    for how in (
        ["--restore-file", cut, "--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"],
        ["--finetune-from-model", cut],
    ):
        done = command(
            "train", prepared / "bin", "--task", "translation", "--save-dir", tmp_path / how[0], *flags, *how,
            *("--max-tokens", 400, "--max-update", 1, "--num-workers", 0, "--cpu", "--lr", 0),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        before, after = (checkpoints.load(path)["model"] for path in (cut, tmp_path / how[0] / "checkpoint_last.pt"))
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_default_name_and_what_is_not_replaced(run_copy, capsys):
    source = run_copy / "checkpoint_best.pt"
    before = source.read_bytes()
    assert here(capsys, "truncate", source, "--layers", 1)[0] == 0
    out = run_copy / "checkpoint_best.1layers.pt"
    assert out.stat().st_size < len(before) / 2
    assert load(out, data=json.loads((run_copy / "run.json").read_text())["data"]).model.encoder.num_layers == 1
    written = out.read_bytes()
    status, said = here(capsys, "truncate", source, "--layers", 1)
    assert (status, said.count("\n")) == (2, 1)
    assert f"'{out}' exists: give another --out, or --force to replace it" in said
    assert main.main(["truncate", str(source), "--layers", "1", "--force"]) == 0
    (run_copy / "link.pt").symlink_to(source)
    for same in (source, run_copy / "link.pt"):
        status, said = here(capsys, "truncate", source, "--layers", 1, "--out", same, "--force")
        assert (status, said.count("\n")) == (2, 1)
        assert f"--out '{same}' is the checkpoint itself: give another file" in said
    assert source.read_bytes() == before
    assert len(out.read_bytes()) == len(written)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "4"], "4 layers were asked for: the model has 3 encoder and 3 decoder layers, allowed is 1 to 3"),
        (["--layers", "0"], "0 layers were asked for"),
        (["--layers", "1", "--out", "."], "--out '.' is a folder: give a file, as in 'checkpoint.pt'"),
        *(
            (["--layers", "1", "--out", f"{folder}/x.pt"], f"--out '{folder}/x.pt' cannot be written (No such file")
            for folder in ("/nowhere", "/proc")
        ),
    ],
)
def test_mistakes_of_truncate(trained, capsys, words, message):
    status, said = here(capsys, "truncate", trained / "checkpoint_best.pt", *words)
    assert (status, said.count("\n")) == (2, 1)
    assert message in said


def test_a_folder_is_no_checkpoint(trained, tmp_path, capsys):
    (tmp_path / "checkpoint3.pt").touch()
    for folder, advice in (
        (trained, f"give a file in it, as in '{trained / 'checkpoint_best.pt'}'"),
        (tmp_path, f"give a file in it, as in '{tmp_path / 'checkpoint3.pt'}'"),
        (tmp_path.parent / ".", "give a checkpoint file (it has none)"),
    ):
        status, said = here(capsys, "truncate", folder, "--layers", 1)
        assert (status, said.count("\n")) == (2, 1)
        assert f"'{folder}' is a folder: {advice}" in said


def test_what_is_no_transformer_cannot_be_cut(tmp_path, capsys):
    checkpoints.write({"model": {"encoder.lstm.weight": torch.zeros(1)}, "cfg": None}, tmp_path / "lstm.pt")
    for name, message in (
        ("lstm.pt", "the checkpoint is not of an encoder-decoder transformer"),
        ("none.pt", f"checkpoint '{tmp_path / 'none.pt'}' does not exist"),
    ):
        status, said = here(capsys, "truncate", tmp_path / name, "--layers", 1)
        assert (status, said.count("\n")) == (2, 1)
        assert message in said
    assert [path.name for path in tmp_path.iterdir()] == ["lstm.pt"]


# -- layers


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory) -> tuple[Path, str, str]:
    """A measured copy of the run; standard output and error of the command."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("measured") / "lauf")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main.main(["layers", str(run), "--repeats", "1", "--cpu"]) == 0
    return run, out.getvalue(), err.getvalue()


def test_every_depth_is_scored_sized_and_timed(measured, trained):
    run, said, _ = measured
    record = json.loads((run / "analysis" / "layers.json").read_text())
    assert (record["format"], record["checkpoint"]) == (1, "checkpoint_best.pt")
    points = record["points"]
    assert [point["layers"] for point in points] == [3, 2, 1]
    model = load(trained).model
    assert points[0]["parameters"] == sum(p.numel() for p in model.parameters()) == record["full"]["parameters"]
    embeddings = model.encoder.embed_tokens.weight.numel()  # shared by all three, positions are not learnt
    layer = sum(p.numel() for side in (model.encoder, model.decoder) for p in side.layers[2].parameters())
    for point in points:
        assert point["parameters"] - point["parameters_without_embeddings"] == embeddings
        assert points[0]["parameters"] - point["parameters"] == (3 - point["layers"]) * layer
        assert (point["repeats"], len(point["measured"])) == (1, 1)
        for name in ("sentences_per_second", "tokens_per_second", "translation_seconds"):
            assert point[name] == point["measured"][0][name] > 0
    row = next(line for line in said.split("\n") if "| 3 |" in " ".join(line.split()))
    assert f"{points[0]['parameters']:,}" in row and f"{points[0]['bleu']:.2f}" in row
    assert [cell.strip() for cell in row.split("|")][4] == "100.0"
    rows = (run / "analysis" / "layers.tsv").read_text().split("\n")
    assert len(rows) == 5 and rows[1].split("\t")[:3] == ["lauf", "3", str(points[0]["parameters"])]
    assert (run / "analysis" / "layers.png").exists() and (run / "analysis" / "layers.pdf").exists()
    assert not list(run.rglob(".checkpoint.pt"))


def test_libraries_do_not_talk_over_the_command(measured, tmp_path):
    """A process of its own: here pytest has set up the log before fairseq could."""
    run = shutil.copytree(measured[0], tmp_path / "run")
    command_line = Path(sys.executable).with_name("intra-distillation")
    done = subprocess.run([command_line, "layers", run, "--repeats", "1", "--cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "table: " in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_uncut_depth_scores_as_evaluate_does(measured):
    run = measured[0]
    assert main.main(["evaluate", str(run), "--cpu"]) == 0
    score = json.loads((run / "eval" / "best" / "score.json").read_text())
    points = json.loads((run / "analysis" / "layers.json").read_text())["points"]
    assert points[0]["bleu"] == score["bleu"]
    assert hypotheses(run / "analysis" / "3layers") == hypotheses(run / "eval" / "best")
    assert hypotheses(run / "analysis" / "1layers") != hypotheses(run / "eval" / "best")


@pytest.fixture
def translations(monkeypatch) -> list[str]:
    """Stands in for fairseq-generate; the labels of its calls."""
    calls = []

    def translate(data, checkpoint, evaluation, out, *, cpu, label):
        assert checkpoint.exists() and cpu
        if calls.count("stop"):
            raise translation.TranslationFailed("stopped", 1)
        calls.append(label)
        return {"bleu": 10.0, "chrf": 20.0, "sentences_per_second": float(len(calls)), "tokens_per_second": 2.0,
                "translation_seconds": 3.0}  # fmt: skip

    monkeypatch.setattr(depth_curve, "translate_and_score", translate)
    return calls


def test_repeats_are_interleaved_and_what_is_done_is_kept(run_copy, translations, capsys):
    words = ["layers", run_copy, "--cpu", "--layers", 1, 3, "--repeats"]
    assert here(capsys, *words, 2)[0] == 0
    assert translations == ["3 layers, 1 of 2", "1 layers, 1 of 2", "3 layers, 2 of 2", "1 layers, 2 of 2"]
    points = json.loads((run_copy / "analysis" / "layers.json").read_text())["points"]
    assert [point["sentences_per_second"] for point in points] == [2, 3]
    del translations[:]
    assert here(capsys, *words, 2)[0] == 0
    assert translations == []
    assert here(capsys, *words, 3)[0] == 0
    assert translations == ["3 layers, 3 of 3", "1 layers, 3 of 3"]
    del translations[:]
    assert here(capsys, "layers", run_copy, "--cpu", "--layers", 2, "--repeats", 1)[0] == 0
    assert translations == ["2 layers, 1 of 1"]
    kept = json.loads((run_copy / "analysis" / "layers.json").read_text())["points"]
    assert [point["repeats"] for point in kept] == [3, 1, 3]
    assert here(capsys, *words, 1, "--force")[0] == 0
    forced = json.loads((run_copy / "analysis" / "layers.json").read_text())["points"]
    assert [point["repeats"] for point in forced] == [1, 1, 1]
    assert forced[1] == kept[1]  # that n was not asked for


def test_another_checkpoint_of_the_name_is_measured_only_by_force(run_copy, translations, capsys):
    words = ["layers", run_copy, "--cpu", "--layers", 1, "--repeats", 1]
    assert here(capsys, *words)[0] == 0
    state = checkpoints.load(run_copy / "checkpoint_best.pt")
    state["model"]["decoder.layer_norm.bias"] = state["model"]["decoder.layer_norm.bias"] + 1
    checkpoints.write(state, run_copy / "checkpoint_best.pt")
    path = run_copy / "analysis" / "layers.json"
    before = path.read_bytes()
    status, said = here(capsys, *words)
    assert (status, said.count("\n"), len(translations)) == (2, 1, 1)
    assert f"'{path}' was measured with other inputs (another checkpoint of this name): measure as it was, or" in said
    assert path.read_bytes() == before
    assert here(capsys, *words, "--force")[0] == 0
    assert len(translations) == 2


def test_other_checkpoints_have_files_of_their_own(run_copy, translations, capsys):
    words = ["layers", run_copy, "--cpu", "--layers", 1, "--repeats", 1]
    assert here(capsys, *words, "--checkpoint", "last")[0] == 0
    folder = run_copy / "analysis"
    last = (folder / "layers_last.json").read_bytes()
    assert not (folder / "layers.json").exists() and not (folder / "layers.png").exists()
    assert here(capsys, *words, "--checkpoint", "checkpoint_best.pt")[0] == 0
    assert (folder / "layers_last.json").read_bytes() == last
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    tables = {"layers.tsv", "layers_last.tsv", "layers.json", "layers_last.json", "layers.png", "layers.pdf"}
    assert names == tables | {"1layers", "1layers_last"}


def test_a_run_that_cannot_be_written(run_copy, translations, tmp_path, capsys):
    (run_copy / "analysis").write_text("in the way")
    status, said = here(capsys, "layers", run_copy, "--cpu", "--out", tmp_path / "out")
    assert (status, said.count("\n")) == (2, 1)
    assert f"'{run_copy / 'analysis'}', where the measurements are kept, cannot be written (File exists): copy" in said


def test_a_failure_leaves_what_was_measured(run_copy, translations, capsys):
    assert here(capsys, "layers", run_copy, "--cpu", "--layers", 3, "--repeats", 1)[0] == 0
    translations.append("stop")
    status, said = here(capsys, "layers", run_copy, "--cpu", "--repeats", 1)
    assert (status, "error: stopped" in said) == (2, True)
    points = json.loads((run_copy / "analysis" / "layers.json").read_text())["points"]
    assert [point["layers"] for point in points] == [3]
    assert not list(run_copy.rglob(".checkpoint.pt"))


def test_several_runs_make_one_table(trained, run_copy, tmp_path, translations, capsys):
    other = shutil.copytree(trained, tmp_path / "other")
    out = tmp_path / "tables"
    status = main.main(["layers", str(run_copy), str(other), "--cpu", "--repeats", "1", "--out", str(out)])
    assert status == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert len(lines) == 2 + 6
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["copy"] * 3 + ["other"] * 3
    assert sorted(path.name for path in out.iterdir()) == ["layers.pdf", "layers.png", "layers.tsv"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "4"], "4 layers were asked for: the model has 3 encoder and 3 decoder layers, allowed is 1 to 3"),
        (["--repeats", "0"], "--repeats is 0: allowed is at least 1"),
        (["--checkpoint", "newest.pt"], "checkpoint 'newest.pt': "),
        (["--data", "/nowhere"], "data folder '/nowhere' does not exist"),
        (["--out", "/dev/null/x"], "--out '/dev/null/x' cannot be made ("),
    ],
)
def test_mistakes_of_layers(run_copy, capsys, translations, words, message):
    status, said = here(capsys, "layers", run_copy, "--cpu", *words)
    assert (status, said.count("\n")) == (2, 1)
    assert message in said
    assert translations == []


def test_what_is_no_run_folder_has_no_layers(tmp_path, capsys):
    status, said = here(capsys, "layers", tmp_path / "none")
    assert (status, said.count("\n")) == (2, 1)
    assert f"run folder '{tmp_path / 'none'}' does not exist" in said
