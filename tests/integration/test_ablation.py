"""`intra-distillation ablation` through the real commands: beside a run made by hand, past a failure, and once more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fairseq_commands import TINY_RECIPE

from intra_distillation_fairseq.cli import main
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import run_series
from intra_distillation_fairseq.experiments.ablations import Variant, alpha_ablation, passes_ablation
from intra_distillation_fairseq.experiments.recipes import read_recipe
from intra_distillation_fairseq.experiments.reproduction import INTRA_DISTILLATION
from intra_distillation_fairseq.files import lock

ROOT = Path(__file__).resolve().parents[2]
CONFIG = (
    TINY_RECIPE
    + """
  optimizer: adam
  lr: 0.01
  max-tokens: 200
  max-update: 12
  validate-interval-updates: 4
  no-epoch-checkpoints: true
  num-workers: 0
  log-interval: 2
methods:
  transformer: {criterion: label_smoothed_cross_entropy}
  id_x: {criterion: intra_distillation, id-num-passes: 2, id-alpha: 5, id-p: 5, id-q: 10}
  rdrop: {criterion: intra_distillation, id-num-passes: 2, id-alpha: 5, id-alpha-schedule: constant}
  weak: {criterion: intra_distillation, id-alpha: 0.5}
evaluate: {beam: 2, max-len-a: 1.2, max-len-b: 5}
"""
)


def ours(*words: object, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([*INTRA_DISTILLATION, *map(str, words)], capture_output=True, text=True, **kwargs)


def write_prepared(folder: Path, tiny_data: Path) -> Path:
    """A data folder as the prepare scripts make it, of the tiny corpus."""
    data = folder / "data é"
    shutil.copytree(tiny_data, data / "bin")
    (data / "raw").mkdir()
    for path in tiny_data.parent.glob("t*.*"):
        shutil.copy(path, data / "raw" / path.name)
    (data / "manifest.json").write_text(json.dumps({"format": 1, "source_lang": "xx", "target_lang": "en"}))
    return data


def ablation(folder: Path, kind: str, *words: object) -> list[str]:
    given = [folder / "data é", "--config", folder / "tiny.yaml", "--results", folder / "runs", *words]
    return ["ablation", kind, *map(str, given)]


def stamps(folder: Path) -> dict[str, int]:
    """When each model and score was written."""
    files = [*folder.rglob("*.pt"), *folder.rglob("score.json"), *folder.rglob("environment.json")]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return read_recipe(path)


# -- what is run


def test_names_and_flags_of_passes(recipe):
    variants = passes_ablation(recipe, "id_x", [2, 3, 6, 3], [], baseline=True).variants
    assert variants == (
        Variant("transformer", "transformer", (), "1"),
        Variant("id_x", "id_x", (), "2"),
        Variant("id_x_k3", "id_x", ("--id-num-passes", "3"), "3"),
        Variant("id_x_k6", "id_x", ("--id-num-passes", "6"), "6"),
    )
    assert [one.name for one in passes_ablation(recipe, "weak", [2, 3], [], baseline=False).variants] == [
        "weak_k2",
        "weak",
    ]


def test_names_and_flags_of_alpha(recipe):
    assert alpha_ablation(recipe, "id_x", [], baseline=True).variants == (
        Variant("transformer", "transformer", (), "-"),
        Variant("id_x", "id_x", (), "adaptive"),
        Variant("id_x_constant", "id_x", ("--id-alpha-schedule", "constant"), "constant"),
    )
    variants = alpha_ablation(recipe, "rdrop", [], baseline=False).variants
    assert [(one.name, one.value) for one in variants] == [("rdrop", "constant"), ("rdrop_adaptive", "adaptive")]
    with pytest.raises(UserError, match="alpha of method 'weak' is 0.5: the adaptive weight is constant too"):
        alpha_ablation(recipe, "weak", [], baseline=False)
    assert alpha_ablation(recipe, "weak", ["--id-alpha", "2"], baseline=False).variants[0].value == "adaptive"


def test_mistakes_take_one_line(tmp_path, tiny_data, capsys):
    write_prepared(tmp_path, tiny_data)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    without = tmp_path / "without.yaml"
    without.write_text(CONFIG.replace("  transformer:", "  other:"))
    (tmp_path / "file").write_text("")
    for words, message in (
        (["passes", "--passes", "1"], "--passes '1': needed is a whole number, at least 2"),
        (["passes", "--passes", "2", "many"], "--passes 'many': needed is a whole number, at least 2"),
        (["alpha", "--passes", "2"], "--passes is for the ablation of passes: leave it out"),
        (["passes", "--seeds", "x"], "--seeds 'x': needed is a whole number, at least 0"),
        (["passes", "--method", "none"], "method 'none' is not in "),
        (["passes", "--method", "transformer"], "has the criterion 'label_smoothed_cross_entropy', which neither has"),
        (["passes", "--config", without], "method 'transformer' is not in "),
        (["passes", "--", "--id-num-passes", "3"], "'--id-num-passes' cannot be given after --: it is what the runs"),
        (["alpha", "--", "--id-alpha-schedule=constant"], "'--id-alpha-schedule' cannot be given after --"),
        (["passes", "--", "--seed", "3"], "'--seed' cannot be given after --"),
        (["passes", "--results", tmp_path / "file"], "cannot be written"),
    ):
        status = main.main(ablation(tmp_path, *words))
        said = capsys.readouterr()
        assert (status, said.out, said.err.count("\n")) == (2, "", 1), said.err
        assert said.err.startswith("intra-distillation ablation: error: ") and message in said.err
    assert not (tmp_path / "runs").exists()


def test_a_stop_is_said_and_nothing_more_is_started(tmp_path, tiny_data, monkeypatch, capsys):
    write_prepared(tmp_path, tiny_data)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    stops = "import os, signal, sys; os.kill(os.getppid(), signal.SIGTERM); signal.pause()"
    monkeypatch.setattr(run_series, "INTRA_DISTILLATION", [sys.executable, "-c", stops])
    assert main.main(ablation(tmp_path, "passes")) == 143
    said = capsys.readouterr()
    assert "stopped by SIGTERM: the same command goes on" in said.err and said.out == ""
    assert said.err.count("start ") == 1 and "start transformer/seed1, log: " in said.err


def test_a_run_under_way_is_left_alone(tmp_path, tiny_data, monkeypatch, capsys):
    write_prepared(tmp_path, tiny_data)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    monkeypatch.setattr(run_series, "INTRA_DISTILLATION", [sys.executable, "-c", "raise SystemExit('cannot')"])
    run = tmp_path / "runs" / "id_x" / "seed1"
    with lock(run / ".train.lock", "the run folder"):
        assert main.main(ablation(tmp_path, "passes", "--passes", 2)) == 1
    said = capsys.readouterr().err
    assert f"error: id_x/seed1: '{run}' is in use (running): call this again when that has ended" in said
    assert "error: transformer/seed1: train failed: cannot; log: " in said and "start id_x" not in said
    assert not (run / "failed.json").exists() and not (run / "cell.log").exists()


# -- end to end


@pytest.fixture(scope="module")
def failed(tiny_data, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess, dict[str, int]]:
    """One run made by hand, one folder that is in the way; also when the files of the first were written."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "tiny.yaml").write_text(CONFIG)
    data, by_hand = write_prepared(folder, tiny_data), folder / "runs" / "id_x_k3" / "seed1"
    words = ["--method", "id_x", "--config", folder / "tiny.yaml", "--save-dir", by_hand]
    done = ours("train", data, *words, "--", "--cpu", "--id-num-passes", "3")
    assert done.returncode == 0, done.stderr
    done = ours("evaluate", by_hand, "--data", data, "--cpu")
    assert done.returncode == 0, done.stderr
    before = stamps(folder / "runs")
    (folder / "runs" / "id_x" / "seed1").mkdir(parents=True)
    (folder / "runs" / "id_x" / "seed1" / "train.log").write_text("of somebody else")
    return folder, ours(*ablation(folder, "passes", "--passes", 2, 3, "--", "--cpu")), before


@pytest.fixture(scope="module")
def finished(failed) -> tuple[Path, subprocess.CompletedProcess]:
    folder = failed[0]
    shutil.rmtree(folder / "runs" / "id_x")
    return folder, ours(*ablation(folder, "passes", "--passes", 2, 3, "--", "--cpu"))


def test_a_failed_run_is_named_and_the_others_go_on(failed):
    _, done, _ = failed
    assert done.returncode == 1
    assert "error: id_x/seed1: train failed: " in done.stderr and "but no run.json" in done.stderr
    assert "1 of 3 runs failed: the same command tries them again" in done.stderr
    lines = [line for line in done.stdout.split("\n") if line.startswith("| id_x ")]
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["id_x", "2", "-", "-", "-", "-"]
    assert "Not done:\n\n- id_x/seed1: failed\n" in done.stdout


def test_a_run_made_by_hand_counts_as_it_is(failed):
    folder, done, before = failed
    assert "done  id_x_k3/seed1: BLEU " in done.stderr
    after = stamps(folder / "runs")
    assert before and before.items() <= after.items()


def test_the_table_holds_what_the_runs_do(finished):
    folder, done = finished
    assert done.returncode == 0, done.stderr
    out = folder / "runs"
    assert done.stdout == (out / "ablation_passes.md").read_text(encoding="utf-8")
    assert done.stdout.startswith("# Number of passes\n\n| run ") and "Not done" not in done.stdout
    table = json.loads((out / "ablation_passes.json").read_text(encoding="utf-8"))
    assert [(one["name"], one["value"]) for one in table["variants"]] == [
        *(("transformer", "1"), ("id_x", "2"), ("id_x_k3", "3"))
    ]
    baseline = table["variants"][0]["bleu"]
    for one in table["runs"]:
        run = out / one["name"] / "seed1"
        score = json.loads((run / "eval" / "best" / "score.json").read_text(encoding="utf-8"))
        end = json.loads((run / "finished.json").read_text(encoding="utf-8"))
        assert (one["bleu"], one["best_valid_loss"]) == (score["bleu"], end["best_valid_loss"])
        assert (one["updates"], one["seconds"]) == (12, end["seconds"])
        change = None if one["name"] == "transformer" else pytest.approx(score["bleu"] - baseline, abs=1e-4)
        assert one["change"] == change
    lines = (out / "ablation_passes.tsv").read_text(encoding="utf-8").split("\n")
    assert lines[0].split("\t")[:5] == ["name", "value", "seed", "state", "bleu"] and len(lines) == 5
    for ending in (".png", ".pdf"):
        assert (out / f"ablation_passes{ending}").stat().st_size > 5000


def test_a_second_call_computes_nothing(finished):
    folder, first = finished
    before = stamps(folder / "runs")
    again = ours(*ablation(folder, "passes", "--passes", 2, 3, "--", "--cpu"))
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert stamps(folder / "runs") == before
    for name in ("transformer", "id_x", "id_x_k3"):
        launches = json.loads((folder / "runs" / name / "seed1" / "environment.json").read_text(encoding="utf-8"))
        assert len(launches["launches"]) == 1


def test_alpha_takes_the_runs_that_are_there(finished):
    folder = finished[0]
    before = stamps(folder / "runs")
    script = [ROOT / "scripts" / "ablation_alpha.sh", *ablation(folder, "alpha", "--", "--cpu")[2:]]
    venv = {"ID_VENV": str(Path(sys.prefix))}
    done = subprocess.run(["bash", *map(str, script)], capture_output=True, text=True, env={**os.environ, **venv})
    assert done.returncode == 0, done.stderr
    table = json.loads((folder / "runs" / "ablation_alpha.json").read_text(encoding="utf-8"))
    assert [(one["name"], one["value"]) for one in table["variants"]] == [
        *(("transformer", "-"), ("id_x", "adaptive"), ("id_x_constant", "constant"))
    ]
    assert all(one["state"] == "done" for one in table["runs"])
    assert before.items() <= stamps(folder / "runs").items()
    flags = json.loads((folder / "runs" / "id_x_constant" / "seed1" / "run.json").read_text())["settings"]["flags"]
    assert flags == ["--cpu", "--id-alpha-schedule", "constant"]
    assert (folder / "runs" / "ablation_alpha.pdf").stat().st_size > 5000
