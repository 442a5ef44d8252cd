"""The table of a results folder, on made-up runs: its numbers, its texts, its states, its notes and its picture."""

from __future__ import annotations

import json
import os
import random
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from intra_distillation_fairseq.analysis.table_figure import bars, draw_table
from intra_distillation_fairseq.cli import main
from intra_distillation_fairseq.cli import table as command
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import significance
from intra_distillation_fairseq.experiments.cells import Cell, add_to_plan, find_cells, note_failure, outcome, read_plan
from intra_distillation_fairseq.experiments.published import TABLES
from intra_distillation_fairseq.experiments.recipes import evaluation_as_dict, read_recipe
from intra_distillation_fairseq.experiments.results_table import build_table, choose_table
from intra_distillation_fairseq.experiments.table_text import hours, markdown, tsv

ROOT = Path(main.__file__).resolve().parents[2]
RECIPE = read_recipe(ROOT / "configs" / "iwslt14_transformer_small.yaml")
SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
COMMIT = "052888d06a4c93d0b8a3c1fa3d2b9d4a5c6e7f80"
REFERENCES = [
    f"the {a} {b} sees a {c} ." for a in ("old", "red", "big") for b in ("cat", "dog") for c in ("man", "car")
]


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_run(results: Path, cell: Cell, bleu: float | None, hypotheses: list[str] = REFERENCES, **changes) -> Path:
    """A cell as train.sh and evaluate.sh leave it; `changes` replace single facts."""
    folder = cell.folder(results)
    facts = {
        "corpus": f"iwslt14_{cell.pair.replace('-', '_')}",
        "lines": 160_239,
        "flags": [],
        "precision": "fp16",
        "updates": 50_000,
        "seconds": 3600.4,
        "parameters": 49_976_832,
        "tokens_per_second": 54_000.0,
        "peak_memory_mib": 2400,
        "peak_memory_of": "gpu",
        "commit": COMMIT,
        "digest": "d" * 64,
        "signature": SIGNATURE,
        **changes,
    }
    options = facts.get("options") or RECIPE.options(cell.method)
    settings = {"method": cell.method, "seed": cell.seed, "options": options, "data_digest": facts["digest"]}
    settings |= {"flags": facts["flags"], "precision": facts["precision"]}
    record = {"format": 1, "settings": settings, "corpus": facts["corpus"], "lines": {"train": facts["lines"]}}
    write_json(folder / "run.json", record)
    versions = {"git_commit": facts["commit"], "torch": "2", "devices": []}
    batches = [{"processes": number, "update_freq": text} for number, text in facts.get("batches", [])]
    write_json(folder / "environment.json", {"launches": [{**versions, **one} for one in batches or [{}]]})
    if facts.get("unfinished"):
        return folder
    keys = ("updates", "seconds", "parameters", "tokens_per_second", "peak_memory_mib", "peak_memory_of")
    write_json(folder / "finished.json", {key: facts[key] for key in keys if key not in facts.get("without", ())})
    if bleu is not None:
        evaluation = folder / "eval" / "best"
        inputs = {"evaluation": evaluation_as_dict(RECIPE.evaluation)}
        score = {"bleu": bleu, "bleu_signature": facts["signature"], "checkpoint": "best", "inputs": inputs}
        write_json(evaluation / "score.json", score)
        for name, lines in (("hypotheses", hypotheses), ("references", facts.get("references", REFERENCES))):
            (evaluation / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def build(results: Path, number: int = 2, **kwargs) -> dict:
    bootstrap = significance.PairedBootstrap(results / "p_values.json", lambda line: None)
    arguments = {"plan": read_plan(results), "checkpoint": "best", "recipe": RECIPE, "bootstrap": bootstrap, **kwargs}
    return build_table(results, TABLES[number], **arguments)


def worse(rate: float, seed: int = 1) -> list[str]:
    """The references with some words gone."""
    rng = random.Random(seed)
    return [" ".join(w for w in line.split() if rng.random() > rate) or "a" for line in REFERENCES]


# -- published numbers


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: str(table.number))
def test_published_rows_are_complete(table):
    assert all(len(scores) == len(table.pairs) for scores in table.scores.values())
    assert set(table.parameters) == set(table.methods)
    recipe = read_recipe(ROOT / f"{table.recipe}.yaml")
    for method in table.methods:
        assert method in recipe.methods


def test_published_averages_are_those_of_their_rows():
    table = TABLES[2]
    for method, scores in table.scores.items():
        assert sum(scores) / 8 == pytest.approx(table.averages[method], abs=0.00501), method
    # A slip in one figure can hide in the average, so here are the sums of the columns, added up by hand.
    columns = [round(sum(column), 2) for column in zip(*table.scores.values())]
    assert columns == [185.30, 206.41, 240.80, 128.51, 222.34, 202.74, 221.31, 129.93]
    assert list(TABLES[3].scores.values()) == [(27.56,), (27.76,), (28.10,), (27.80,), (28.62,)]


def test_published_rows_have_the_papers_order():
    assert TABLES[2].methods == ("transformer", "sage", "rdrop", "switch", "id_js", "id_x")
    assert TABLES[3].methods == ("transformer", "sage", "rdrop", "switch", "id_x")
    assert [pair[:2] for pair in TABLES[2].pairs] == ["ar", "de", "es", "fa", "he", "it", "nl", "pl"]


def test_published_means_over_some_pairs():
    assert TABLES[2].average("id_x", TABLES[2].pairs) == 34.00
    assert TABLES[2].average("id_js", TABLES[2].pairs) == 33.37  # as printed, not 33.365
    assert TABLES[2].average("id_x", ["de-en", "es-en"]) == pytest.approx((36.10 + 41.82) / 2)
    assert TABLES[2].average("mine", ["de-en"]) is None
    assert TABLES[2].average("id_x", []) is None
    assert TABLES[3].bleu("id_js", "en-de") is None


@pytest.mark.parametrize(
    ("number", "pair", "corpus", "lines", "expected"),
    [
        (2, "de-en", "iwslt14_de_en", 160_239, True),
        (2, "de-en", "iwslt14_de_en", 6_874, False),  # an archive of the same layout with another text
        (2, "de-en", "iwslt14_de_en", None, False),
        (2, "de-en", "multi30k_de_en", 160_239, False),
        (2, "fr-en", "iwslt14_fr_en", 160_239, False),
        (3, "en-de", "wmt17_en_de", 4_500_000, True),
        (3, "en-de", "wmt17_en_de", 27_000, False),
    ],
)
def test_whose_text_it_is(number, pair, corpus, lines, expected):
    assert TABLES[number].is_of_paper(pair, corpus, lines) is expected


# -- numbers, by hand


@pytest.fixture
def two_pairs(tmp_path) -> Path:
    for seed, de, es in ((1, 33.0, 38.0), (2, 34.0, 38.5), (3, 35.0, 40.0)):
        write_run(tmp_path, Cell("de-en", "transformer", seed), de)
        write_run(tmp_path, Cell("es-en", "transformer", seed), es)
    write_run(tmp_path, Cell("es-en", "id_x", 1), 41.0, seconds=10_000.0)
    return tmp_path


def test_mean_deviation_difference(two_pairs):
    table = build(two_pairs)
    assert (table["pairs"], table["methods"]) == (["de-en", "es-en"], list(TABLES[2].methods))
    entry = table["bleu"]["transformer"]["de-en"]
    assert (entry["mean"], entry["sd"], entry["published"]) == (34.0, 1.0, 33.07)
    assert entry["difference"] == pytest.approx(0.93)
    alone = table["bleu"]["id_x"]["es-en"]
    assert (alone["mean"], alone["sd"], alone["published"]) == (41.0, None, 41.82)


def test_averages(two_pairs):
    averages = build(two_pairs)["averages"]
    row = averages["transformer"]
    # By seed: 35.5, 36.25, 37.5.
    assert row["mean"] == pytest.approx((34.0 + 116.5 / 3) / 2)
    assert row["sd"] == pytest.approx(statistics.stdev((35.5, 36.25, 37.5)))
    assert row["published"] == pytest.approx((33.07 + 38.89) / 2)
    assert (row["complete"], row["pairs"]) == (True, 2)
    part = averages["id_x"]
    assert (part["mean"], part["complete"], part["pairs"], part["sd"]) == (41.0, False, 1, None)
    assert part["published"] == 41.82  # over the same pairs


def test_a_row_with_a_seed_to_come_is_no_complete_one(two_pairs):
    add_to_plan(two_pairs, 2, "best", two_pairs / "data", [Cell("de-en", "transformer", 4)])
    table = build(two_pairs)
    assert not table["averages"]["transformer"]["complete"]
    assert "34.00 ± 1.00 (3 of 4)" in markdown(table)


def test_a_whole_row_has_the_printed_average_beside_it(tmp_path):
    for number, pair in enumerate(TABLES[2].pairs):
        write_run(tmp_path, Cell(pair, "id_x", 1), 30.0 + number)
    average = build(tmp_path)["averages"]["id_x"]
    assert (average["mean"], average["published"], average["difference"]) == (33.5, 34.00, -0.5)


def test_what_the_trainings_were_like(two_pairs):
    write_run(two_pairs, Cell("de-en", "id_x", 1), None, updates=49_000, seconds=20_000.0, peak_memory_mib=7900)
    runs = build(two_pairs)["runs"]["id_x"]
    assert runs == {
        "seeds": [1],
        "done": 1,
        "planned": 2,
        "parameters": [49_976_832],
        "published_parameters": 49.98e6,
        "updates": [49_000, 50_000],
        "median_seconds": 15_000.0,
        "median_tokens_per_second": 54_000.0,
        "peak_memory_mib": 7900,
        "peak_memory_of": ["gpu"],
    }


# -- texts


def test_markdown(two_pairs):
    text = markdown(build(two_pairs))
    lines = [" ".join(line.split()) for line in text.split("\n")]
    assert lines[0] == "# Table 2: BLEU on IWSLT'14 Xx-En"
    shown = [*lines[2:7], *lines[lines.index("| id_x | ours | not run | 41.00 | 41.00 (partial, 1 of 2) |") :][:4]]
    assert shown == [
        "| method | | de-en | es-en | average |",
        "| ----------- | ---------- | -----------: | -----------: | ----------------------: |",
        "| transformer | ours | 34.00 ± 1.00 | 38.83 ± 1.04 | 36.42 ± 1.01 |",
        "| | published | 33.07 | 38.89 | 35.98 |",
        "| | difference | +0.93 | -0.06 | +0.44 |",
        "| id_x | ours | not run | 41.00 | 41.00 (partial, 1 of 2) |",
        "| | published | 36.10 | 41.82 | 41.82 |",
        "| | difference | - | -0.82 | -0.82 |",
        "| | p | - | 1.000 | |",
    ]
    assert "| transformer | 49,976,832 | 49.98M | 50,000 | 1:00:00 | 54,000 | 2,400 MiB gpu | 3 | 6 of 6 |" in lines
    assert "| id_x | 49,976,832 | 49.98M | 50,000 | 2:46:40 | 54,000 | 2,400 MiB gpu | 1 | 1 of 1 |" in lines
    assert f"Checkpoint: best. BLEU: {SIGNATURE}." in lines
    assert "±: sample standard deviation over the seeds." in lines
    widths = {len(line) for line in text.split("\n")[2:22]}
    assert len(widths) == 1  # in a terminal the columns stand below each other


def test_tsv(two_pairs):
    rows = [line.split("\t") for line in tsv(build(two_pairs)).split("\n")[:-1]]
    assert rows[0][:5] == ["method", "pair", "bleu", "sd", "seeds"] and {len(row) for row in rows} == {len(rows[0])}
    assert rows[1] == ["transformer", "de-en", "34.0000", "1.0000", "3", "3", "33.07", "+0.9300", "", "done"]
    assert rows[3] == ["sage", "de-en", "", "", "0", "0", "33.51", "", "", "not run"]
    assert rows[-2] == ["id_x", "de-en", "", "", "0", "0", "36.10", "", "", "not run"]
    assert rows[-1] == ["id_x", "es-en", "41.0000", "", "1", "1", "41.82", "-0.8200", "1.0000", "done"]


def test_durations():
    assert [hours(seconds) for seconds in (0, 59.6, 3_599, 360_000)] == ["0:00:00", "0:01:00", "0:59:59", "100:00:00"]


def test_an_older_finished_json_has_dashes(tmp_path):
    without = ("parameters", "tokens_per_second", "peak_memory_mib", "peak_memory_of")
    write_run(tmp_path, Cell("de-en", "transformer", 1), 33.0, without=without)
    row = next(line for line in markdown(build(tmp_path)).split("\n") if "1 of 1" in line)
    assert " ".join(row.split()) == "| transformer | - | 49.98M | 50,000 | 1:00:00 | - | - | 1 | 1 of 1 |"


def test_one_pair_needs_no_average(tmp_path):
    write_run(tmp_path, Cell("en-de", "id_x", 1), 28.0, corpus="wmt17_en_de", lines=4_400_000)
    assert choose_table(tmp_path, {}) == 3
    text = markdown(build(tmp_path, 3))
    assert "average" not in text and "28.62" in text and "-0.62" in text
    assert text.startswith("# Table 3: BLEU on WMT'17 En-De, newstest2014\n")


# -- states


def test_states(tmp_path):
    cells = {name: Cell("de-en", name, 1) for name in ("transformer", "sage", "rdrop", "switch", "id_js", "id_x")}
    add_to_plan(tmp_path, 2, "best", tmp_path / "data", cells.values())
    note_failure(cells["sage"].folder(tmp_path), "train", "no such | option", Path("some/cell.log"))
    running = write_run(tmp_path, cells["rdrop"], None, unfinished=True)
    time, values = "2026-01-01 00:00:00", {"num_updates": "1200", "loss": "4"}
    (running / "train.log").write_text(f"{time} | INFO | train_inner | {json.dumps(values)}\n", encoding="utf-8")
    (running / ".train.lock").write_text(f"train (process {os.getpid()}) on {socket.gethostname()}\n", encoding="utf-8")
    stopped = write_run(tmp_path, cells["switch"], None, unfinished=True)
    (stopped / "train.log").write_bytes((running / "train.log").read_bytes())
    (stopped / ".train.lock").write_text(f"train (process 999999999) on {socket.gethostname()}\n", encoding="utf-8")
    write_run(tmp_path, cells["id_js"], None)
    write_run(tmp_path, cells["id_x"], 36.0)
    table = build(tmp_path)
    shown = [table["bleu"][name]["de-en"]["states"] for name in cells]
    assert shown == [
        *(
            ["not run"],
            ["failed"],
            ["running at update 1,200"],
            ["stopped at update 1,200"],
            ["not evaluated"],
            ["done"],
        )
    ]
    text = markdown(table)
    assert "- de-en/sage/seed1: train failed: no such \\| option; log: some/cell.log" in text
    assert "- not run: de-en/transformer/seed1" in text
    assert "- running: de-en/rdrop/seed1 (update 1,200)" in text


def test_the_paper_has_all_its_rows(tmp_path):
    """Also those that nobody asked for: his own beside the published table."""
    write_run(tmp_path, Cell("de-en", "mine", 1), 30.0, options=RECIPE.options("id_x"))
    table = build(tmp_path)
    assert table["methods"] == [*TABLES[2].methods, "mine"] and table["pairs"] == ["de-en"]
    row = table["bleu"]["rdrop"]["de-en"]
    assert (row["states"], row["published"], row["planned"]) == (["not run"], 35.43, 0)
    lines = [" ".join(line.split()) for line in markdown(table).split("\n")]
    assert lines.count("| switch | ours | not run |") == 1
    assert "| switch | - | 87.81M | - | - | - | - | - | - |" in lines


def test_a_failure_hides_the_score_before_it(tmp_path):
    folder = write_run(tmp_path, Cell("de-en", "id_x", 1), 36.0)
    note_failure(folder, "evaluate", "no memory", Path("a.log"))
    (folder / ".train.lock").write_text("train (process 1) on elsewhere\n", encoding="utf-8")
    table = build(tmp_path)
    entry = table["bleu"]["id_x"]["de-en"]
    assert (entry["mean"], entry["states"], table["signatures"]) == (None, ["failed"], [])
    assert table["notes"] == ["de-en/id_x/seed1: evaluate failed: no memory; log: a.log"]


def test_failures_of_one_cause_are_one_line(tmp_path):
    reasons = {"transformer": "no archive", "sage": "no archive", "id_js": "no archive", "id_x": "no memory"}
    for method, reason in reasons.items():
        for pair in ("de-en", "es-en"):
            step, log = ("prepare", f"{pair}.log") if reason == "no archive" else ("train", f"{method}.log")
            note_failure(Cell(pair, method, 1).folder(tmp_path), step, reason, Path(log))
    note_failure(Cell("es-en", "id_x", 2).folder(tmp_path), "train", "no memory", Path("other.log"))
    assert build(tmp_path)["notes"] == [
        "de-en (3 cells): prepare failed: no archive; log: de-en.log",
        "de-en/id_x/seed1: train failed: no memory; log: id_x.log",
        "es-en (3 cells): prepare failed: no archive; log: es-en.log",
        "es-en (2 cells): train failed: no memory; log: id_x.log and others",
    ]


def test_a_score_from_before_the_end_of_the_training_does_not_count(tmp_path):
    folder = write_run(tmp_path, Cell("de-en", "id_x", 1), 36.0)
    path = folder / "eval" / "best" / "score.json"
    os.utime(path, (1000, 1000))
    assert build(tmp_path)["bleu"]["id_x"]["de-en"]["states"] == ["not evaluated"]


def test_a_lock_of_another_machine(tmp_path):
    folder = write_run(tmp_path, Cell("de-en", "id_x", 1), None, unfinished=True)
    (folder / ".train.lock").write_text("train (process 999999999) on far.away\n", encoding="utf-8")
    table = build(tmp_path)
    assert table["bleu"]["id_x"]["de-en"]["states"] == ["running on far.away at update 0"]
    assert table["notes"] == ["running: de-en/id_x/seed1 (on far.away, if its lock file is right)"]


def test_a_damaged_record_is_a_failure(tmp_path):
    folder = write_run(tmp_path, Cell("de-en", "id_x", 1), 36.0)
    (folder / "run.json").write_text("{", encoding="utf-8")
    result = outcome(folder, "best")
    assert result.state == "failed" and "run.json' is damaged" in result.reason


def test_another_checkpoint_is_another_table(tmp_path):
    folder = write_run(tmp_path, Cell("de-en", "id_x", 1), 36.0)
    assert build(tmp_path, checkpoint="average5")["bleu"]["id_x"]["de-en"]["states"] == ["not evaluated"]
    (folder / "eval" / "best").rename(folder / "eval" / "average5")
    assert build(tmp_path, checkpoint="average5")["bleu"]["id_x"]["de-en"]["mean"] == 36.0


def test_what_is_asked_for_adds_up(tmp_path):
    add_to_plan(tmp_path, 2, "best", tmp_path / "data", [Cell("de-en", "id_x", 1)])
    add_to_plan(tmp_path, 2, "last", tmp_path / "data", [Cell("es-en", "id_x", 1), Cell("de-en", "id_x", 1)])
    plan = read_plan(tmp_path)
    assert (plan["cells"], plan["checkpoint"]) == ([Cell("de-en", "id_x", 1), Cell("es-en", "id_x", 1)], "best")
    with pytest.raises(UserError, match="holds the runs of table 2, not of table 3: give another folder"):
        add_to_plan(tmp_path, 3, "best", tmp_path, [])


def test_other_folders_are_no_cells(tmp_path):
    write_run(tmp_path, Cell("de-en", "id_x", 12), 1.0)
    for name in ("de-en/id_x/seedling", "logs/id_x/seed1", "de-en/id_x/seed3"):
        (tmp_path / name).mkdir(parents=True)
    write_json(tmp_path / "logs/id_x/seed1/run.json", {"format": 1})
    assert find_cells(tmp_path) == [Cell("de-en", "id_x", 12)]


# -- p-values


def test_p_values_tell_equal_from_different(tmp_path):
    texts = {"transformer": worse(0.5), "rdrop": worse(0.5), "id_js": worse(0.5, seed=2), "id_x": REFERENCES}
    for bleu, (method, lines) in enumerate(texts.items()):
        write_run(tmp_path, Cell("de-en", method, 1), 30.0 + bleu, lines)
    row = {method: build(tmp_path)["bleu"][method]["de-en"]["p"] for method in texts}
    assert row["transformer"] == {}
    assert row["rdrop"] == {1: 1.0}  # the same text
    assert row["id_x"][1] < 0.01
    assert row["id_js"][1] > 0.05  # as bad, in other places


def test_p_values_are_sacrebleus(tmp_path, monkeypatch):
    """The command line of sacrebleu, given the same files."""
    for name, lines in {"base": worse(0.3), "system": worse(0.25, seed=3), "refs": REFERENCES}.items():
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (tmp_path / name / "hypotheses.txt").write_bytes((tmp_path / f"{name}.txt").read_bytes())
        (tmp_path / name / "references.txt").write_text("".join(f"{line}\n" for line in REFERENCES), encoding="utf-8")
    files = [str(tmp_path / f"{name}.txt") for name in ("refs", "base", "system")]
    words = [files[0], "-i", *files[1:], "-m", "bleu", "--paired-bs", "--force", "--format", "json"]
    done = subprocess.run([sys.executable, "-m", "sacrebleu", *words], capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)[1]["BLEU"]["p_value"]
    monkeypatch.setenv("SACREBLEU_SEED", "7")  # must not matter
    bootstrap = significance.PairedBootstrap(tmp_path / "p.json", lambda line: None)
    ours = bootstrap.test("test", tmp_path / "base", {"system": tmp_path / "system"}, "13a")
    assert ours["system"] == pytest.approx(theirs, abs=5e-5)
    assert os.environ["SACREBLEU_SEED"] == "7"


def test_p_values_are_remembered_by_the_texts(tmp_path, monkeypatch):
    write_run(tmp_path, Cell("de-en", "transformer", 1), 30.0, worse(0.5))
    folder = write_run(tmp_path, Cell("de-en", "id_x", 1), 33.0)
    computed = []
    real = significance._paired_bootstrap
    monkeypatch.setattr(
        significance, "_paired_bootstrap", lambda *words: (computed.append(list(words[1])), real(*words))[1]
    )
    first = build(tmp_path)["bleu"]["id_x"]["de-en"]["p"]
    write_run(tmp_path, Cell("de-en", "sage", 1), 31.0, worse(0.4))
    assert build(tmp_path)["bleu"]["id_x"]["de-en"]["p"] == first
    assert computed == [["id_x"], ["sage"]]
    (folder / "eval" / "best" / "hypotheses.txt").write_text("".join(f"{line}\n" for line in worse(0.5)), "utf-8")
    assert build(tmp_path)["bleu"]["id_x"]["de-en"]["p"] == {1: 1.0}


def test_no_p_value_over_different_references(tmp_path):
    write_run(tmp_path, Cell("de-en", "transformer", 1), 30.0)
    write_run(tmp_path, Cell("de-en", "id_x", 1), 33.0, references=[*REFERENCES[1:], "another ."])
    write_run(tmp_path, Cell("de-en", "id_js", 2), 33.0)  # no baseline of this seed
    row = build(tmp_path)["bleu"]
    assert row["id_x"]["de-en"]["p"] == {} == row["id_js"]["de-en"]["p"]


def test_several_seeds_show_the_least_favourable_p(tmp_path, monkeypatch):
    values = {"id_x": {1: 0.001, 2: 0.2}, "id_js": {1: 0.01, 2: 0.02}}
    seeds = {"id_x": (33.0, 34.0), "id_js": (32.0, 29.0), "transformer": (30.0, 30.0)}
    for method, scores in seeds.items():
        for seed, bleu in enumerate(scores, 1):
            write_run(tmp_path, Cell("de-en", method, seed), bleu, worse(0.5, seed * len(method)))

    class Fixed:
        def test(self, what, baseline, systems, tokenize):
            seed = int(what.rpartition(" ")[2])
            return {name: values[name][seed] for name in systems}

    table = build(tmp_path, bootstrap=Fixed())
    assert table["bleu"]["id_x"]["de-en"]["p"] == {1: 0.001, 2: 0.2}
    rows = [" ".join(line.split()) for line in markdown(table).split("\n") if line.split()[:4] == ["|", "|", "p", "|"]]
    assert rows == ["| | p | seeds disagree |", "| | p | 0.200 |"]


# -- notes


def test_another_corpus_has_no_published_numbers(tmp_path):
    for method, bleu in (("transformer", 34.17), ("id_x", 32.41)):
        write_run(tmp_path, Cell("de-en", method, 1), bleu, corpus="multi30k_de_en", lines=29_000)
    table = build(tmp_path)
    text = markdown(table)
    assert text.startswith("# BLEU on multi30k_de_en\n")
    assert "published |" not in text and "33.07" not in text and "difference" not in text and "49.98M" not in text
    note = (
        "without published numbers, as this is not the text of table 2: de-en (multi30k_de_en, 29,000 training pairs)"
    )
    assert table["notes"] == [note]
    assert table["averages"]["id_x"]["published"] is None
    assert [origin for _, origin, _ in bars(table)] == ["ours", "ours"]


def test_a_column_of_the_paper_beside_another(tmp_path):
    write_run(tmp_path, Cell("de-en", "id_x", 1), 36.0)
    write_run(tmp_path, Cell("es-en", "id_x", 1), 20.0, lines=4_686)
    table = build(tmp_path)
    assert table["title"] == "BLEU on IWSLT'14 Xx-En and iwslt14_es_en"
    assert [table["bleu"]["id_x"][pair]["published"] for pair in ("de-en", "es-en")] == [36.10, None]
    assert table["averages"]["id_x"]["published"] is None


def test_the_corpus_of_what_has_not_run_comes_from_the_data_folder(tmp_path):
    add_to_plan(tmp_path, 2, "best", tmp_path / "data", [Cell("de-en", "id_x", 1), Cell("es-en", "id_x", 1)])
    manifest = {"corpus": "multi30k_de_en", "splits": {"train": {"lines": 29_000}}}
    write_json(tmp_path / "data" / "de-en" / "manifest.json", manifest)
    row = build(tmp_path)["bleu"]["id_x"]
    assert (row["de-en"]["published"], row["es-en"]["published"]) == (None, 41.82)


def test_the_published_recipe_has_no_note(two_pairs):
    assert build(two_pairs)["notes"] == []


def test_another_recipe_is_named(tmp_path):
    flags = ["--max-update", "300", "--lr=5e-4", "--keep-last-epochs", "2", "--cpu"]
    for method in ("transformer", "id_x"):
        options = {**RECIPE.options(method), "encoder-layers": 2, "num-workers": 0}
        options |= {"id-num-passes": 2} if method == "id_x" else {}
        write_run(tmp_path, Cell("de-en", method, 1), 30.0, options=options, flags=flags, precision="fp32")
    assert build(tmp_path)["notes"] == [
        "not the published recipe (configs/iwslt14_transformer_small): max-update 300 instead of 50000, precision fp32 "
        "instead of fp16, encoder-layers 2 (not set there); id_x: id-num-passes 2 instead of 3"
    ]


RECIPE_NOTE = "not the published recipe (configs/iwslt14_transformer_small): "


@pytest.mark.parametrize(
    ("batches", "flags", "note"),
    [
        ([(4, "1")], [], "batch 4 x 1 x 4096 tokens instead of 1 x 1 x 4096"),
        ([(8, "1")], ["--distributed-world-size", "8"], "batch 8 x 1 x 4096 tokens instead of 1 x 1 x 4096"),
        ([(1, "1"), (4, "1")], [], "batch 1 x 1 x 4096 then 4 x 1 x 4096 tokens instead of 1 x 1 x 4096"),
        ([(4, "1")], ["--max-tokens", "1024"], ""),  # the same batch
        ([(4, "2")], ["--max-tokens=1024", "--update-freq", "2"], "batch 4 x 2 x 1024 tokens instead of 1 x 1 x 4096"),
        ([(1, "1")], [], ""),
        ([(1, "1")], ["--max-tokens", "1024"], "max-tokens 1024 instead of 4096"),
        ([], [], ""),  # of a version that did not note it
    ],
)
def test_the_batch_of_several_processes_is_named(tmp_path, batches, flags, note):
    write_run(tmp_path, Cell("de-en", "id_x", 1), 30.0, batches=batches, flags=flags)
    assert build(tmp_path)["notes"] == [RECIPE_NOTE + note] * bool(note)


def test_the_rest_batch_of_three_gpus_is_named(tmp_path):
    wmt = read_recipe(ROOT / "configs" / "wmt17_transformer_big.yaml")
    facts = {"corpus": "wmt17_en_de", "lines": 4_400_000, "options": wmt.options("id_x")}
    write_run(tmp_path, Cell("en-de", "id_x", 1), None, batches=[(3, "5")], **facts)
    note = (
        "not the published recipe (configs/wmt17_transformer_big): batch 3 x 5 x 4096 tokens instead of 1 x 16 x 4096"
    )
    assert note in build(tmp_path, 3, recipe=wmt)["notes"]
    write_run(tmp_path, Cell("en-de", "id_x", 1), None, batches=[(2, "8"), (4, "4")], **facts)
    assert not [note for note in build(tmp_path, 3, recipe=wmt)["notes"] if "recipe" in note]


def test_batches_that_differ_within_a_column(tmp_path):
    for seed, batches in enumerate(([(1, "2")], [(2, "1")], [(4, "1")], []), 1):
        write_run(tmp_path, Cell("de-en", "id_x", seed), 30.0, corpus="mine", batches=batches)
    note = "de-en: the batch differs: 8,192 tokens (id_x seed 1, id_x seed 2); 16,384 tokens (id_x seed 3)"
    assert note in build(tmp_path)["notes"]


def test_a_method_of_ones_own_is_named(tmp_path):
    options = RECIPE.options("id_x")
    write_run(tmp_path, Cell("de-en", "mine", 1), 30.0, options=options)
    table = build(tmp_path)
    assert table["methods"][-1] == "mine" and table["bleu"]["mine"]["de-en"]["published"] is None
    assert table["notes"] == [
        "not the published recipe (configs/iwslt14_transformer_small): a method that it does not have"
    ]


def test_differences_within_a_column_are_said(tmp_path):
    other = SIGNATURE.replace("13a", "intl")
    for seed in (1, 2):
        write_run(tmp_path, Cell("de-en", "transformer", seed), 33.0)
        write_run(tmp_path, Cell("es-en", "transformer", seed), 33.0)
    write_run(tmp_path, Cell("de-en", "id_x", 1), 36.0, commit=f"{'a' * 40}-dirty", signature=other)
    write_run(tmp_path, Cell("de-en", "id_x", 2), 36.0, digest="e" * 64, updates=49_000)
    write_run(tmp_path, Cell("es-en", "id_x", 1), 36.0, commit=f"{'a' * 40}-dirty")
    table = build(tmp_path)
    notes = set(table["notes"])
    assert (
        f"de-en: the SacreBLEU signature differs: {SIGNATURE} (transformer, id_x seed 2); {other} (id_x seed 1)"
        in notes
    )
    assert "de-en: the number of updates differs: 50,000 (transformer, id_x seed 1); 49,000 (id_x seed 2)" in notes
    assert (
        "de-en: the data digest differs: dddddddddddd (transformer, id_x seed 1); eeeeeeeeeeee (id_x seed 2)" in notes
    )
    assert "es-en: the commit differs: 052888d06 (transformer); aaaaaaaaa-dirty (id_x)" in notes
    assert "de-en: the commit differs: 052888d06 (transformer, id_x seed 2); aaaaaaaaa-dirty (id_x seed 1)" in notes
    assert len(notes) == 5
    assert table["signatures"] == sorted((SIGNATURE, other))


# -- the picture and the command


def test_bars(two_pairs):
    series = bars(build(two_pairs))
    assert [(method, origin) for method, origin, _ in series] == [
        *(("transformer", "ours"), ("transformer", "published"), ("sage", "published"), ("rdrop", "published")),
        *(("switch", "published"), ("id_js", "published"), ("id_x", "ours"), ("id_x", "published")),
    ]
    assert series[0][2][0] == (34.0, 1.0)
    assert series[-2][2] == [(None, None), (41.0, None)]
    assert series[-1][2] == [(36.10, None), (41.82, None)]


def test_the_picture_has_labels_and_differs_in_grey(two_pairs, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kwargs: (figures.append(figure), path.touch()))
    draw_table(build(two_pairs), two_pairs / "table")
    (axes,) = figures[0].axes
    assert axes.get_ylabel() == "BLEU" and axes.get_ylim()[0] == 0
    assert [label.get_text() for label in axes.get_xticklabels()] == ["de-en", "es-en"]
    looks = {tuple(patch.get_facecolor()[:3]) + (patch.get_hatch(),) for patch in axes.patches}
    assert len(looks) == 3  # two methods of ours, and white with a hatch
    assert all(red == green == blue for red, green, blue, _ in looks)
    numbers = [text.get_text() for text in axes.texts]
    assert numbers[:4] == ["34.0", "38.8", "33.1", "38.9"] and numbers[-3:] == ["41.0", "36.1", "41.8"]


def test_eight_pairs_take_two_rows(tmp_path):
    for pair in TABLES[2].pairs:
        write_run(tmp_path, Cell(pair, "id_x", 1), 30.0)
    files = draw_table(build(tmp_path), tmp_path / "table")
    assert [path.name for path in files] == ["table.png", "table.pdf"]
    assert files[0].read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and files[1].read_bytes().startswith(b"%PDF")


@pytest.mark.filterwarnings("error")
def test_scores_near_zero_and_many_methods_fit_into_the_picture(tmp_path):
    from matplotlib.figure import Figure

    for method in TABLES[2].methods:
        write_run(tmp_path, Cell("de-en", method, 1), 0.02)
    figures, save = [], Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda one, *args, **kwargs: (figures.append(one), save(one, *args, **kwargs)))
        draw_table(build(tmp_path), tmp_path / "table")
    (legend,) = figures[0].legends
    box, whole = legend.get_window_extent(), figures[0].bbox
    assert box.x0 >= 0 and box.x1 <= whole.x1
    assert figures[0].axes[0].get_ylim()[1] >= 1


def test_the_command_writes_all_files(two_pairs, tmp_path, capsys):
    out = tmp_path / "ö ut"
    assert main.main(["table", str(two_pairs), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == (out / "table.md").read_text(encoding="utf-8")
    assert "paired bootstrap, es-en seed 1: id_x" in said.err and said.err.rstrip().endswith("the figure beside it")
    names = sorted(path.name for path in out.iterdir())
    assert names == ["p_values.json", "table.json", "table.md", "table.pdf", "table.png", "table.tsv"]
    content = json.loads((out / "table.json").read_text(encoding="utf-8"))
    cell = next(one for one in content["cells"] if one["folder"] == "de-en/transformer/seed2")
    assert (cell["score"]["bleu"], cell["training"]["parameters"], cell["settings"]["seed"]) == (34.0, 49_976_832, 2)
    assert content["bleu"]["transformer"]["de-en"]["scores"] == {"1": 33.0, "2": 34.0, "3": 35.0}


def test_a_table_without_matplotlib(two_pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert main.main(["table", str(two_pairs), "--out", str(tmp_path / "out")]) == 0
    assert "no figure: matplotlib is not installed\n" in capsys.readouterr().err
    assert not (tmp_path / "out" / "table.png").exists()


def test_files_are_written_whole_or_not_at_all(two_pairs, monkeypatch):
    command.write_table(two_pairs, None, None, two_pairs, lambda line: None)
    before = {path.name: path.read_bytes() for path in two_pairs.glob("table.*")}
    write_run(two_pairs, Cell("de-en", "id_x", 1), 36.0)

    def full(*words):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        command.write_table(two_pairs, None, None, two_pairs, lambda line: None)
    assert {path.name: path.read_bytes() for path in two_pairs.glob("table.*")} == before
    assert not list(two_pairs.glob(".table*"))


def test_a_table_that_the_folder_is_not_of_is_refused(two_pairs, capsys):
    add_to_plan(two_pairs, 2, "best", two_pairs / "data", [])
    assert main.main(["table", str(two_pairs), "--table", "3"]) == 2
    said = capsys.readouterr()
    message = f"--table '3': '{two_pairs}' holds the runs of table 2: leave --table out\n"
    assert (said.out, said.err) == ("", f"intra-distillation table: error: {message}")


@pytest.mark.parametrize(
    "text", ["{", '{"table": 2}', '{"table": 4, "checkpoint": "best", "data_root": "", "cells": []}']
)
def test_a_damaged_plan_is_refused(two_pairs, capsys, text):
    (two_pairs / "reproduce.json").write_text(text, encoding="utf-8")
    assert main.main(["table", str(two_pairs)]) == 2
    said = capsys.readouterr()
    assert "reproduce.json' is damaged: restore it, or delete it" in said.err and said.err.count("\n") == 1
    assert not (two_pairs / "table.md").exists()


def test_a_file_as_out_is_refused(two_pairs, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in ("file", "file/sub"):
        assert main.main(["table", str(two_pairs), "--out", str(tmp_path / out)]) == 2
        said = capsys.readouterr().err
        assert f"--out '{tmp_path / out}' cannot be made (" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere"], "results folder '/nowhere' does not exist: give one of scripts/reproduce_table2.sh or 3"),
        (["EMPTY"], "holds no run: needed is the results folder of scripts/reproduce_table2.sh or _table3.sh, or any"),
        (
            ["EMPTY", "--checkpoint", "new"],
            "--checkpoint is 'new': allowed are best, last and averageN, as in average5",
        ),
    ],
)
def test_mistakes(tmp_path, capsys, words, message):
    words = [str(tmp_path) if word == "EMPTY" else word for word in words]
    assert main.main(["table", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
