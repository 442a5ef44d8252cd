"""benchmarks/scale.py finds what grows, and nothing where nothing does; the numbers of docs/scaling.md are computed."""

from __future__ import annotations

import contextlib
import csv
import mmap
import os
import random
import sys
import threading
from pathlib import Path

import activations
import estimate
import pytest
import reductions
import scale

DOCS = Path(__file__).resolve().parents[2] / "docs"


def samples(**planted) -> list[scale.Sample]:
    """2,000 updates of a training in which nothing grows, with noise; `planted` are functions of the update.

    Checkpoints of two updates are kept, and a third one is there while it is written, with a file more open.
    """
    rng, result = random.Random(1), []
    grow = {"memory": lambda u: 1, "open_files": lambda u: 0, "threads": lambda u: 0, "line": lambda u: 500}
    grow |= {"bytes": lambda u: 40_000, "small": lambda u: 100, "more": lambda u: 0, "pace": lambda u: 0.05} | planted
    seconds = logs = 0.0
    for update in range(20, 2001, 20):
        saving = rng.random() < 0.2
        seconds += 20 * grow["pace"](update) * rng.uniform(0.8, 1.25)
        logs += 20 * grow["line"](update)
        processes = [
            scale.Process(
                500 * rng.uniform(0.99, 1.01) * (grow["memory"](update) if rank else 1),
                400 * rng.uniform(0.99, 1.01),
                21 + saving + (grow["open_files"](update) if rank else 0),
                7 + rng.randrange(2) + (grow["threads"](update) if rank else 0),
                seconds,
            )
            for rank in range(2)
        ]
        names = [f"checkpoint_1_{n}.pt" for n in range(100 * (update // 100), 0, -100)][: 2 + saving]
        files = dict.fromkeys([*names, "checkpoint_last.pt"], grow["bytes"](update))
        files |= {"small.json": grow["small"](update)} | {f"more{i}": 10 for i in range(grow["more"](update))}
        result.append(scale.Sample(seconds, update, processes, int(logs), files))
    return result


def growing(**planted) -> list[str]:
    return [finding.what for finding in scale.judge(samples(**planted)) if finding.grows]


def test_nothing_grows_where_nothing_does():
    findings = scale.judge(samples())
    assert [f.what for f in findings if f.grows] == []
    names = ["rss_mib", "anonymous_mib", "open_files", "os_threads"]
    assert [f.what for f in findings[:8]] == [f"rank {rank}: {name}" for rank in (0, 1) for name in names]
    assert {f.what: f.grows for f in findings[8:]} == {
        "files": False, "their bytes": False, "bytes of checkpoint_last.pt": False, "bytes of small.json": False,
        "log, bytes per update": False, "updates per second": None, "processor ms per update": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ({"memory": lambda u: 1 + 0.03 * u / 900}, ["rank 1: rss_mib"]),  # halves lie 900 updates apart: 3%
        ({"memory": lambda u: 1 + 0.01 * u / 900}, []),
        ({"open_files": lambda u: u // 300}, ["rank 1: open_files"]),
        ({"threads": lambda u: u // 500}, ["rank 1: os_threads"]),
        ({"more": lambda u: u // 400}, ["files"]),
        ({"bytes": lambda u: 40_000 + u}, ["their bytes", "bytes of checkpoint_last.pt"]),
        ({"small": lambda u: 100 + u // 100}, ["bytes of small.json"]),  # beside checkpoints a thousand times as large
        ({"line": lambda u: 500 + u // 20}, ["log, bytes per update"]),
        ({"pace": lambda u: 0.05 + u / 10_000}, []),  # other work on the machine: reported, not judged
        # What is made while training settles is no growth.
        ({"memory": lambda u: 0.5 + 0.5 * (u > 150), "open_files": lambda u: 3 * (u > 150)}, []),
    ],
)
def test_what_is_planted_is_found_and_nothing_else(planted, found):
    assert growing(**planted) == found


def test_throughput_is_compared_stretch_by_stretch():
    findings = {f.what: f for f in scale.judge(samples(pace=lambda u: 0.05 * (1 + (u > 1100))))}
    rate = findings["updates per second"]
    assert 1.6 < rate.first / rate.last < 2.4 and 0.4 < float(rate.ratio.split()[0]) < 0.6
    assert " to " in rate.ratio and rate.grows is None


def test_too_few_samples_are_no_verdict():
    with pytest.raises(ValueError, match="3 samples are too few to compare their halves: sample more often"):
        scale.judge(samples()[:3])


def test_processes_are_seen_from_outside():
    """Files, threads and memory of this very process."""
    before = scale.look_at(os.getpid())
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    pipes = [os.pipe() for _ in range(3)]
    memory = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # none that was used and is free now
    for _ in range(64):
        memory.write(os.urandom(1 << 20))
    after = scale.look_at(os.getpid())
    stop.set()
    thread.join()
    memory.close()
    for end in (end for pipe in pipes for end in pipe):
        os.close(end)
    assert after.open_files - before.open_files == 6 and after.os_threads - before.os_threads == 1
    assert 60 < after.anonymous_mib - before.anonymous_mib < 80
    assert 60 < after.rss_mib - before.rss_mib < 80 and after.rss_mib > after.anonymous_mib
    assert after.cpu_s >= before.cpu_s > 0


def test_the_update_is_read_off_the_log(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("starting\n")
    assert scale.last_update(log) == 0
    lines = [f'2026 | INFO | train_inner | {{"epoch": 1, "num_updates": "{n}", "lr": "0.1"}}\n' for n in range(1, 500)]
    log.write_text("".join(lines) + '2026 | INFO | valid | {"valid_num_updates": "700"}\n')
    assert scale.last_update(log) == 499


def run_main(monkeypatch, module, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    module.main()


def test_a_short_soak(monkeypatch, tmp_path, capsys):
    """Real processes; so few updates say nothing about memory and the log, whose limits are set wide."""
    monkeypatch.setattr(scale, "MEMORY_TOLERANCE", 1.0)
    monkeypatch.setattr(scale, "LOG_TOLERANCE", 1.0)
    out = tmp_path / "scale.csv"
    run_main(monkeypatch, scale, "--updates", 40, "--every", 2, "--out", out, "--", "--id-pass-mode", "sequential")
    with open(out, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["rank"] for row in rows} == {"0", "1"} and len(rows) >= 20
    assert {row["flags"] for row in rows} == {"--id-pass-mode sequential"} and {row["updates"] for row in rows} == {
        "40"
    }
    updates = [int(row["update"]) for row in rows if row["rank"] == "1"]
    assert updates == sorted(set(updates)) and updates[-1] <= 40
    last = rows[-1]
    assert float(last["rss_mib"]) > float(last["anonymous_mib"]) > 50 and int(last["log_bytes"]) > 40 * 200
    assert int(last["files"]) >= 2 and int(last["file_bytes"]) > 100_000 and int(last["open_files"]) > 3
    printed = capsys.readouterr().out
    assert "| rank 1: open_files | " in printed and "| updates per second | " in printed and "grows" not in printed


def test_growth_ends_with_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scale, "soak", lambda args, folder: iter(samples(open_files=lambda u: u // 300)))
    with pytest.raises(SystemExit) as leaving:
        run_main(monkeypatch, scale, "--out", tmp_path / "scale.csv")
    assert leaving.value.code == "error: what grows: rank 1: open_files"  # a text: exit code 1
    assert "| rank 1: open_files | 21 | 24 | 1.1429 | at most 1 | **grows** |" in capsys.readouterr().out
    assert (tmp_path / "scale.csv").is_file()


def test_a_process_that_fails_is_named_with_its_log(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)error: train_rank\d ended with exit code .*at least 2, since passes"):
        run_main(monkeypatch, scale, "--quick", "--out", tmp_path / "no.csv", "--", "--id-num-passes", 1)
    assert not (tmp_path / "no.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--updates", 0], "--updates, --processes, --every: allowed is at least 1"),
        (["--updates", 100], "--updates is 100: allowed is at least 10 times --every, which is 20"),
    ],
)
def test_bad_arguments_of_scale(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as leaving:
        run_main(monkeypatch, scale, *arguments)
    assert leaving.value.code == 2 and message in capsys.readouterr().err


def test_one_reduction_of_all_gradients_whatever_k_and_the_mode():
    cells = [reductions.Cell("c10d", "baseline", 1, 1), reductions.Cell("c10d", "stacked", 3, 1)]
    cells += [reductions.Cell("c10d", "sequential", 3, 1), reductions.Cell("c10d", "recompute", 3, 2)]
    cells += [reductions.Cell("legacy_ddp", "sequential", 3, 1)]
    rows = reductions.measure(reductions.TINY, cells)
    assert [tuple(row[name] for name in reductions.Cell._fields) for row in rows] == cells
    for row in rows:
        assert row["bytes_per_parameter"] == 4 and row["gradient_calls"] == 1, row
        assert row["other_calls"] <= 4 and row["other_bytes"] < 1000, row


def test_the_fit_recovers_what_it_was_made_from():
    points = [(tokens, k, -50 + tokens * (300 + 20 * k) / 1024) for tokens, k in activations.points("recompute")]
    assert activations.fit(points, once=True) == pytest.approx((-50, 300, 20, 0), abs=1e-6)
    points = [(tokens, k, 10 + tokens * k * 400 / 1024) for tokens, k in activations.points("stacked")]
    assert activations.fit(points, once=False) == pytest.approx((10, 0, 400, 0), abs=1e-6)


@pytest.mark.filterwarnings("ignore")  # hydra's deprecations
def test_activations_are_measured_for_each_token_and_pass():
    row = activations.measure("tiny", activations.TINY, "stacked", "fp32")
    assert row["b0_kib"] == 0 and row["b1_kib"] > 1 and row["largest_error"] < 0.05
    assert row["state_bytes_per_parameter"] >= 12 and row["gradient_bytes_per_parameter"] == 4
    assert row["measured"].startswith("500x3:") and row["parameters"] > 5_000


@pytest.mark.filterwarnings("ignore")
def test_products_that_are_not_computed_take_the_same_memory(monkeypatch):
    def measured(row) -> list[float]:
        return [float(point.partition(":")[2]) for point in row["measured"].split()]

    settings = ("tiny", activations.TINY, "recompute", "bf16")
    fast = activations.measure(*settings)
    monkeypatch.setattr(activations, "SizesOnly", contextlib.nullcontext)
    assert measured(fast) == pytest.approx(measured(activations.measure(*settings)), abs=0.11)  # MiB, rounded


def test_the_models_of_the_estimates_are_the_real_ones():
    counts = {name: model.parameters for name, model in estimate.MODELS.items()}
    assert counts == {
        "transformer_small": 49_976_832, "switch_transformer_small": 87_805_440,
        "transformer_big": 274_664_448, "switch_transformer_big": 576_887_808,
    }  # fmt: skip
    assert {row["parameters"] for row in estimate.rows_of("scale_activations.csv")} == {"49976832", "274664448"}
    # 6 FLOP for each parameter of six encoder and decoder layers and of the projection, the counts of the real models.
    assert estimate.MODELS["transformer_small"].flop == 6 * (12_616_704 + 18_926_592 + 6_144_512)
    assert estimate.MODELS["transformer_big"].flop == 6 * (6 * (12_596_224 + 16_796_672) + 32_769_024)


def test_state_on_paper_is_what_was_measured():
    for row in estimate.rows_of("scale_activations.csv"):
        parts = estimate.STATE["fp32" if row["precision"] == "fp32" else estimate.SIXTEEN]
        measured = float(row["state_bytes_per_parameter"]) + float(row["gradient_bytes_per_parameter"])
        assert measured == pytest.approx(sum(parts[:4]), abs=0.1)


@pytest.mark.parametrize("variant", ["stacked", "recompute"])
def test_the_fit_foretells_the_memory_of_benchmarks_step(variant):
    """Another measurement, over batches with the sentence lengths of IWSLT'14, of at most 1,024 tokens."""
    (row,) = (row for row in estimate.rows_of("step.csv") if row["variant"] == variant)
    foretold = estimate.activation_mib("transformer_small", "fp32", variant, 1000, 3)
    assert foretold == pytest.approx(float(row["peak_above_state_mib"]), rel=0.1)


def test_what_is_sent():
    """A ring of N sends 2 (N - 1) / N of the gradients."""
    assert estimate.sent_bytes("transformer_big", 2, 4) == 4 * 274_664_448
    assert estimate.sent_bytes("transformer_big", 64) == pytest.approx(2 * 63 / 64 * 2 * 274_664_448)
    assert estimate.communication_s("transformer_big", 1) == 0


def test_hours_follow_from_updates_tokens_and_flop():
    one = 50_000 * 16 * 4096 * 3 * estimate.MODELS["transformer_big"].flop / (0.35 * 989e12) / 3600
    assert estimate.hours(1, 3, False, 0.35) == pytest.approx(one)
    assert estimate.hours(8, 3, True, 0.35) == pytest.approx(
        one * 4 / 3 / 8 + 50_000 * 0.9613e9 / 450e9 / 3600, rel=1e-3
    )


@pytest.mark.parametrize("title", list(estimate.TABLES))
def test_the_tables_of_the_docs_are_computed(title):
    text = (DOCS / "scaling.md").read_text(encoding="utf-8")
    assert estimate.TABLES[title]() in text, f"print the table anew with benchmarks/estimate.py: {title}"
