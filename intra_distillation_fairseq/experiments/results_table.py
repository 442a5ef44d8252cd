"""Puts the table of a results folder together: our scores beside the published ones, and what is needed to judge them.

The result is plain data (dicts, lists, numbers, texts), as it is written to table.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import table_notes
from intra_distillation_fairseq.experiments.cells import LAYOUT, Cell, Outcome, corpus_of, find_cells, outcome
from intra_distillation_fairseq.experiments.published import TABLES, Published
from intra_distillation_fairseq.experiments.recipes import Recipe
from intra_distillation_fairseq.experiments.significance import PairedBootstrap

BASELINE = "transformer"
Outcomes = dict[Cell, Outcome]


def choose_table(results: Path, plan: dict[str, Any]) -> int:
    """The table that a results folder is of: as planned, else by its pairs.

    Raises:
        UserError: there is nothing in it.
    """
    if plan:
        return plan["table"]
    cells = find_cells(results)
    if not cells:
        raise UserError(
            f"'{results}' holds no run: needed is the results folder of scripts/reproduce_table2.sh or _table3.sh, or "
            f"any other with runs of train.sh in {LAYOUT}"
        )
    return 3 if {cell.pair for cell in cells} <= set(TABLES[3].pairs) else 2


def build_table(
    results: Path,
    published: Published,
    *,
    plan: dict[str, Any],
    checkpoint: str,
    recipe: Recipe | None,
    bootstrap: PairedBootstrap,
) -> dict[str, Any]:
    """Read all cells and put the table together.

    Args:
        results: folder with a run folder for each cell.
        published: the table of the paper to set it beside.
        plan: as `cells.read_plan` gives it; without one, the cells are those that have a folder.
        checkpoint: the evaluations that count.
        recipe: the published settings; None where they are not at hand.
        bootstrap: gives the p-values.
    """
    found = {*plan.get("cells", []), *find_cells(results)}
    pairs = _in_order({cell.pair for cell in found}, published.pairs)
    own = _in_order({cell.method for cell in found}, published.methods)
    cells = sorted(found, key=lambda cell: (pairs.index(cell.pair), own.index(cell.method), cell.seed))
    outcomes = {cell: outcome(cell.folder(results), checkpoint) for cell in cells}
    corpora = {pair: _corpus(pair, outcomes, published, plan) for pair in pairs}
    shown = {pair for pair in pairs if corpora[pair]["of_paper"]}
    # The paper's own text has every row of the paper beside it, also those that nobody asked for.
    methods = _in_order({*own, *published.methods}, published.methods) if shown else own
    p_values = _p_values(results, outcomes, checkpoint, bootstrap)
    entries = {
        method: {pair: _entry(method, pair, outcomes, published if pair in shown else None, p_values) for pair in pairs}
        for method in methods
    }
    table = {
        "table": published.number,
        "title": _title(published, corpora),
        "checkpoint": checkpoint,
        "pairs": pairs,
        "methods": methods,
        "corpora": corpora,
        "has_published": bool(shown),
        "bleu": entries,
        "averages": {method: _average(method, entries[method], published, corpora) for method in methods},
        "runs": {method: _runs(method, outcomes, published, bool(shown)) for method in methods},
        "signatures": sorted({result.score["bleu_signature"] for result in outcomes.values() if result.score}),
    }
    of_paper = {cell: result for cell, result in outcomes.items() if cell.pair in shown}
    table["notes"] = [
        *table_notes.of_cells(outcomes),
        *table_notes.of_corpora(corpora, published),
        *(table_notes.of_recipe(of_paper, recipe, published) if recipe else []),
        *table_notes.of_columns(outcomes),
    ]
    table["cells"] = [_facts(cell, result, results, p_values) for cell, result in outcomes.items()]
    return table


def _in_order(found: set[str], order: Sequence[str]) -> list[str]:
    return [name for name in order if name in found] + sorted(found - set(order))


def _corpus(pair: str, outcomes: Outcomes, published: Published, plan: dict[str, Any]) -> dict[str, Any]:
    """What text a column is about. Nobody knows before the data is there: then it counts as the paper's."""
    found = {
        (result.corpus, result.train_lines) for cell, result in outcomes.items() if cell.pair == pair and result.record
    }
    if not found and plan:
        found = {corpus_of(Path(plan["data_root"]) / pair)} - {("", None)}
    return {
        "names": sorted({name for name, _ in found}),
        "train_lines": sorted({lines for _, lines in found if lines is not None}),
        "of_paper": pair in published.pairs and all(published.is_of_paper(pair, *one) for one in found),
    }


def _title(published: Published, corpora: dict[str, dict[str, Any]]) -> str:
    others = {name or "an unknown corpus" for one in corpora.values() if not one["of_paper"] for name in one["names"]}
    if not others:
        return f"Table {published.number}: BLEU on {published.title}"
    own = f"{published.title} and " if any(one["of_paper"] for one in corpora.values()) else ""
    return f"BLEU on {own}{', '.join(sorted(others)) if len(others) < 3 else f'{len(others)} corpora'}"


def _p_values(
    results: Path, outcomes: Outcomes, checkpoint: str, bootstrap: PairedBootstrap
) -> dict[Cell, float | None]:
    """p-value of each cell that is done against the baseline's of the same pair and seed."""
    values: dict[Cell, float | None] = {}
    done = [cell for cell, result in outcomes.items() if result.state == "done"]
    for base in done:
        systems = {cell.method: cell for cell in done if (cell.pair, cell.seed) == (base.pair, base.seed)}
        if base.method == BASELINE and len(systems) > 1:
            del systems[BASELINE]
            baseline, *others = (cell.folder(results) / "eval" / checkpoint for cell in (base, *systems.values()))
            tokenize = outcomes[base].score["inputs"]["evaluation"]["tokenize"]
            what = f"{base.pair} seed {base.seed}"
            tested = bootstrap.test(what, baseline, dict(zip(systems, others)), tokenize)
            values |= {cell: tested[name] for name, cell in systems.items()}
    return values


def _entry(
    method: str, pair: str, outcomes: Outcomes, published: Published | None, p_values: dict[Cell, float | None]
) -> dict[str, Any]:
    """One method on one pair, over its seeds."""
    own = {cell.seed: (cell, result) for cell, result in outcomes.items() if (cell.method, cell.pair) == (method, pair)}
    scores = {seed: result.bleu for seed, (_, result) in sorted(own.items()) if result.bleu is not None}
    base = {cell.seed: result.bleu for cell, result in outcomes.items() if (cell.method, cell.pair) == (BASELINE, pair)}
    tests = {seed: p for seed in scores if (p := p_values.get(own[seed][0])) is not None}
    reference = published.bleu(method, pair) if published else None
    mean = statistics.fmean(scores.values()) if scores else None
    return {
        "mean": mean,
        "sd": statistics.stdev(scores.values()) if len(scores) > 1 else None,
        "scores": scores,
        "planned": len(own),
        "states": list(dict.fromkeys(result.text() for _, (_, result) in sorted(own.items()))) or ["not run"],
        "published": reference,
        "difference": None if mean is None or reference is None else mean - reference,
        "p": tests,
        # With several seeds the least favourable one; none of them counts where they point to different winners.
        "largest_p": max(tests.values(), default=None),
        "seeds_disagree": len({scores[seed] > base[seed] for seed in tests}) > 1,
    }


def _average(
    method: str, entries: dict[str, dict[str, Any]], published: Published, corpora: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Mean over the pairs that have a score, and the published one over the same pairs."""
    pairs = [pair for pair, entry in entries.items() if entry["mean"] is not None]
    complete = len(pairs) == len(entries) and all(len(one["scores"]) == one["planned"] for one in entries.values())
    mean = statistics.fmean(entries[pair]["mean"] for pair in pairs) if pairs else None
    seeds = set.intersection(*(set(one["scores"]) for one in entries.values()))
    by_seed = [statistics.fmean(one["scores"][seed] for one in entries.values()) for seed in sorted(seeds)]
    comparable = all(corpora[pair]["of_paper"] for pair in pairs or entries)
    reference = published.average(method, pairs or list(entries)) if comparable else None
    return {
        "mean": mean,
        "sd": statistics.stdev(by_seed) if complete and len(by_seed) > 1 else None,
        "pairs": len(pairs),
        "complete": complete,
        "published": reference,
        "difference": None if mean is None or reference is None else mean - reference,
    }


def _runs(method: str, outcomes: Outcomes, published: Published, has_published: bool) -> dict[str, Any]:
    """What the finished trainings of a method were like; lists hold each distinct value once."""
    own = {cell: result for cell, result in outcomes.items() if cell.method == method}
    finished = [result.finished for result in own.values() if result.finished]

    def values(key: str) -> list[Any]:
        return [one[key] for one in finished if one.get(key) is not None]

    return {
        "seeds": sorted({cell.seed for cell, result in own.items() if result.state == "done"}),
        "done": sum(result.state == "done" for result in own.values()),
        "planned": len(own),
        "parameters": sorted(set(values("parameters"))),
        "published_parameters": published.parameters.get(method) if has_published else None,
        "updates": sorted(set(values("updates"))),
        "median_seconds": statistics.median(values("seconds")) if values("seconds") else None,
        "median_tokens_per_second": statistics.median(values("tokens_per_second"))
        if values("tokens_per_second")
        else None,
        "peak_memory_mib": max(values("peak_memory_mib"), default=None),
        "peak_memory_of": sorted(set(values("peak_memory_of"))),
    }


def _facts(cell: Cell, result: Outcome, results: Path, p_values: dict[Cell, float | None]) -> dict[str, Any]:
    """Everything about one cell."""
    return {
        "pair": cell.pair,
        "method": cell.method,
        "seed": cell.seed,
        "folder": cell.name,
        "state": result.state,
        "update": result.update,
        "host": result.host,
        "step": result.step,
        "reason": result.reason,
        "log": result.log,
        "corpus": result.corpus,
        "train_lines": result.train_lines,
        "p": p_values.get(cell),
        "score": result.score,
        "training": result.finished,
        "settings": result.record.get("settings", {}),
        "versions": result.versions,
        "batches": result.batches,
    }
