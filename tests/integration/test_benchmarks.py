"""benchmarks/: the measuring itself, and that each command runs, refuses wrong results and says what it cannot do."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import loss
import measure
import numpy as np
import plots
import pytest
import step
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, *arguments: object, **environment: object) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}}
    command = [sys.executable, BENCHMARKS / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_peak_memory_is_exact_on_the_cpu():
    x = torch.zeros(1000, 1000)
    assert measure.peak_memory(lambda: x.exp().sum()) * measure.MIB == pytest.approx(4_000_000, abs=100)
    # Two at once count twice, one after the other once; views and work in place count nothing.
    assert measure.peak_memory(lambda: [x + 1, x + 2]) * measure.MIB == pytest.approx(8_000_000, abs=100)
    assert measure.peak_memory(lambda: [(x + i).numel() for i in range(3)]) * measure.MIB == pytest.approx(4e6, abs=100)
    assert measure.peak_memory(lambda: x.t().add_(1)) * measure.MIB < 100


def test_peak_memory_sees_what_backward_allocates():
    x = torch.zeros(1000, 1000, requires_grad=True)
    # sigmoid keeps its result; backward makes the gradient of the sum (expanded: no memory) and that of x.
    peak = measure.peak_memory(lambda: torch.autograd.grad(x.sigmoid().sum(), x))
    assert peak * measure.MIB == pytest.approx(8_000_000, abs=100)


def test_variants_take_turns_in_being_first():
    assert [measure.rotated("abc", repeat) for repeat in range(4)] == [
        list("abc"),
        list("bca"),
        list("cab"),
        list("abc"),
    ]


def test_loss_runs(tmp_path):
    out = tmp_path / "new folder" / "loss.csv"
    done = run("loss.py", "--quick", "--device", "cpu", "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = rows_of(out)
    names = ["published", "reference", "chunked", "chunked_in_place", "reference_features", "chunked_features"]
    assert [(r["variant"], r["phase"]) for r in rows] == [
        (n, p) for n in names for p in ("forward", "backward", "both")
    ]
    assert all(float(r["ms"]) > 0 and r["status"] == "ok" and r["repeats"] == "2" for r in rows)
    assert all(float(r["gradient_error"]) < 1e-5 and float(r["value_error"]) < 1e-5 for r in rows)
    assert {float(r["speedup"]) for r in rows if r["variant"] in ("reference", "reference_features")} == {1}
    both = {r["variant"]: r for r in rows if r["phase"] == "both"}
    gradient = 4 * 3 * 32 * 101 / 2**20
    for name in ("published", "reference", "chunked"):
        above_inputs, above_both = (float(both[name][f"peak_above_inputs{s}_mib"]) for s in ("", "_and_gradients"))
        assert above_inputs - above_both == pytest.approx(gradient, abs=0.011), name
    in_place = both["chunked_in_place"]
    assert in_place["peak_above_inputs_mib"] == in_place["peak_above_inputs_and_gradients_mib"]
    assert float(in_place["peak_above_inputs_mib"]) < float(both["chunked"]["peak_above_inputs_mib"])


@pytest.mark.parametrize("wrong", ["values", "gradient", "nan"])
def test_loss_refuses_to_time_a_wrong_result(monkeypatch, tmp_path, wrong):
    right = loss.BACKENDS["chunked"]

    def broken(logits, *arguments, **settings):
        result = right.from_logits(logits, *arguments, **settings)
        if wrong == "values":
            return result._replace(divergence_sum=result.divergence_sum * 1.001)
        factor = float("nan") if wrong == "nan" else 1.001
        return result._replace(loss=result.loss.detach() + factor * (result.loss - result.loss.detach()))

    monkeypatch.setitem(loss.BACKENDS, "chunked", right._replace(from_logits=broken))
    monkeypatch.setattr(sys, "argv", ["loss.py", "--quick", "--device", "cpu", "--out", str(tmp_path / "loss.csv")])
    with pytest.raises(
        SystemExit, match="error: chunked disagrees with the float64 reference at K=3 N=32 V=101 float32"
    ):
        loss.main()
    assert not (tmp_path / "loss.csv").exists()


def test_loss_says_what_does_not_fit_into_memory(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loss, "available_mib", lambda: 0.0)
    monkeypatch.setattr(sys, "argv", ["loss.py", "--quick", "--device", "cpu", "--out", str(tmp_path / "loss.csv")])
    loss.main()
    rows = rows_of(tmp_path / "loss.csv")
    assert len(rows) == 18 and all(row["status"] == "out of memory" and row["ms"] == "" for row in rows)
    assert "K=3 N=32 V=101 float32: out of memory" in capsys.readouterr().err


def test_the_sweep_changes_one_thing_at_a_time():
    sweep = loss.cases("sweep")
    assert sweep[0] == loss.MAIN == (3, 2048, 12_001, "float32") and len(set(sweep)) == len(sweep) == 10
    assert all(sum(a != b for a, b in zip(case, loss.MAIN)) == 1 for case in sweep[1:])
    assert len(loss.cases("all")) == 4 * 4 * 3 * 2 and loss.cases("main") == [loss.MAIN]
    assert [loss.groups(case, "sweep", sweep) for case in sweep] == [["logits", "features"], *[["logits"]] * 9]
    assert {case.dtype for case in loss.cases("sweep", "bfloat16")} == {"bfloat16", "float32"}


def test_step_runs(tmp_path):
    out = tmp_path / "step.csv"
    done = run("step.py", "--quick", "--device", "cpu", "--out", out, ID_SHARED_DATA=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["variant"]: row for row in rows_of(out)}
    assert list(rows) == ["baseline", "published", "stacked", "sequential", "recompute"]
    assert all(row["lengths"] == "generated" and row["repeats"] == row["batches"] == "2" for row in rows.values())
    assert float(rows["baseline"]["times_baseline"]) == float(rows["published"]["speedup_on_published"]) == 1
    assert (rows["published"]["loss_backend"], rows["published"]["loss_input"]) == ("reference", "logits")
    assert {rows[name]["loss_backend"] for name in ("stacked", "sequential", "recompute")} == {"chunked"}
    peak = {name: float(row["peak_mib"]) for name, row in rows.items()}
    assert peak["baseline"] < peak["published"] and peak["recompute"] < peak["sequential"] < peak["published"]
    for row in rows.values():
        parts = sum(float(row[f"{name}_mib"]) for name in ("peak_above_state", "state", "gradients"))
        assert float(row["peak_mib"]) == pytest.approx(parts, abs=0.21)


def test_step_profiles(tmp_path):
    out = tmp_path / "profile.csv"
    done = run("step.py", "--quick", "--profile", "--variants", "baseline", "stacked", "--device", "cpu", "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = rows_of(out)
    assert {row["variant"] for row in rows} == {"baseline", "stacked"} and len(rows) == 24
    assert {"aten::addmm", "aten::mm"} & {row["operator"] for row in rows}
    for name in ("baseline", "stacked"):
        shares = [float(row["percent"]) for row in rows if row["variant"] == name]
        assert shares == sorted(shares, reverse=True) and 40 < sum(shares) <= 100


@pytest.mark.filterwarnings("ignore")  # hydra's deprecations
def test_step_counts_all_of_the_memory():
    """Parameters and Adam's two averages; and what an update leaves behind is its gradients, to the byte."""
    settings = {"precision": "fp32", "num_passes": 3, "lengths": None, "max_tokens": 100, "types": 100, "layers": 1}
    sizes = {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2}
    args = step.argparse.Namespace(**settings, **sizes)
    trainer = step.make_trainer("stacked", args, torch.device("cpu"))
    (sample,) = step.samples(args, 1)
    trainer.train_step([sample])
    trainer.zero_grad()
    parameters = sum(p.nbytes for p in trainer.model.parameters()) / measure.MIB
    state, gradients = step.state_mib(trainer)
    buffers = sum(b.nbytes for b in trainer.model.buffers()) / measure.MIB
    assert gradients == parameters and state == pytest.approx(3 * parameters + buffers, rel=1e-6)
    assert step.memory(trainer, sample, torch.device("cpu"))["peak_mib"] > state + gradients


def test_step_extrapolates(tmp_path):
    out = tmp_path / "step.csv"
    done = run("step.py", "--quick", "--device", "cpu", "--extrapolate", 3, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = rows_of(out)
    assert (row["variant"], row["updates"]) == ("stacked", "3") and "stacked: 3 updates in " in done.stdout
    assert float(row["minutes_per_50000"]) == pytest.approx(float(row["seconds"]) / 3 * 50_000 / 60, rel=0.1)


def test_batches_are_an_epochs_and_span_its_lengths():
    lengths = step.sentence_lengths(None)
    assert lengths.mean(0) == pytest.approx([25, 25], abs=1)
    batches = step.epoch_batches(lengths, 1024, 8)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    padded = [len(indices) * lengths[indices].max() for indices in batches]
    assert max(padded) <= 1024 and np.mean(padded[:-1]) > 800
    args = step.argparse.Namespace(lengths=None, max_tokens=1024, types=100)
    widths = [sample["target"].size(1) for sample in step.samples(args, 4)]
    assert widths == sorted(widths) and widths[0] < 20 and widths[-1] > 40
    assert len(step.samples(args, None)) == len(batches)


def test_lengths_come_from_the_file(tmp_path):
    np.savez(tmp_path / "lengths.npz", train_de=np.array([3, 4], np.uint16), train_en=np.array([5, 6], np.uint16))
    assert step.sentence_lengths(tmp_path / "lengths.npz").tolist() == [[3, 5], [4, 6]]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (loss, ["--variants", "fast"], "--variants has 'fast': allowed on this device are published, reference,"),
        (loss, ["--repeats", "0"], "--repeats, --width, --threads: allowed is at least 1"),
        (step, ["--precision", "fp16"], "--precision is fp16, which fairseq trains on a GPU only"),
        (
            step,
            ["--lengths", "no.npz"],
            "--lengths 'no.npz' is not a file: give an npz with train_de and train_en",
        ),
        (plots, ["no.csv"], "'no.csv' cannot be read (No such file or directory): write it with"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, script, arguments, message):
    device = [] if script is plots else ["--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [script.__file__, *device, *arguments])
    with pytest.raises(SystemExit) as leaving:
        script.main()
    assert leaving.value.code == 2 and message in capsys.readouterr().err


def test_plots_draw_both_figures(monkeypatch, tmp_path, capsys):
    facts = {"device": "a GPU", "threads": 1}
    variants = loss.variants(torch.device("cpu"))
    numbers = {"ms": 1.0, "speedup": 2.0, "peak_above_inputs_mib": 3.0}
    rows = [
        loss.row({**case._asdict(), "alpha": 5.0}, name, variant, "both", facts, **numbers)
        for case in loss.cases("sweep")
        for name, variant in variants.items()
    ]
    measure.write_csv(tmp_path / "loss.csv", rows)
    one = {"variant": "stacked", **dict.fromkeys(step.COLUMNS, 1), "num_passes": 3, "max_tokens": 4096}
    measure.write_csv(tmp_path / "step.csv", [{**one, "precision": "bf16", **facts}])
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["plots.py", "--figures", str(tmp_path / "figures")])
    plots.main()
    figures = [tmp_path / "figures" / f"benchmark_{name}.png" for name in ("loss", "step")]
    assert capsys.readouterr().out.split() == list(map(str, figures))
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)
    drawn = plots.draw_loss(plots.read(tmp_path / "loss.csv")).axes
    assert [len(axes.lines) for axes in drawn] == [4] * 4  # the variants from logits
    assert [len(axes.lines[0].get_xdata()) for axes in drawn] == [4, 3, 4, 3]
