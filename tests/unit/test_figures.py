"""The figures: what is drawn is what the files say, in grey, with units; what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from intra_distillation_fairseq.analysis import drawing, figures
from intra_distillation_fairseq.analysis.figures import violins
from intra_distillation_fairseq.analysis.labels import run_labels
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.method_settings import (
    DEFAULT_PASSES,
    alpha_schedule,
    num_passes,
    without_option,
)
from intra_distillation_fairseq.schedule import AlphaSchedule

MEASURED = {"split": "train", "batches": 2, "dropout": True, "average": "absolute", "objective": "cross_entropy"}
PLAIN = {"criterion": "label_smoothed_cross_entropy", "max-update": 100}
ID = {"criterion": "intra_distillation", "id-num-passes": 3, "id-alpha": 5, "id-p": 5, "id-q": 10, "max-update": 100}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, in their order (each twice: PNG and PDF), and really saved."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda one, *args, **kwargs: (saved.append(one), save(one, *args, **kwargs)))
    return saved


def write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def curve(line) -> list[tuple[float, float]]:
    return list(zip(map(float, line.get_xdata()), map(float, line.get_ydata())))


def by_label(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): curve(line) for line in axes.lines}


def check_look(figure) -> None:
    """Grey only, dark enough, no two curves of one look, a unit on an axis."""
    from matplotlib.colors import to_rgb

    for axes in figure.axes:
        lines = [line for line in axes.lines if line.get_linestyle() != "None" and len(line.get_xdata())]
        for line in lines:
            red, green, blue = to_rgb(line.get_color())
            assert red == green == blue <= 0.7
        looks = [
            (line.get_linestyle(), line.get_marker(), line.get_color(), line.get_markerfacecolor()) for line in lines
        ]
        assert len(set(looks)) == len(looks)
    assert any("(" in axes.get_ylabel() or axes.get_ylabel() in ("BLEU", "change in BLEU") for axes in figure.axes)


def check_files(files: list[Path], out: Path) -> None:
    assert files == [out.with_name(out.name + ending) for ending in (".png", ".pdf")]
    for path, start in zip(files, (b"\x89PNG\r\n\x1a\n", b"%PDF")):
        content = path.read_bytes()
        assert content.startswith(start) and len(content) > 5000
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(path.name for path in files)


def write_log(run: Path, losses: dict[int, float]) -> Path:
    lines = [
        "2026-01-01 10:00:00 | INFO | valid | "
        + json.dumps({"epoch": 1, "valid_loss": str(loss), "valid_num_updates": str(update)})
        for update, loss in losses.items()
    ]
    write(run / "train.log", "\n".join(lines) + "\n")
    return run


def write_run(run: Path, options: dict, bleu: float | None = None, *, flags=(), seed=1, **more) -> Path:
    settings = {"method": "m", "options": options, "flags": list(flags), "seed": seed, "data_digest": "d"}
    write(run / "run.json", {"format": 1, "settings": {**settings, "precision": "fp32", **more}})
    if bleu is not None:
        write(run / "finished.json", {"time": "t"})
        write(run / "eval" / "best" / "score.json", {"bleu": bleu, "finished": "t"})
    return run


def write_measurements(run: Path, rows: dict[int, tuple[float, float]], **settings) -> Path:
    lines = [
        {
            "update": update,
            "summary": {"top_mean": top, "rest_mean": rest},
            "settings": {**MEASURED, "normalised": False, **settings},
            "layers": {
                "encoder.embed_tokens": {"mean": 9.0},
                **{f"{side}.layers.{n}": {"mean": top * (n + 1)} for side in ("encoder", "decoder") for n in range(2)},
            },
        }
        for update, (top, rest) in rows.items()
    ]
    write(run / "sensitivity.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return run


def write_sensitivity(run: Path, values: np.ndarray, std: float, trimmed: float, **settings) -> Path:
    out = run / "analysis"
    out.mkdir(parents=True)
    np.savez(out / "sensitivity_best.npz", a=values[:500].reshape(5, 100), b=values[500:])
    summary = {"std": std, "std_trimmed": trimmed}
    record = {"format": 1, "summary": summary, "settings": {**MEASURED, "normalised": False, **settings}}
    write(out / "sensitivity_best.json", record)
    return run


# -- labels


def test_labels_are_names_and_seeds_only_where_they_are_needed(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    assert run_labels([a / "alpha0.5", a / "alpha0.7"]) == ["alpha0.5", "alpha0.7"]
    assert run_labels([a / "id_x", b / "plain"]) == ["id_x", "plain"]
    assert run_labels([a / "id_x" / "seed1", a / "plain" / "seed2"]) == ["id_x", "plain"]
    seeds = [a / "id_x" / "seed1", a / "id_x" / "seed2", a / "plain" / "seed1"]
    assert run_labels(seeds) == ["id_x seed1", "id_x seed2", "plain"]
    assert run_labels([a / "id_x" / "seed1", b / "id_x" / "seed1"]) == ["a/id_x/seed1", "b/id_x/seed1"]


def test_files_are_called_after_their_run(tmp_path):
    best, last = (tmp_path / "id_x" / "seed1" / "analysis" / f"sensitivity_{name}.npz" for name in ("best", "last"))
    assert run_labels([best, tmp_path / "plain"]) == ["id_x", "plain"]
    names = run_labels([best, last])
    assert len(set(names)) == 2 and [name.split()[-1] for name in names] == ["sensitivity_best", "sensitivity_last"]
    assert run_labels([tmp_path / "mine.npz"]) == ["mine"]


def test_labels_of_the_wrong_number_or_twice(tmp_path):
    runs = [tmp_path / "a", tmp_path / "b"]
    assert run_labels(runs, ["x", "y"]) == ["x", "y"]
    with pytest.raises(UserError, match=r"--labels has 1 \(x\) for 2 runs: give one for each, in order"):
        run_labels(runs, ["x"])
    with pytest.raises(UserError, match="--labels has 'x' twice"):
        run_labels(runs, ["x", "x"])
    with pytest.raises(UserError, match="/a' is given twice: give each run once"):
        run_labels([tmp_path / "a", tmp_path / "b", tmp_path / "a"])


def test_ten_looks_differ_and_four_differ_in_everything():
    looks = [drawing.style(number) for number in range(10)]
    assert len({look["marker"] for look in looks}) == 10
    for key in ("color", "linestyle"):
        assert len({look[key] for look in looks[:4]}) == 4


# -- each figure


def test_sensitivity_over_training(tmp_path, drawn):
    runs = [write_measurements(tmp_path / name, {10: (2.0, 0.2), 20: (1.0 + n, 0.5)}) for n, name in enumerate("ab")]
    check_files(figures.draw_sensitivity_curves(runs, tmp_path / "out" / "figure2"), tmp_path / "out" / "figure2")
    (axes,) = drawn[0].axes
    assert by_label(axes) == {
        "a, top 20%": [(10, 2.0), (20, 1.0)],
        "a, other 80%": [(10, 0.2), (20, 0.5)],
        "b, top 20%": [(10, 2.0), (20, 2.0)],
        "b, other 80%": [(10, 0.2), (20, 0.5)],
    }
    assert axes.get_yscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("updates", "mean sensitivity (nats per token)")
    check_look(drawn[0])


def test_measured_in_different_ways(tmp_path):
    runs = [
        write_measurements(tmp_path / "a", {10: (2.0, 0.2)}),
        write_measurements(tmp_path / "b", {10: (2.0, 0.2)}, normalised=True),
    ]
    for draw in (figures.draw_sensitivity_curves, figures.draw_importance):
        with pytest.raises(UserError, match="/b' was measured with normalised 'True' and '.*/a' with 'False'"):
            draw(runs, tmp_path / "out")


def test_importance(tmp_path, drawn):
    runs = [write_measurements(tmp_path / name, {10: (2.0, 0.2), 20: (1.0, 0.5)}, normalised=True) for name in "ab"]
    check_files(figures.draw_importance(runs, tmp_path / "out" / "i"), tmp_path / "out" / "i")
    assert [axes.get_title() for axes in drawn[0].axes] == ["a, encoder", "a, decoder", "b, encoder", "b, decoder"]
    for axes in drawn[0].axes:
        assert by_label(axes) == {"layer 1": [(10, 2.0), (20, 1.0)], "layer 2": [(10, 4.0), (20, 2.0)]}
    assert drawn[0].axes[0].get_ylabel() == "mean sensitivity of the layer\n(share of the loss)"
    assert drawn[0].axes[2].get_xlabel() == "updates"
    check_look(drawn[0])


def test_violins(tmp_path, drawn):
    values = np.random.default_rng(0).exponential(size=1000).astype(np.float32)
    places = [
        write_sensitivity(tmp_path / "a", values, 3.0, 1.0),
        write_sensitivity(tmp_path / "b", 2 * values, 6.0, 2.0),
    ]
    places[1] = places[1] / "analysis" / "sensitivity_best.npz"
    check_files(figures.draw_violins(places, tmp_path / "out" / "v"), tmp_path / "out" / "v")
    bodies, deviations = drawn[0].axes
    assert [label.get_text() for label in bodies.get_xticklabels()] == ["a", "b"]
    assert bodies.get_ylabel() == "sensitivity, without the top 1% (nats per token)"
    for body, factor in zip(bodies.collections, (1, 2)):
        heights = body.get_paths()[0].vertices[:, 1]
        assert heights.max() == pytest.approx(violins.sample(factor * values).max())
    assert [list(line.get_ydata()) for line in deviations.lines] == [[3.0, 6.0], [1.0, 2.0]]
    assert deviations.get_ylabel() == (
        "standard deviation (nats per token),\nbefore (filled) and after (hollow) removing the top 1%"
    )
    (legend,) = drawn[0].legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["deviation of all parameters", "deviation without the top 1%"]


def test_a_violin_is_a_tenth_of_all_but_the_top_hundredth():
    values = np.random.default_rng(0).permutation(10_000).astype(np.float32)
    chosen = violins.sample(values)
    assert len(chosen) == len(set(chosen)) == 990
    assert chosen.max() < 9900 and chosen.max() > 9500
    assert np.array_equal(chosen, violins.sample(values))


def test_pruning(tmp_path, drawn):
    points = [
        {"order": "random", "ratio": 0.5, "bleu": 0.5},
        {"order": "sensitivity", "ratio": 0.5, "bleu": 10.0},
        {"order": "sensitivity", "ratio": 0.0, "bleu": 30.0},
        {"order": "sensitivity", "ratio": 0.1, "bleu": 29.0},
    ]
    run = tmp_path / "id_x" / "seed1"
    write(run / "analysis" / "pruning.json", {"format": 1, "points": points})
    check_files(figures.draw_pruning([run], tmp_path / "out" / "p"), tmp_path / "out" / "p")
    scores, changes = drawn[0].axes
    assert by_label(scores) == {
        "id_x, least sensitive first": [(0, 30.0), (10, 29.0), (50, 10.0)],
        "id_x, at random": [(0, 30.0), (50, 0.5)],
    }
    assert [curve(line) for line in changes.lines] == [[(0, 0), (10, -1), (50, -20)], [(0, 0), (50, -29.5)]]
    assert scores.get_xlabel() == "pruned share of the prunable parameters (%)"
    assert float(scores.lines[1].get_color()) > float(scores.lines[0].get_color())  # controls are lighter
    check_look(drawn[0])


def test_pruning_without_an_unpruned_score(tmp_path, drawn):
    points = [{"order": "sensitivity", "ratio": ratio, "bleu": 9.0} for ratio in (0.2, 0.1)]
    write(tmp_path / "a" / "analysis" / "pruning.json", {"format": 1, "points": points})
    figures.draw_pruning([tmp_path / "a"], tmp_path / "out")
    scores, changes = drawn[0].axes
    assert curve(scores.lines[0]) == [(10, 9.0), (20, 9.0)]
    assert not changes.lines and changes.texts[0].get_text() == "no score of an unpruned model"


def test_layers(tmp_path, drawn):
    points = [{"layers": n, "bleu": 10.0 * n, "tokens_per_second": 600.0 / n} for n in (2, 1)]
    write(tmp_path / "a" / "analysis" / "layers.json", {"format": 1, "points": points})
    check_files(figures.draw_layers([tmp_path / "a"], tmp_path / "out" / "l"), tmp_path / "out" / "l")
    scores, speeds = drawn[0].axes
    assert by_label(scores) == {"a, BLEU": [(1, 10.0), (2, 20.0)]}
    assert by_label(speeds) == {"a, speed": [(1, 600.0), (2, 300.0)]}
    assert speeds.get_ylabel() == "translation speed (target tokens per second)"
    check_look(drawn[0])


def write_layers(run: Path, layers: list[int], **inputs) -> Path:
    points = [{"layers": n, "bleu": 10.0, "tokens_per_second": 600.0} for n in layers]
    facts = {"test": ["a" * 64, "b" * 64], "evaluation": {"beam": 5}, "device": "cpu", "OMP_NUM_THREADS": "1", **inputs}
    write(run / "analysis" / "layers.json", {"format": 1, "points": points, "inputs": facts})
    return run


@pytest.mark.parametrize("layers", [[2], [3, 2], [6, 5, 4, 3, 2, 1]])
def test_there_is_no_half_layer(tmp_path, drawn, layers):
    figures.draw_layers([write_layers(tmp_path / "a", layers)], tmp_path / "out")
    assert list(drawn[0].axes[0].get_xticks()) == sorted(layers)


@pytest.mark.parametrize(
    ("inputs", "difference"),
    [
        (
            {"test": ["a" * 64, "c" * 64]},
            f"the sha256 of the test set ({'a' * 12} {'b' * 12} and {'a' * 12} {'c' * 12})",
        ),
        ({"evaluation": {"beam": 4}}, "--beam (5 and 4)"),
        ({"device": "NVIDIA H200"}, "device (cpu and NVIDIA H200)"),
        ({"processor": "x86"}, "processor (None and x86)"),
        ({"OMP_NUM_THREADS": None}, "OMP_NUM_THREADS (1 and None)"),
    ],
)
def test_layers_of_runs_measured_differently(tmp_path, inputs, difference):
    runs = [write_layers(tmp_path / "a", [2]), write_layers(tmp_path / "b", [2], **inputs)]
    with pytest.raises(UserError) as error:
        figures.draw_layers(runs, tmp_path / "out")
    assert str(error.value) == (
        f"'{runs[0]}' and '{runs[1]}' cannot be compared, they differ in {difference}: measure them in the same way, or "
        "draw them one by one"
    )
    assert not list(tmp_path.glob("out*"))


def test_pruning_of_runs_measured_differently(tmp_path):
    def run(name: str, **facts) -> Path:
        points = [{"order": "sensitivity", "ratio": 0.1, "bleu": 9.0}]
        record = {"format": 1, "points": points, "data_digest": "d" * 64, "evaluation": {"beam": 5}, **facts}
        write(tmp_path / name / "analysis" / "pruning.json", record)
        return tmp_path / name

    first, same = run("a"), run("same")
    for other, difference in (
        (run("b", data_digest="e" * 64), f"the sha256 of the data's manifest ({'d' * 12} and {'e' * 12})"),
        (run("c", evaluation={"beam": 4, "lenpen": 1}), "--beam (5 and 4), --lenpen (None and 1)"),
    ):
        with pytest.raises(UserError) as error:
            figures.draw_pruning([first, same, other], tmp_path / "out")
        start = f"'{first}' and '{other}' cannot be compared, they differ in {difference}: "
        assert str(error.value).startswith(start) and "\n" not in str(error.value)
    figures.draw_pruning([first, same], tmp_path / "out")


def test_validation(tmp_path, drawn):
    runs = [write_log(tmp_path / "a" / "seed1", {10: 5.0, 20: 4.5}), write_log(tmp_path / "b" / "seed1", {10: 6.0})]
    check_files(figures.draw_validation(runs, tmp_path / "out" / "v"), tmp_path / "out" / "v")
    (axes,) = drawn[0].axes
    assert by_label(axes) == {"a (best 4.500)": [(10, 5.0), (20, 4.5)], "b (best 6.000)": [(10, 6.0)]}
    assert axes.get_ylabel() == "validation loss (bits per token)"
    check_look(drawn[0])


def test_alpha_marks_one_and_alpha(tmp_path, drawn):
    curves = {
        "five": AlphaSchedule(max_update=1000),
        "same": AlphaSchedule(max_update=1000),
        "flat": AlphaSchedule(alpha=2, kind="constant", max_update=1000),
    }
    check_files(figures.draw_alpha(curves, tmp_path / "out" / "a"), tmp_path / "out" / "a")
    (axes,) = drawn[0].axes
    lines = by_label(axes)
    assert dict(lines["five, same"])[200] == 5 and dict(lines["five, same"])[100] == pytest.approx(1)
    assert {value for _, value in lines["flat"]} == {2.0}
    assert curve(axes.lines[1]) == [(100, 1.0), (200, 5.0)]
    assert [text.get_text() for text in axes.texts] == ["N/q = 100", "N/p = 200"]
    assert axes.get_ylabel() == "weight of the divergence, alpha' (no unit)"
    check_look(drawn[0])


def test_passes_are_means_over_seeds(tmp_path, drawn):
    runs = [
        write_run(tmp_path / "k4", ID, 31.0, flags=["--id-num-passes", "4"]),
        write_run(tmp_path / "k3" / "seed1", ID, 30.0),
        write_run(tmp_path / "k3" / "seed2", ID, 32.0, seed=2),
        write_run(tmp_path / "plain", PLAIN, 29.0, method="transformer"),
    ]
    check_files(figures.draw_passes(runs, tmp_path / "out" / "k"), tmp_path / "out" / "k")
    (axes,) = drawn[0].axes
    assert curve(axes.lines[0]) == [(1, 29.0), (3, 31.0), (4, 31.0)]
    (whiskers,) = axes.collections
    assert [sorted(segment[:, 1]) for segment in whiskers.get_segments()][1] == pytest.approx(
        [31 - 2**0.5, 31 + 2**0.5]
    )
    assert [text.get_text() for text in axes.texts] == ["29.00", "31.00 ± 1.41", "31.00"]
    assert axes.get_xlabel() == "number of passes K (1: without intra-distillation)"
    assert list(axes.get_xticks()) == [1, 3, 4]
    check_look(drawn[0])


def test_passes_of_runs_that_differ_in_more(tmp_path):
    first = write_run(tmp_path / "a", ID, 30.0)
    others = {
        "differ in flags": write_run(tmp_path / "b", ID, 30.0, flags=["--id-num-passes=4", "--id-alpha", "1"]),
        "differ in data_digest": write_run(tmp_path / "c", PLAIN, 30.0, data_digest="e"),
        "have the same number of passes and seed": write_run(tmp_path / "d", ID, 30.0),
        "d' was not trained to its end and evaluated": write_run(tmp_path / "unscored", ID),
    }
    for message, run in others.items():
        with pytest.raises(UserError, match=message):
            figures.draw_passes([first, run], tmp_path / "out")


# -- what a run was trained with


def test_settings_of_the_method_are_those_that_count_last():
    settings = {"options": ID, "flags": ["--id-num-passes", "5", "--id-alpha=2", "--id-alpha-schedule", "constant"]}
    assert num_passes(settings) == 5
    assert alpha_schedule(settings) == AlphaSchedule(alpha=2.0, kind="constant", max_update=100)
    assert num_passes({"options": PLAIN, "flags": []}) == 1 and alpha_schedule({"options": PLAIN, "flags": []}) is None


def test_the_default_number_of_passes_is_the_criterions():
    from intra_distillation_fairseq.criterions import intra_distillation, self_distillation

    configs = {
        "intra_distillation": intra_distillation.IntraDistillationCriterionConfig,
        "self_distillation": self_distillation.SelfDistillationCriterionConfig,
    }
    assert {name: config.id_num_passes for name, config in configs.items()} == DEFAULT_PASSES
    for name, number in DEFAULT_PASSES.items():
        assert num_passes({"options": {"criterion": name}, "flags": []}) == number


def test_the_passes_of_a_student():
    """Self-distillation has intra-distillation's flags, and one pass unless they say otherwise."""
    student = {"options": ID | {"criterion": "self_distillation"}, "flags": []}
    assert num_passes(student) == 3 and alpha_schedule(student) == AlphaSchedule(5, "adaptive", 5, 10, 100)
    alone = {"options": PLAIN, "flags": ["--criterion", "self_distillation", "--teacher", "t.pt"]}
    assert num_passes(alone) == 1 and alpha_schedule(alone) is None


def test_words_without_an_option():
    assert without_option(["--a", "1", "--b", "--c", "2", "--a=3"], "a") == ["--b", "--c", "2"]
    assert without_option(["--a", "--a"], "a") == []


# -- what is missing


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (figures.draw_pruning, "analysis/pruning.json' does not exist: make it with  intra-distillation prune .*/a"),
        (figures.draw_layers, "analysis/layers.json' does not exist: make it with  intra-distillation layers .*/a"),
        (
            figures.draw_violins,
            "sensitivity_best.npz' does not exist: make it with  intra-distillation sensitivity .*/a",
        ),
        (
            figures.draw_sensitivity_curves,
            "sensitivity.jsonl' does not exist or is empty: .* -- --sensitivity-interval N",
        ),
        (figures.draw_importance, "sensitivity.jsonl' does not exist or is empty: .* -- --sensitivity-interval N"),
        (
            figures.draw_validation,
            "train.log' does not exist or has no validation yet: train the run with scripts/train.sh",
        ),
        (figures.draw_passes, "a' was not trained to its end and evaluated: do it with scripts/train.sh and scripts/"),
    ],
)
def test_a_missing_file_is_named_with_what_makes_it(tmp_path, draw, message):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=message):
        draw([tmp_path / "a"], tmp_path / "out")
    with pytest.raises(UserError, match="run folder '.*/none' does not exist"):
        draw([tmp_path / "none"], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_damaged_files(tmp_path):
    write(tmp_path / "a" / "analysis" / "pruning.json", {"format": 7})
    with pytest.raises(UserError, match=r"pruning.json' is damaged or of another version \(this one reads format 1\)"):
        figures.draw_pruning([tmp_path / "a"], tmp_path / "out")
    with open(write_measurements(tmp_path / "c", {10: (2.0, 0.2)}) / "sensitivity.jsonl", "a") as file:
        file.write('{"update": 20, "summ')
    with pytest.raises(UserError, match="sensitivity.jsonl' is damaged: remove the lines that are not whole"):
        figures.draw_importance([tmp_path / "c"], tmp_path / "out")
    for text in (
        '{"a": 1}',
        "3",
        '{"update": 2, "settings": {}, "summary": 3}',
        '{"update": 2, "settings": {}}',
        "\xff",
    ):
        (tmp_path / "c" / "sensitivity.jsonl").write_bytes(text.encode("latin-1"))
        for draw in (figures.draw_sensitivity_curves, figures.draw_importance):
            with pytest.raises(UserError, match="sensitivity.jsonl' is damaged.*: remove the lines that are not whole"):
                draw([tmp_path / "c"], tmp_path / "out")
    for name, draw in (("pruning", figures.draw_pruning), ("layers", figures.draw_layers)):
        for content in ({"format": 1}, {"format": 1, "points": [{}]}, {"format": 1, "points": 3}, 3):
            write(tmp_path / "d" / "analysis" / f"{name}.json", json.dumps(content))
            with pytest.raises(
                UserError, match=f"{name}.json' is damaged.*: move it away and make it again with  intra"
            ):
                draw([tmp_path / "d"], tmp_path / "out")
    run = write_sensitivity(tmp_path / "b", np.ones(1000, np.float32), 1.0, 1.0)
    write(run / "analysis" / "sensitivity_best.npz", "no archive")
    with pytest.raises(UserError, match="sensitivity_best.npz' cannot be read .*: measure it again"):
        figures.draw_violins([run], tmp_path / "out")
    write(run / "analysis" / "sensitivity_best.json", {"format": 1, "settings": {}})
    np.savez(run / "analysis" / "sensitivity_best.npz", a=np.ones(1000, np.float32))
    with pytest.raises(UserError, match="sensitivity_best.json' is damaged, it has no 'summary': move it away"):
        figures.draw_violins([run], tmp_path / "out")
    (run / "analysis" / "sensitivity_best.json").unlink()
    with pytest.raises(UserError) as error:
        figures.draw_violins([run], tmp_path / "out")
    assert str(error.value) == (
        f"'{run}/analysis/sensitivity_best.json' is missing: make it with  intra-distillation sensitivity RUN_DIR"
    )
