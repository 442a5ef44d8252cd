"""`intra-distillation prune` on a tiny run: the curve, going on with it, checkpoints for fairseq alone, wrong input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq_commands import TINY_RECIPE, command

from intra_distillation_fairseq import checkpoints, loading
from intra_distillation_fairseq.cli import main
from intra_distillation_fairseq.experiments import translation
from intra_distillation_fairseq.files import file_sha256

CONFIG = (
    TINY_RECIPE
    + """
  share-all-embeddings: true
  optimizer: adam
  lr: 0.01
  max-tokens: 300
  max-update: 60
  num-workers: 0
methods:
  transformer: {criterion: label_smoothed_cross_entropy}
evaluate: {beam: 2, max-len-a: 1.5, max-len-b: 5}
"""
)
RATIOS = ("--ratios", "0", "0.25", "0.5")


@pytest.fixture(scope="module")
def prepared(tiny_data, tmp_path_factory) -> Path:
    """The tiny corpus as the prepare scripts lay it out."""
    folder = tmp_path_factory.mktemp("prepared") / "daten é"
    shutil.copytree(tiny_data, folder / "bin")
    (folder / "raw").mkdir()
    shutil.copy(tiny_data.parent / "test.en", folder / "raw" / "test.en")
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "source_lang": "xx", "target_lang": "en"}))
    return folder


@pytest.fixture(scope="module")
def measured(prepared, tmp_path_factory) -> Path:
    """A trained run and its sensitivity."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "config.yaml").write_text(CONFIG)
    run = folder / "lauf é"
    words = ["train", prepared, "--method", "transformer", "--config", folder / "config.yaml", "--save-dir", run]
    assert main.main([str(word) for word in words]) == 0
    assert main.main(["sensitivity", str(run), "--batches", "2", "--cpu"]) == 0
    return run


@pytest.fixture(scope="module")
def translations(measured) -> Iterator[list[str]]:
    """Names of the folders into which was translated; from now on by forks that have imported fairseq already."""
    folders = []

    def run_logged(words: list[str], output: Path, errors: Path, *, follow, dies_with_us) -> int:
        folders.append(output.parent.name)
        done = command("generate", *words[1:])
        output.write_text(done.stdout)
        errors.write_text(done.stderr)
        return done.returncode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translation.processes, "run_logged", run_logged)
        yield folders


@pytest.fixture
def translated(translations) -> list[str]:
    """The same, of one test."""
    translations.clear()
    return translations


@pytest.fixture(scope="module")
def pruned(measured, translations) -> Path:
    """The same with its pruning curve, in the order of sensitivity and at random."""
    words = [str(measured), *RATIOS, "--controls", "random", "--save", str(measured / "saved"), "--cpu"]
    assert main.main(["prune", *words]) == 0
    return measured


@pytest.fixture
def run_copy(pruned, tmp_path) -> Path:
    return shutil.copytree(pruned, tmp_path / "copy")


def here(capsys, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main.main(["prune", *map(str, words), "--cpu"])
    return status, *capsys.readouterr()


def refused(capsys, *words: object) -> str:
    status, out, said = here(capsys, *words)
    assert (status, out, said.count("\n")) == (2, "", 1)
    return said.removeprefix("intra-distillation prune: error: ").removesuffix("\n")


def curve(run: Path) -> dict:
    return json.loads((run / "analysis" / "pruning.json").read_text())


def test_the_curve(pruned):
    record = curve(pruned)
    assert record["checkpoint_sha256"] == file_sha256(pruned / "checkpoint_best.pt")
    assert record["sensitivity_sha256"] == file_sha256(pruned / "analysis" / "sensitivity_best.npz")
    model = loading.load(pruned).model
    total = sum(value.numel() for name, value in model.named_parameters() if "layer_norm" not in name)
    assert record["prunable"] == total
    found = [(point["order"], point["ratio"], point["pruned"]) for point in record["points"]]
    assert found == [
        ("sensitivity", 0.0, 0),
        ("sensitivity", 0.25, total // 4),
        ("sensitivity", 0.5, total // 2),
        ("random", 0.25, total // 4),
        ("random", 0.5, total // 2),
    ]
    folders = {path.name for path in (pruned / "analysis" / "pruning").iterdir()}
    assert folders == {"unpruned", "sensitivity_0.25", "sensitivity_0.5", "random_0.25", "random_0.5"}
    assert not list((pruned / "analysis").rglob("*.pt"))
    assert len((pruned / "analysis" / "pruning.tsv").read_text().split("\n")) == 8
    assert (pruned / "analysis" / "pruning.png").exists()


def test_with_nothing_pruned_it_scores_as_evaluate_does(run_copy):
    assert main.main(["evaluate", str(run_copy), "--cpu"]) == 0
    score = json.loads((run_copy / "eval" / "best" / "score.json").read_text())
    intact = curve(run_copy)["points"][0]
    assert {name: intact[name] for name in ("bleu", "bleu_signature", "chrf")} == {
        name: score[name] for name in ("bleu", "bleu_signature", "chrf")
    }
    assert score["translation_seconds"] > 0 and score["sentences_per_second"] > 0 and score["tokens_per_second"] > 0
    texts = [run_copy / name / "hypotheses.txt" for name in ("eval/best", "analysis/pruning/unpruned")]
    assert texts[0].read_bytes() == texts[1].read_bytes()


def test_only_what_is_missing_is_measured(run_copy, capsys, translated):
    words = (run_copy, *RATIOS, "--controls", "random")
    before = curve(run_copy)
    status, table, said = here(capsys, *words)
    assert (status, translated) == (0, []) and "every score is known already (--force measures again)" in said
    assert table.startswith("| ratio | pruned | sensitivity | change | random | change |\n")
    assert curve(run_copy) == before

    lost = before["points"].pop(4)
    (run_copy / "analysis" / "pruning.json").write_text(json.dumps(before))
    status, _, said = here(capsys, *words)
    assert (status, translated) == (0, ["random_0.5"])
    again = curve(run_copy)["points"][4]
    assert {**again, "seconds": 0} == {**lost, "seconds": 0}
    assert f"random 0.5: {lost['pruned']:,} of {before['prunable']:,} set to zero, BLEU {lost['bleu']:.2f}" in said


def test_more_ratios_and_orders(run_copy, capsys, translated):
    before = curve(run_copy)["points"]
    status, table, _ = here(capsys, run_copy, "--ratios", "0", "0.75", "0.25", "--controls", "magnitude")
    assert (status, sorted(translated)) == (0, ["magnitude_0.25", "magnitude_0.75", "sensitivity_0.75"])
    assert all(point in curve(run_copy)["points"] for point in before)
    assert "| 0.75  " in table and "magnitude" in table and "random" in table


def test_no_controls(run_copy, capsys, tmp_path, translated):
    status, table, _ = here(capsys, run_copy, "--ratios", "1", "--controls", "--out", tmp_path / "out")
    assert (status, translated) == (0, ["sensitivity_1"])
    assert table.startswith("| ratio | pruned | sensitivity | change |\n")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".prune.lock",
        "pruning",
        "pruning.json",
        "pruning.tsv",
    }


def test_what_was_saved(pruned):
    """Fewest changes: the least sensitive entries are zero, everything else is as it was."""
    names = {path.name for path in (pruned / "saved").iterdir()}
    assert names == {f"pruned_{order}_{ratio}.pt" for order in ("sensitivity", "random") for ratio in ("0.25", "0.5")}
    before = checkpoints.load(pruned / "checkpoint_best.pt")["model"]
    state = checkpoints.load(pruned / "saved" / "pruned_sensitivity_0.5.pt")
    assert "last_optimizer_state" not in state and state["cfg"]["task"]["_name"] == "translation_intra_distillation"
    model = loading.load(pruned).model
    zero, left, already = [], [], 0
    with np.load(pruned / "analysis" / "sensitivity_best.npz") as arrays:
        for name, _ in model.named_parameters():
            now, old, values = state["model"][name], before[name], torch.from_numpy(arrays[name])
            assert torch.where(now == 0, old, now).equal(old)
            if "layer_norm" in name:
                assert now.equal(old)
            else:
                zero.append(values[(now == 0) & (old != 0)])
                left.append(values[now != 0])
                already += int((old == 0).sum())
    assert torch.cat(zero).max() <= torch.cat(left).min()
    most = curve(pruned)["prunable"] - curve(pruned)["prunable"] // 2
    assert most - already <= len(torch.cat(left)) <= most


def test_a_pruned_checkpoint_opens_like_any_other(pruned, prepared):
    loaded = loading.load(pruned / "saved" / "pruned_sensitivity_0.5.pt", data=prepared)
    assert (loaded.model.encoder.embed_tokens.weight == 0).any()
    assert loaded.model.decoder.output_projection.weight is loaded.model.encoder.embed_tokens.weight


def test_fairseq_without_the_plugin_translates_the_same(pruned, prepared):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = ["--task", "translation", "--source-lang", "xx", "--target-lang", "en", "--gen-subset", "test", "--cpu"]
    words += ["--beam", "2", "--max-len-a", "1.5", "--max-len-b", "5", "--required-batch-size-multiple", "1"]
    words += ["--post-process", "sentencepiece", "--scoring", "sacrebleu", "--batch-size", "100", "--num-workers", "0"]
    program = "import sys; from fairseq_cli.generate import cli_main; cli_main(); "
    program += "assert not [name for name in sys.modules if name.startswith('intra_distillation')]"
    done = subprocess.run(
        [sys.executable, "-c", program, prepared / "bin", "--path", pruned / "saved/pruned_sensitivity_0.5.pt", *words],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {int(line[2:].split("\t")[0]): line.split("\t")[2] for line in done.stdout.split("\n") if line[:2] == "D-"}
    scored = (pruned / "analysis" / "pruning" / "sensitivity_0.5" / "hypotheses.txt").read_text().split("\n")
    assert [found[number] for number in sorted(found)] == scored[:-1] and len(found) == 11


def test_a_failed_translation_ends_the_command(run_copy, capsys, monkeypatch):
    def fail(command, output, errors, **kwargs):
        errors.write_text("first\nthe reason\n")
        return 137

    monkeypatch.setattr(translation.processes, "run_logged", fail)
    before = curve(run_copy)
    status, _, said = here(capsys, run_copy, "--ratios", "0.3", "--controls")
    folder = run_copy / "analysis" / "pruning" / "sensitivity_0.3"
    assert status == 2 and said == (
        "first\nthe reason\nintra-distillation prune: error: fairseq-generate ended with SIGKILL (too little memory is "
        f"the usual reason); its log, of which this is the end: {folder}/generate.log\n"
    )
    assert curve(run_copy) == before and not list(folder.glob(".*"))


@pytest.mark.parametrize("ratio", ["1.2", "-0.1", "nan"])
def test_a_ratio_outside_0_to_1(pruned, capsys, ratio):
    said = refused(capsys, pruned, "--ratios", "0.1", ratio)
    assert said == f"--ratios has '{ratio}': allowed are shares of the parameters, from 0 to 1, as in 0.3"


def test_another_checkpoint_needs_another_sensitivity(run_copy, capsys):
    path = run_copy / "checkpoint_best.pt"
    old = file_sha256(path)
    state = checkpoints.load(path)
    checkpoints.write({**state, "extra_state": {**state["extra_state"], "note": 1}}, path)
    file = run_copy / "analysis" / "sensitivity_best.npz"
    assert refused(capsys, run_copy) == (
        f"'{file}' was measured on another checkpoint (checkpoint_best.pt, sha256 {old[:12]}) than '{path}' (sha256 "
        f"{file_sha256(path)[:12]}): measure this one first"
    )
    record = json.loads(file.with_suffix(".json").read_text())
    file.with_suffix(".json").write_text(json.dumps({**record, "checkpoint_sha256": file_sha256(path)}))
    said = refused(capsys, run_copy)
    assert "pruning.json' was made with other settings: the checkpoint's sha256 is " in said


def test_other_settings(run_copy, capsys, tmp_path, translated):
    said = refused(capsys, run_copy, "--seed", "2")
    assert said == (
        f"'{run_copy}/analysis/pruning.json' was made with other settings: --seed is 2 (there 1); repeat them to go on, "
        "choose another --out, or begin again with --force"
    )
    (tmp_path / "file").touch()
    before = curve(run_copy)
    refused(capsys, run_copy, "--seed", "2", "--force", "--save", tmp_path / "file")
    assert curve(run_copy) == before and (run_copy / "analysis" / "pruning" / "random_0.25").exists()
    status, _, said = here(capsys, run_copy, "--seed", "2", "--force", "--ratios", "0.5", "--controls", "random")
    assert (status, "every score is known" in said) == (0, False)
    assert translated == ["sensitivity_0.5", "random_0.5"] and curve(run_copy)["seed"] == 2
    left = {"unpruned", "sensitivity_0.25", *translated}  # a seed decides the random order alone
    assert {path.name for path in (run_copy / "analysis" / "pruning").iterdir()} == left
    assert len(curve(run_copy)["points"]) == 4


def test_no_sensitivity(run_copy, capsys):
    file = run_copy / "analysis" / "sensitivity_last.npz"
    assert refused(capsys, run_copy, "--checkpoint", "last") == (
        f"sensitivity file '{file}' does not exist: make one with  intra-distillation sensitivity RUN_DIR --checkpoint "
        "last, or name one with --sensitivity"
    )
    file = run_copy / "run.json"
    assert refused(capsys, run_copy, "--sensitivity", file) == (
        f"'{file}' is not a sensitivity file (npz with an array per parameter): make one with  intra-distillation "
        "sensitivity RUN_DIR"
    )


def test_no_run_and_no_test_set(pruned, prepared, tmp_path, capsys):
    assert refused(capsys, tmp_path / "none") == (
        f"'{tmp_path}/none' does not exist: give a run folder of train.sh or a checkpoint file"
    )
    checkpoint = Path(shutil.copy(pruned / "checkpoint_best.pt", tmp_path))
    assert refused(capsys, checkpoint) == (
        f"'{checkpoint}' is not in a run folder, which would name its test set: give --data a folder made by one of the "
        "prepare scripts"
    )
    sensitivity = pruned / "analysis" / "sensitivity_best.npz"
    status, table, _ = here(
        capsys, checkpoint, "--data", prepared, "--sensitivity", sensitivity, "--ratios", "0.5", "--controls"
    )
    assert status == 0 and table.count("\n") == 3
    (tmp_path / "file").touch()
    assert refused(capsys, pruned, "--save", tmp_path / "file") == (
        f"--save '{tmp_path}/file' cannot be made (File exists): give another folder"
    )
