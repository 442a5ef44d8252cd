"""The results of an ablation: one line for each variant, from whatever its run folders hold."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.experiments.ablations import Ablation, Variant
from intra_distillation_fairseq.experiments.cells import Outcome, outcome
from intra_distillation_fairseq.experiments.results_table import BASELINE
from intra_distillation_fairseq.experiments.run_series import CHECKPOINT
from intra_distillation_fairseq.experiments.table_text import DASH, grid, hours, number

_TSV = ("name", "value", "seed", "state", "bleu", "change", "best_valid_loss", "updates", "seconds")


def run_folder(results: Path, variant: Variant, seed: int) -> Path:
    """Where a run of an ablation lies."""
    return results / variant.name / f"seed{seed}"


def build_ablation_table(ablation: Ablation, results: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Scores, losses (bits per token) and training times (s) of all runs, and their means for each variant.

    Args:
        ablation: what was run.
        results: folder of the runs.
        seeds: of each variant.
    Returns:
        For `markdown` and `tsv`, and as JSON. `change` is against the baseline of the same seed; a mean is over the
        seeds that have a value, None where none has.
    """
    found = {
        (v.name, seed): outcome(run_folder(results, v, seed), CHECKPOINT) for v in ablation.variants for seed in seeds
    }
    runs = [
        _run(variant, seed, found[variant.name, seed], found.get((BASELINE, seed)))
        for variant in ablation.variants
        for seed in seeds
    ]
    signatures = sorted({one.score["bleu_signature"] for one in found.values() if one.score})
    return {
        "format": 1,
        "kind": ablation.kind,
        "title": ablation.title,
        "column": ablation.column,
        "corpora": sorted({one.corpus for one in found.values() if one.corpus}),
        "checkpoint": CHECKPOINT,
        "bleu_signatures": signatures,
        "variants": [
            _means(variant, [run for run in runs if run["name"] == variant.name]) for variant in ablation.variants
        ],
        "runs": runs,
    }


def markdown(table: dict[str, Any]) -> str:
    """The table with the lines under it."""
    several = any(one["seeds"] > 1 for one in table["variants"])
    header = ["run", table["column"], "BLEU", "change", "best valid loss", "time of a run", *(["seeds"] * several)]
    rows = [
        [
            *(one["name"], one["value"], _spread(one["bleu"], one["bleu_sd"], ".2f"), number(one["change"], "+.2f")),
            *(number(one["best_valid_loss"], ".3f"), DASH if one["seconds"] is None else hours(one["seconds"])),
            *([f"{one['done']} of {one['seeds']}"] * several),
        ]
        for one in table["variants"]
    ]
    corpus = f" on {', '.join(table['corpora'])}" if table["corpora"] else ""
    lines = [
        f"Checkpoint: {table['checkpoint']}. BLEU: {'; '.join(table['bleu_signatures']) or 'nothing scored yet'}.",
        f"Change: BLEU against {BASELINE} of the same seed. Valid loss: label-smoothed cross-entropy, bits per token.",
    ]
    if several:
        lines.append("Means over the seeds; ±: their sample standard deviation.")
    missing = [f"- {one['name']}/seed{one['seed']}: {one['state']}" for one in table["runs"] if one["state"] != "done"]
    notes = "\n\nNot done:\n\n" + "\n".join(missing) if missing else ""
    return f"# {table['title']}{corpus}\n\n{grid(header, rows)}\n\n" + "\n".join(lines) + notes + "\n"


def tsv(table: dict[str, Any]) -> str:
    """One line for each run; an empty field where there is nothing to say."""
    lines = ["\t".join(_TSV)]
    lines += ["\t".join("" if run[key] is None else str(run[key]) for key in _TSV) for run in table["runs"]]
    return "\n".join(lines) + "\n"


def _run(variant: Variant, seed: int, result: Outcome, baseline: Outcome | None) -> dict[str, Any]:
    against = baseline.bleu if baseline and variant.name != BASELINE else None
    return {
        "name": variant.name,
        "value": variant.value,
        "seed": seed,
        "state": result.text(),
        "bleu": result.bleu,
        "change": None if result.bleu is None or against is None else round(result.bleu - against, 4),
        "best_valid_loss": result.finished.get("best_valid_loss"),
        "updates": result.finished.get("updates"),
        "seconds": result.finished.get("seconds"),
    }


def _means(variant: Variant, runs: list[dict[str, Any]]) -> dict[str, Any]:
    known = {key: [run[key] for run in runs if run[key] is not None] for key in runs[0]}
    means = {
        key: statistics.mean(known[key]) if known[key] else None
        for key in ("bleu", "change", "best_valid_loss", "seconds")
    }
    return {
        "name": variant.name,
        "value": variant.value,
        **means,
        "bleu_sd": statistics.stdev(known["bleu"]) if len(known["bleu"]) > 1 else None,
        "done": len(known["bleu"]),
        "seeds": len(runs),
    }


def _spread(value: float | None, deviation: float | None, form: str) -> str:
    return number(value, form) + (f" ± {deviation:{form}}" if deviation is not None else "")
