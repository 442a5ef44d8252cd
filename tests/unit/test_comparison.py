"""The demo's report: baselines, table, picture, and its messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intra_distillation_fairseq.analysis.curves import draw_curves, points
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.comparison import baselines, run_result, table
from intra_distillation_fairseq.experiments.prepared import PreparedData
from intra_distillation_fairseq.experiments.recipes import Evaluation
from intra_distillation_fairseq.experiments.runs import RunFolder

ROWS = [
    {"update": update, "valid_loss": 8 / update, "id_loss": 0.1 * update, "id_alpha": min(5, update)}
    for update in (1, 2, 4, 8)
]


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture
def data(tmp_path) -> PreparedData:
    write(tmp_path / "raw" / "train.en", "yes , she did .", "no .", "no .", "yes , she did .", "why ?")
    write(tmp_path / "raw" / "test.de", "mira lant in 1987 .", "no .")
    write(tmp_path / "raw" / "test.en", "Mira runs in 1987 .", "yes , she did .")
    return PreparedData(tmp_path, "de", "en", "digest", "digest")


def write_run(folder: Path, **without: bool) -> RunFolder:
    run = RunFolder(folder)
    run.folder.mkdir(parents=True)
    run.write_record({"settings": {"method": "id_x"}})
    if not without.get("finished"):
        write(run.finished, json.dumps({"updates": 30, "seconds": 12.0}))
    if not without.get("score"):
        signatures = {"bleu_signature": "b", "chrf_signature": "c", "sentences": 2}
        score = {"bleu": 1.5, "chrf": 2.5, "valid_loss": 3.5, **signatures}
        write(folder / "eval" / "best" / "score.json", json.dumps(score))
    return run


def test_baselines_copy_and_repeat(data):
    copied, repeated = baselines(data, Evaluation(lowercase=True))
    assert (copied["method"], repeated["method"]) == ("(copy the source)", "(most frequent sentence)")
    # 6 of 7 copied words are right ("lant" and "no" are not): both scores lie between nothing and everything.
    assert 0 < copied["chrf"] < 100
    # Two sentences are equally frequent; the first in the text is taken, which is the second reference.
    assert 0 < repeated["bleu"] < 100
    write(data.folder / "raw" / "test.en", "yes , she did .", "yes , she did .")
    assert baselines(data, Evaluation())[1]["bleu"] == pytest.approx(100)
    assert copied["seconds"] is None and copied["files"] is None


def test_baselines_are_scored_as_the_runs_are(data):
    write(data.folder / "raw" / "test.de", "mira runs in 1987 .", "yes , she did .")
    assert baselines(data, Evaluation(lowercase=True))[0]["bleu"] == pytest.approx(100)
    assert baselines(data, Evaluation(lowercase=False))[0]["bleu"] < 100


def test_table_has_a_dash_where_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"method": "id_x", "bleu": 51.234, "chrf": 7.0, "valid_loss": 2.5, "updates": 1800, "seconds": 61.6}
    none = dict.fromkeys(("valid_loss", "updates", "seconds", "files"))
    text = table(
        [{**row, "files": str(tmp_path / "runs" / "id_x")}, {"method": "(copy)", "bleu": 0.5, "chrf": 1, **none}]
    )
    assert text.split("\n") == [
        "method   BLEU  chrF  valid loss  updates  seconds  files",
        "------  -----  ----  ----------  -------  -------  ---------",
        "id_x    51.23  7.00       2.500    1,800       62  runs/id_x",
        "(copy)   0.50  1.00           -        -        -  -",
    ]


def test_run_result(tmp_path):
    result = run_result(write_run(tmp_path / "run"))
    assert (result["bleu"], result["valid_loss"], result["updates"], result["seconds"]) == (1.5, 3.5, 30, 12.0)


def test_run_result_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="'.*/none' is not a finished run: train it with scripts/train.sh first"):
        run_result(RunFolder(tmp_path / "none"))
    with pytest.raises(UserError, match="'.*/half' is not a finished run: train it with scripts/train.sh first"):
        run_result(write_run(tmp_path / "half", finished=True))
    with pytest.raises(UserError, match="'.*/raw' was not evaluated: run scripts/evaluate.sh on it first"):
        run_result(write_run(tmp_path / "raw", score=True))


def test_points_leave_out_what_the_log_does_not_say():
    rows = [{"update": 1, "id_loss": None}, {"update": 2, "id_loss": 0.0}, {"update": 3}]
    assert points(rows, "id_loss") == ([2], [0.0])


def test_curves_have_labels_units_and_differ_in_grey(tmp_path, monkeypatch):
    figures = []
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kwargs: (figures.append(figure), path.touch()))
    plain = [{"update": row["update"], "valid_loss": row["valid_loss"], "id_loss": None} for row in ROWS]
    draw_curves({"transformer": plain, "id_x": ROWS}, tmp_path / "curves.png")
    (figure,) = figures
    loss, divergence, alpha = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == ["updates"] * 3
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "validation loss (bits per token)",
        "divergence of the passes, id_loss (bits per token)",
        "weight of the divergence, alpha' (no unit)",
    ]
    assert [line.get_label() for line in loss.lines] == ["transformer", "id_x"]
    assert [line.get_label() for line in divergence.lines] == ["id_x"]
    assert list(alpha.lines[0].get_ydata()) == [1, 2, 4, 5]
    assert list(alpha.lines[0].get_xdata()) == [1, 2, 4, 8]
    looks = [(line.get_linestyle(), line.get_marker()) for line in loss.lines]
    assert looks[0][0] != looks[1][0] and looks[0][1] != looks[1][1]
    assert all(float(line.get_color()) < 0.7 for line in loss.lines)  # greys, dark enough to see


def test_curves_are_a_png_and_nothing_is_left_beside_it(tmp_path):
    draw_curves({"id_x": ROWS}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
