"""`intra-distillation figure` as it is called: which figure, from which files, and what it says of a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from intra_distillation_fairseq.cli import main
from intra_distillation_fairseq.cli.figure import FIGURES
from intra_distillation_fairseq.experiments.reproduction import INTRA_DISTILLATION


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """Figures go into the current folder unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capsys, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main.main(["figure", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out, said.err


def write_pruning(run: Path) -> Path:
    (run / "analysis").mkdir(parents=True)
    points = [{"order": "sensitivity", "ratio": ratio, "bleu": 30 - ratio} for ratio in (0.0, 0.5)]
    (run / "analysis" / "pruning.json").write_text(json.dumps({"format": 1, "points": points}))
    return run


def write_run(run: Path, *flags: str, criterion: str = "intra_distillation") -> Path:
    run.mkdir(parents=True)
    settings = {"options": {"criterion": criterion, "max-update": 100}, "flags": list(flags)}
    (run / "run.json").write_text(json.dumps({"format": 1, "settings": settings}))
    return run


def lines_of(monkeypatch) -> list:
    """Collects the curves of the figures that are saved."""
    from matplotlib.figure import Figure

    found, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        found[:] = [line for line in figure.axes[0].lines if not line.get_label().startswith("_")]
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def test_both_files_appear_where_they_are_wanted(here, capsys, monkeypatch):
    run, lines = write_pruning(here / "id_x" / "seed1"), lines_of(monkeypatch)
    assert call(capsys, 6, run) == (0, "figure6.png\nfigure6.pdf\n", "")
    assert lines[0].get_label() == "id_x, least sensitive first"
    status, out, _ = call(capsys, 10, run, "--labels", "mine", "--out", here / "ö ut" / "a.b.png")
    assert (status, out) == (0, "ö ut/a.b.png\nö ut/a.b.pdf\n")
    assert lines[0].get_label() == "mine, least sensitive first"
    assert {path.name for path in here.rglob("*.p*") if path.suffix in (".png", ".pdf")} == {
        *("figure6.png", "figure6.pdf", "a.b.png", "a.b.pdf")
    }


def test_alpha_of_flags(here, capsys, monkeypatch):
    lines = lines_of(monkeypatch)
    assert call(capsys, 4)[0] == 0
    assert [line.get_label() for line in lines] == ["alpha 5, p 5, q 10, N 50,000"]
    status, _, said = call(capsys, 4, "--alpha", 5, "--alpha", 3, "--p", 4, "--q", 8, "--max-update", 800)
    assert (status, said) == (0, "")
    assert [line.get_label() for line in lines] == ["alpha 5, p 4, q 8, N 800", "alpha 3, p 4, q 8, N 800"]
    assert [dict(zip(line.get_xdata(), line.get_ydata()))[200] for line in lines] == [5, 3]


def test_alpha_of_runs(here, capsys, monkeypatch):
    lines = lines_of(monkeypatch)
    runs = [write_run(here / "a"), write_run(here / "b", "--id-alpha", "2", "--id-alpha-schedule", "constant")]
    assert call(capsys, 4, *runs, "--labels", "x", "y")[0] == 0
    assert [line.get_label() for line in lines] == ["x", "y"]
    assert [(line.get_ydata()[0], line.get_ydata()[-1]) for line in lines] == [(0, 5), (2, 2)]


def test_mistakes_take_one_line(here, capsys):
    run, plain = write_run(here / "run"), write_run(here / "plain", criterion="label_smoothed_cross_entropy")
    for words, message in (
        (["11"], "figure '11' is not known: give one of 2, 3, 4, 5, 6, 7, 8, 9, 10, layers, importance"),
        (["6"], "figure 6 needs at least one run folder: give it after the number"),
        (["6", run, "--alpha", "1"], "--alpha is for figure 4: leave it out"),
        (["6", run], "run/analysis/pruning.json' does not exist: make it with  intra-distillation prune"),
        (["6", run, "--labels", "a", "b"], "--labels has 2 (a, b) for 1 runs: give one for each, in order"),
        (["8", run, "--labels", "a"], "--labels is not for figure 8, which orders the runs by their passes"),
        (["4", run, "--q", "3"], "figure 4 takes RUNS or --q, not both: leave one out"),
        (["4", plain], "plain' was trained without intra-distillation: it has no alpha'"),
        (["4", here / "none"], "none' is not a run folder, it has no run.json"),
        (["4", "--alpha", "x"], "--alpha 'x': needed is a number"),
        (["4", "--max-update", "0.5"], "--max-update '0.5': needed is a whole number above 0"),
        (["4", "--p", "10", "--q", "5"], "--id-p is 10.0 and --id-q is 5.0: allowed is 0 < p < q"),
        (
            ["4", "--p", "1", "--p", "2", "--q", "8", "--q", "9", "--q", "7"],
            "--p is given 2 times and another flag 3 times",
        ),
        (["4", "--out", here], f"--out '{here}' is a folder: give a path for the files"),
        (["4", "--out", run / "run.json" / "x"], "cannot be written (File exists): give another path"),
    ):
        status, out, said = call(capsys, *words)
        assert (status, out) == (2, "")
        assert said.startswith("intra-distillation figure: error: ") and said.count("\n") == 1
        assert message in said
    assert not list(here.glob("figure*"))


def test_without_matplotlib(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    status, _, said = call(capsys, 4)
    assert status == 2
    assert said == "intra-distillation figure: error: no figure: matplotlib is not installed: run scripts/setup.sh\n"


def test_neither_torch_nor_a_model_is_needed(here):
    """The real command with a torch that cannot be imported."""
    (here / "torch.py").write_text("raise RuntimeError('torch was imported')")
    run = write_pruning(here / "a")
    words = [*INTRA_DISTILLATION, "figure", "6", str(run)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=here, env={"PYTHONPATH": str(here), "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert (here / "figure6.pdf").exists()


def test_help_lists_all_figures(capsys):
    with pytest.raises(SystemExit):
        main.main(["figure", "-h"])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said and what in said for name, (what, _) in FIGURES.items())
