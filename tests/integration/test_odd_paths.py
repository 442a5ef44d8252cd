"""Every script, with everything it reads and writes in folders of odd names, and in the C locale."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fairseq_commands import TINY_RECIPE
from test_prepare_wmt17 import FLAGS as WMT17_FLAGS
from test_prepare_wmt17 import write_archives
from tiny_corpus import write_corpus

from intra_distillation_fairseq.cli import main

ROOT = Path(__file__).resolve().parents[2]
# All that a shell, a glob, hydra, omegaconf, argparse or the formatting of a string takes for something else than a
# letter, ending in what would escape a quote. A colon cannot be: fairseq splits paths there.
ODD = 'Übung 数据 é it\'s "q" $HOME `x` $(y) [a]{b} 50%s=x&;#,~!(*)?|<> \\'
CONFIG = (
    TINY_RECIPE
    + """
  optimizer: adam
  lr: 0.01
  max-tokens: 400
  max-update: 4
  no-epoch-checkpoints: true
  num-workers: 0
  log-interval: 2
methods:
  transformer: {criterion: label_smoothed_cross_entropy}
  id_x: {criterion: intra_distillation, id-num-passes: 2, id-alpha: 5, id-p: 5, id-q: 10}
evaluate: {beam: 1, max-len-a: 1, max-len-b: 2, lowercase: true}
"""
)
CPU = ["--", "--cpu"]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """script(name, *arguments) runs a script of a copy of the repository in such a folder, where setup.sh does nothing."""
    folder = tmp_path_factory.mktemp("odd paths") / ODD
    shutil.copytree(ROOT / "scripts", folder / "repository" / "scripts")
    (folder / "repository" / "scripts" / "setup.sh").write_text("", encoding="utf-8")
    for name in ("temporary", "home"):
        (folder / name).mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("LANG", "PYTHONUTF8")}
    environment |= {
        "TMPDIR": str(folder / "temporary"),
        "HOME": str(folder / "home"),
        "LC_ALL": "C",
        "ID_VENV": str(Path(sys.executable).parents[1]),
        "OMP_NUM_THREADS": "1",
    }

    def run(name: str, *arguments: object) -> str:
        words = ["bash", "repository/scripts/" + name, *map(str, arguments)]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def table(script) -> Path:
    """Table 2 of one run, from an archive of the demo; its paths begin with a dash where they can."""
    (script.folder / "-50%=.yaml").write_text(CONFIG, encoding="utf-8")
    archive = ["demo-archive", "--out", str(script.folder / "-2014 é.tgz"), "--train", "200", "--test", "12"]
    assert main.main(archive) == 0
    flags = ["--archive=-2014 é.tgz", "--data-root=-data é", "--config=-50%=.yaml", "--results=-runs é"]
    flags += ["--langs", "de", "--methods", "transformer", "--prepare-flags=--vocab-size 150"]
    said = script("reproduce_table2.sh", *flags, *CPU)
    assert "table: -runs é/table.md" in said
    return script.folder / "-runs é"


def test_table(script, table):
    assert "1 of 1" in (table / "table.md").read_text(encoding="utf-8")
    record = json.loads((table / "de-en" / "transformer" / "seed1" / "run.json").read_text(encoding="utf-8"))
    assert record["data"] == str(script.folder / "-data é" / "de-en")


def test_the_scripts_of_one_step_take_it_up(script, table):
    """What the table's harness has done, its own way of naming the folders apart, is theirs."""
    flags = ["--archive=-2014 é.tgz", "--out=-data é", "--langs", "de", "--vocab-size", 150]
    assert "(nothing to do)" in script("prepare_iwslt14.sh", *flags)
    run = "-runs é/de-en/transformer/seed1"
    method = ["--method", "transformer", "--config=-50%=.yaml", f"--save-dir={run}"]
    assert "already finished" in script("train.sh", "./-data é/de-en", *method, *CPU)
    assert "already evaluated" in script("evaluate.sh", f"./{run}", "--cpu")
    assert "BLEU" in script("evaluate.sh", f"./{run}", "--cpu", "--checkpoint", "last")


def test_own_text(script):
    text = script.folder / "-text é"
    text.mkdir()
    write_corpus(text, {"train": 200, "valid": 20, "test": 12})
    flags = [f"--{split}=-text é/{split}" for split in ("train", "valid", "test")]
    flags += ["--src", "xx", "--tgt", "en", "--out=-own é", "--vocab-size", 35, "--jobs", 2]
    assert "(made: clean, subwords, encode, binarise)" in script("prepare_parallel.sh", *flags)
    manifest = json.loads((script.folder / "-own é" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["corpus"] == "-own é"


def test_wmt17(script):
    write_archives(script.folder / "-archives é")
    said = script("prepare_wmt17.sh", "--archives=-archives é", "--out=-wmt17 é", *WMT17_FLAGS)
    assert "binarise" in said and (script.folder / "-wmt17 é" / "en-de" / "manifest.json").exists()


def test_self_distillation(script, table):
    """The path of the teacher is a flag of fairseq."""
    flags = ["--config=-50%=.yaml", "--results=-rounds é", "--rounds", 1, "--skip-sensitivity"]
    flags.append("--baseline=-runs é/de-en/transformer/seed1")
    assert "table: -rounds é/table1.md" in script("self_distill.sh", "./-data é/de-en", *flags, *CPU)


@pytest.mark.parametrize(("kind", "options"), [("alpha", []), ("passes", ["--passes", 2])])
def test_ablation(script, table, full, kind, options):
    if not full:
        pytest.skip("two more runs of the commands above: only with --full")
    flags = ["--config=-50%=.yaml", "--results=-ablation é", "--no-baseline", *options]
    assert f"table: -ablation é/ablation_{kind}.md" in script(f"ablation_{kind}.sh", "./-data é/de-en", *flags, *CPU)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "scripts").glob("*.sh")))
def test_help(script, name):
    if name not in ("setup.sh", "test.sh"):  # the first does nothing here, the second has no help
        assert "usage: " in script(name, "-h")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a:b", "':', where fairseq would split it into several paths"),
        ("${HOME}", "'${', which fairseq would read as the name of a setting"),
        ("a\nb", "a line break, which logs and records name files without"),
        (os.fsdecode(b"\xff"), "bytes that are not UTF-8, which no record could hold"),
    ],
)
def test_what_fairseq_would_not_take_for_a_path_is_refused(name, why, tmp_path, capsys):
    odd = tmp_path / name
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    (tmp_path / "archive").touch()
    data = tmp_path / "data"
    (data / "bin").mkdir(parents=True)
    manifest = {"format": 1, "source_lang": "xx", "target_lang": "en", "splits": {}}
    (data / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for file in ("dict.xx.txt", "dict.en.txt", *(f"{split}.xx-en.{lang}.{end}" for split in ("train", "valid", "test")
                 for lang in ("xx", "en") for end in ("bin", "idx"))):  # fmt: skip
        (data / "bin" / file).write_text("x", encoding="utf-8")
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"format": 1}', encoding="utf-8")
    shutil.copytree(data, odd / "data")
    shutil.copytree(run, odd / "run")
    before = sorted(tmp_path.rglob("*"))
    text = [f"--{split}={tmp_path / split}" for split in ("train", "valid", "test")]
    train = ["--method", "id_x", "--config", config]
    reproduce = ["reproduce", "--table", "2", "--langs", "de", "--methods", "id_x", "--config", config]
    reproduce += ["--archive", tmp_path / "archive"]
    shown = name.replace("\n", "\\n").replace("\udcff", "\\udcff")
    for what, path, words in (
        ("data folder", "data", ["train", odd / "data", *train, "--save-dir", run]),
        ("--save-dir", "new", ["train", data, *train, "--save-dir", odd / "new"]),
        ("RUN_DIR", "run", ["evaluate", odd / "run"]),
        ("--out", "new", ["prepare-parallel", *text, "--src", "xx", "--tgt", "en", "--out", odd / "new"]),
        ("--out", "new", ["prepare-iwslt14", "--archive", tmp_path / "archive", "--out", odd / "new"]),
        ("--out", "new", ["prepare-wmt17", "--archives", tmp_path, "--out", odd / "new"]),
        ("--results", "new", [*reproduce, "--data-root", tmp_path, "--results", odd / "new"]),
        ("--data-root", "new", [*reproduce, "--data-root", odd / "new", "--results", tmp_path]),
        ("--results", "new", ["self-distill", data, "--config", config, "--results", odd / "new"]),
        ("--results", "new", ["ablation", "passes", data, "--config", config, "--results", odd / "new"]),
    ):
        status, said = main.main([str(word) for word in words]), capsys.readouterr().err
        expected = f"error: {what} '{tmp_path}/{shown}/{path}' has {why}: give another one, or rename it\n"
        assert (status, said.endswith(expected), said.count("\n")) == (2, True, 1), said
    assert sorted(tmp_path.rglob("*")) == before
