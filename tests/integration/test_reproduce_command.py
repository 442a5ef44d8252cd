"""scripts/reproduce_table2.sh from an archive to the table through the real commands, stopped once, with a cell that fails."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from fairseq_commands import TINY_RECIPE

from intra_distillation_fairseq.cli import main
from intra_distillation_fairseq.experiments import logs
from intra_distillation_fairseq.experiments.reproduction import INTRA_DISTILLATION

ROOT = Path(__file__).resolve().parents[2]
REPRODUCE = [*INTRA_DISTILLATION, "reproduce", "--table", "2"]
# The first training does not end by itself before the test stops it, however loaded the machine is.
ENDLESS = 20_000
CONFIG = (
    TINY_RECIPE
    + f"""
  optimizer: adam
  lr: 0.01
  max-tokens: 200
  max-update: {ENDLESS}
  save-interval-updates: 40
  no-epoch-checkpoints: true
  num-workers: 0
  log-interval: 5
methods:
  transformer: {{criterion: label_smoothed_cross_entropy}}
  rdrop: {{criterion: intra_distillation, tpu: true}}
  id_x: {{criterion: intra_distillation, arch: transformer_small, id-num-passes: 2, id-alpha: 5, id-p: 5, id-q: 10}}
evaluate: {{beam: 2, max-len-a: 1.2, max-len-b: 5, lowercase: true}}
"""
)


def words(folder: Path, methods: str) -> list[str]:
    archive, out = folder / "2014-01.tgz", folder / "runs"
    given = ["--archive", archive, "--data-root", folder / "data", "--config", folder / "tiny.yaml", "--results", out]
    given += ["--langs", "de", "--methods", methods, "--prepare-flags=--vocab-size 150", "--", "--cpu"]
    return [*REPRODUCE, *map(str, given)]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, int, str]:
    """Told to stop when the first training had saved something: folder, exit status, standard error."""
    folder = tmp_path_factory.mktemp("reproduce") / "mit Leer é"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(CONFIG, encoding="utf-8")
    archive = ["demo-archive", "--out", str(folder / "2014-01.tgz"), "--train", "200", "--test", "12"]
    subprocess.run([*INTRA_DISTILLATION, *archive], check=True, capture_output=True)
    harness = subprocess.Popen(words(folder, "id_x rdrop transformer"), stderr=subprocess.PIPE, text=True)
    log, end = folder / "runs" / "de-en" / "id_x" / "seed1" / "train.log", time.monotonic() + 600
    try:
        while logs.read_log(log).saved < 40:
            assert time.monotonic() < end and harness.poll() is None
            with contextlib.suppress(subprocess.TimeoutExpired):
                harness.wait(0.1)
    finally:
        harness.terminate()
        said = harness.communicate(timeout=300)[1]
    return folder, harness.returncode, said


@pytest.fixture(scope="module")
def gone_on(stopped) -> tuple[Path, subprocess.CompletedProcess, int]:
    """The same command, as if it had been given an end soon after the stop from the beginning: also that end."""
    folder = stopped[0]
    cell = folder / "runs" / "de-en" / "id_x" / "seed1"
    end = logs.read_log(cell / "train.log").saved + 10
    for path, text in ((folder / "tiny.yaml", "max-update: {}"), (cell / "run.json", '"max-update": {}')):
        content = path.read_text(encoding="utf-8")
        assert content.count(text.format(ENDLESS)) == 1
        path.write_text(content.replace(text.format(ENDLESS), text.format(end)), encoding="utf-8")
    return folder, subprocess.run(words(folder, "id_x rdrop transformer"), capture_output=True, text=True), end


def test_a_stop_is_passed_on_to_the_trainings(stopped):
    folder, status, said = stopped
    assert status == 143, said
    assert "stopped by SIGTERM, 3 cells left: the same command goes on" in said
    cell = folder / "runs" / "de-en" / "id_x" / "seed1"
    assert "stopped by a signal at update" in (cell / "cell.log").read_text(encoding="utf-8")
    assert not (cell / "finished.json").exists() and not (folder / "runs" / "table.md").exists()


def test_the_same_command_goes_on_past_a_failure(gone_on):
    folder, done, end = gone_on
    assert done.returncode == 1, done.stderr
    assert (
        "error: de-en/rdrop/seed1: train failed: intra-distillation train: error: '--tpu' cannot be given"
        in done.stderr
    )
    assert "1 of 3 cells failed: the same command tries them again" in done.stderr
    assert "prepare de-en" not in done.stderr  # it was made before the stop
    cells = folder / "runs" / "de-en"
    launches = json.loads((cells / "id_x" / "seed1" / "environment.json").read_text(encoding="utf-8"))["launches"]
    assert len(launches) == 2
    for method in ("transformer", "id_x"):
        finished = json.loads((cells / method / "seed1" / "finished.json").read_text(encoding="utf-8"))
        assert (finished["updates"], finished["peak_memory_of"]) == (end, "cpu")
        assert finished["peak_memory_mib"] > 100 and finished["tokens_per_second"] > 0
        # 151 types in three tables of width 16, and one layer on each side; as in docs/method.md with d 16, f 32.
        attention, ffn, norm, d = 4 * (16 * 16 + 16), (16 * 32 + 32) + (32 * 16 + 16), 2 * 16, 16
        assert finished["parameters"] == 3 * 151 * d + (attention + ffn + 2 * norm) + (2 * attention + ffn + 3 * norm)


def test_the_table(gone_on):
    folder, done, _ = gone_on
    assert done.stdout == (folder / "runs" / "table.md").read_text(encoding="utf-8")
    assert done.stdout.startswith("# BLEU on iwslt14_de_en\n")
    assert "without published numbers, as this is not the text of table 2: de-en (iwslt14_de_en, " in done.stdout
    assert "- de-en/rdrop/seed1: train failed: intra-distillation train: error: '--tpu' cannot be given" in done.stdout
    table = json.loads((folder / "runs" / "table.json").read_text(encoding="utf-8"))
    assert table["methods"] == ["transformer", "rdrop", "id_x"]
    for method in ("transformer", "id_x"):
        score = folder / "runs" / "de-en" / method / "seed1" / "eval" / "best" / "score.json"
        assert table["bleu"][method]["de-en"]["mean"] == json.loads(score.read_text(encoding="utf-8"))["bleu"]
    assert 0 < table["bleu"]["id_x"]["de-en"]["p"]["1"] <= 1
    assert (folder / "runs" / "table.png").exists() and (folder / "runs" / "table.pdf").exists()


def test_what_is_done_keeps_the_best_and_the_last_checkpoint(gone_on, capsys):
    """And the commands take it for finished and evaluated still."""
    folder, done, _ = gone_on
    cell = folder / "runs" / "de-en" / "id_x" / "seed1"
    assert sorted(path.name for path in cell.glob("*.pt")) == ["checkpoint_best.pt", "checkpoint_last.pt"]
    assert "de-en/id_x/seed1: removed " in done.stderr
    train = [
        "train",
        folder / "data" / "de-en",
        "--method",
        "id_x",
        "--config",
        folder / "tiny.yaml",
        "--save-dir",
        cell,
    ]
    for command, message in (([*train, "--", "--cpu"], "already finished"), (["evaluate", cell], "already evaluated")):
        status, said = main.main([*map(str, command)]), capsys.readouterr().err
        assert (status, message in said) == (0, True), said


def test_a_third_call_has_nothing_to_do(gone_on):
    folder = gone_on[0]
    models = [folder / "runs" / "de-en" / method / "seed1" / "checkpoint_last.pt" for method in ("transformer", "id_x")]
    before = [path.stat().st_mtime_ns for path in models]
    done = subprocess.run(words(folder, "id_x transformer"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all 2 cells are done" in done.stderr and "start" not in done.stderr
    assert [path.stat().st_mtime_ns for path in models] == before


@pytest.mark.parametrize("number", ["2", "3"])
def test_the_scripts_install_first_and_pass_their_arguments_on(tmp_path, number):
    scripts, command = tmp_path / "scripts", tmp_path / ".venv" / "bin" / "intra-distillation"
    (scripts / "lib").mkdir(parents=True)
    command.parent.mkdir(parents=True)
    name = f"reproduce_table{number}.sh"
    for file in (name, "lib/common.sh"):
        shutil.copy(ROOT / "scripts" / file, scripts / file)
    # The command is there only once the installation has run.
    (scripts / "setup.sh").write_text(
        f"printf '#!/bin/sh\\nprintf \"%%s|\" \"$@\"\\n' >'{command}'; chmod +x '{command}'\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ID_VENV"}
    flags = ["--methods", "transformer id_x", "--", "--lr", "1"]
    done = subprocess.run(["bash", scripts / name, *flags], capture_output=True, text=True, env=environment)
    assert done.stdout == f"reproduce|--table|{number}|--methods|transformer id_x|--|--lr|1|", done.stderr
