"""Every command that writes into a folder: while another process holds it, the second one says who, and stops."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_prepare_wmt17 import FLAGS as WMT17_FLAGS
from test_prepare_wmt17 import write_archives
from tiny_corpus import write_corpus

from intra_distillation_fairseq.cli import main
from intra_distillation_fairseq.experiments.prepared import open_prepared
from intra_distillation_fairseq.files import lock

ROOT = Path(__file__).resolve().parents[2]
WHO = "somebody (process 4711)"
CONFIG = """
train: {arch: transformer_small, max-update: 4}
methods:
  transformer: {criterion: label_smoothed_cross_entropy}
  id_x: {criterion: intra_distillation, id-num-passes: 2}
evaluate: {beam: 1}
"""
TRAIN = "--method id_x --config {here}/tiny.yaml"
# command and arguments -> (lock file, what is locked); {here} is the folder of all.
COMMANDS = {
    "prepare-parallel --train {here}/train --valid {here}/valid --test {here}/test --src xx --tgt en --out {here}/out": (
        "out/.lock",
        "the data folder '{here}/out'",
    ),
    "prepare-iwslt14 --langs de --archive {here}/2014-01.tgz --out {here}/out": (
        "out/de-en/.lock",
        "the data folder '{here}/out/de-en'",
    ),
    "prepare-wmt17 --archives {here}/archives --out {here}/out " + " ".join(map(str, WMT17_FLAGS)): (
        "out/en-de/.lock",
        "the data folder '{here}/out/en-de'",
    ),
    f"train {{here}}/data {TRAIN} --save-dir {{here}}/out": ("out/.train.lock", "the run folder '{here}/out'"),
    "evaluate {here}/run --cpu": ("run/eval/best/.lock", "the evaluation folder '{here}/run/eval/best'"),
    "reproduce --table 2 --langs de --methods id_x --config {here}/tiny.yaml --archive {here}/2014-01.tgz "
    "--data-root {here}/new --results {here}/out -- --cpu": (
        "out/.reproduce.lock",
        "the results folder '{here}/out'",
    ),
    "self-distill {here}/data --config {here}/tiny.yaml --results {here}/out": (
        "out/.self_distill.lock",
        "the results folder '{here}/out'",
    ),
    "ablation passes {here}/data --config {here}/tiny.yaml --results {here}/out": (
        "out/.ablation.lock",
        "the results folder '{here}/out'",
    ),
    "sensitivity {here}/run": ("run/analysis/.sensitivity_best.lock", "the folder of the measurement '{here}/run/analysis'"),
    "prune {here}/run": ("run/analysis/.prune.lock", "the folder of the pruning curve '{here}/run/analysis'"),
    "layers {here}/run --cpu": ("run/analysis/.layers.lock", "the analysis folder '{here}/run/analysis'"),
}  # fmt: skip


@pytest.fixture
def here(tmp_path) -> Path:
    """Just enough of everything for a command to come to its lock."""
    (tmp_path / "tiny.yaml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "2014-01.tgz").write_bytes(b"")
    write_archives(tmp_path / "archives")
    write_corpus(tmp_path, {"train": 3, "valid": 3, "test": 3})
    (tmp_path / "data" / "bin").mkdir(parents=True)
    manifest = {"format": 1, "source_lang": "xx", "target_lang": "en", "splits": {}}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "data" / "raw").mkdir()
    (tmp_path / "data" / "raw" / "test.en").write_text("x\n", encoding="utf-8")
    names = [f"{split}.xx-en.{lang}.{end}" for split in ("train", "valid", "test") for lang in ("xx", "en")
             for end in ("bin", "idx")]  # fmt: skip
    for name in ("dict.xx.txt", "dict.en.txt", *names):
        (tmp_path / "data" / "bin" / name).write_text("x", encoding="utf-8")
    data = open_prepared(tmp_path / "data", ("test",))
    (tmp_path / "run" / "analysis").mkdir(parents=True)
    record = {"format": 1, "data": str(data.folder), "dictionary_digest": data.dictionary_digest}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    torch.save({"model": {}}, tmp_path / "run" / "checkpoint_best.pt")
    return tmp_path


def test_every_command_that_locks_is_here():
    """A new command needs a line above, or a reason not to: these write single files, whole, that can be made again."""
    harmless = {"table", "figure", "truncate", "demo-archive", "demo-report", "user-dir", "doctor"}
    assert {words.split()[0] for words in COMMANDS} == main.COMMANDS.keys() - harmless


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words.split()[0])
def test_the_second_is_told_of_the_first(words, here, capsys):
    file, what = COMMANDS[words]
    with lock(here / file, "it") as held:
        held.tell(WHO)
        before = sorted(here.rglob("*"))
        status, said = main.main([word.format(here=here) for word in words.split()]), capsys.readouterr().err
    assert status == 2, said
    assert f"error: {what.format(here=here)} is in use by {WHO} on " in said
    assert said.endswith(": wait for it, or stop it first\n")
    assert {path.name for path in here.rglob("*")} - {path.name for path in before} <= {
        "download",
        ".lock",
        "known.json",
    }


def test_a_second_demo_is_told_of_the_first(here):
    scripts = here / "repository" / "scripts"
    shutil.copytree(ROOT / "scripts", scripts)
    (scripts / "setup.sh").write_text("", encoding="utf-8")
    with lock(here / "demo" / "data" / "de-en" / ".lock", "it") as held:
        held.tell(WHO)
        done = subprocess.run(
            ["bash", scripts / "demo.sh", "--quick", "--out", here / "demo"],
            env={**os.environ, "ID_VENV": str(Path(sys.executable).parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert f"error: the data folder '{here}/demo/data/de-en' is in use by {WHO} on " in done.stderr


def test_another_process_of_a_training_is_kept_out_by_its_like(here, capsys):
    """The first one is kept out by the lock above, the second by its own, and does not write into the first's log."""
    words = f"train {here}/data {TRAIN.format(here=here)} --save-dir {here}/out -- --distributed-world-size 2"
    words += " --distributed-rank 1 --distributed-no-spawn --distributed-init-method tcp://127.0.0.1:1"
    with lock(here / "out" / ".train.rank1.lock", "it") as held:
        held.tell(WHO)
        status, said = main.main(words.split()), capsys.readouterr().err
    assert status == 2 and f"error: the run folder '{here}/out' is in use by {WHO} on " in said
    assert not (here / "out" / "train.rank1.log").exists()
