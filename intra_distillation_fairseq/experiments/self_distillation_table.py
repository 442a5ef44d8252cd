"""Table 1 of the paper from the finished rounds of self-distillation: plain data, and its texts."""

from __future__ import annotations

from typing import Any

from intra_distillation_fairseq.experiments.published import SELF_DISTILLATION_BLEU, SELF_DISTILLATION_PAIR, TABLES
from intra_distillation_fairseq.experiments.self_distillation import BASELINE, CHECKPOINT, Task
from intra_distillation_fairseq.experiments.significance import RESAMPLES, SEED, PairedBootstrap
from intra_distillation_fairseq.experiments.table_text import grid, number
from intra_distillation_fairseq.files import file_sha256, read_json

_SENSITIVITY = {  # key of the summary -> column
    "std": "std of sensitivity",
    "std_trimmed": "without top 1%",
    "ratio": "top 20% / rest",
    "gini": "Gini",
}
_TSV = ("round", "method", "bleu", "change", "p", "published", "valid_loss", "update", *_SENSITIVITY)


def build_table(task: Task, rounds: int, bootstrap: PairedBootstrap) -> dict[str, Any]:
    """Read the rounds from 0 on.

    Args:
        task: what was done.
        rounds: the last round that is finished and scored.
        bootstrap: gives the p-values.
    """
    data = task.data
    of_paper = data.pair == SELF_DISTILLATION_PAIR and TABLES[2].is_of_paper(
        data.pair, data.corpus, data.lines.get("train")
    )
    rows = [_row(task, number) for number in range(rounds + 1)]
    folders = {str(row["round"]): task.folder(row["round"]).folder / "eval" / CHECKPOINT for row in rows}
    baseline = folders.pop("0")
    tested = bootstrap.test("rounds", baseline, folders, task.recipe.evaluation.tokenize) if folders else {}
    for row in rows:
        row["change"] = row["bleu"] - rows[0]["bleu"] if row["round"] else None
        row["p"] = tested.get(str(row["round"]))
    differ = _differences(rows)
    if differ:  # such numbers cannot be compared
        for row in rows:
            row["sensitivity"] = None
    return {
        "table": 1,
        "pair": data.pair,
        "corpus": data.corpus,
        "of_paper": of_paper,
        "student": task.student,
        "seed": task.seed,
        "rows": rows,
        "sensitivity_differs": differ,
        "signatures": sorted({row["signature"] for row in rows}),
    }


def _row(task: Task, number: int) -> dict[str, Any]:
    folder = task.folder(number)
    score = folder.score(CHECKPOINT) or {}
    measured = read_json(folder.folder / "analysis" / f"sensitivity_{CHECKPOINT}.json") or {}
    current = measured.get("checkpoint_sha256") == file_sha256(task.model(number))
    # The paper's students are plain: another method's has no number of theirs beside it.
    known = number < len(SELF_DISTILLATION_BLEU) and task.method(number) == BASELINE
    return {
        "round": number,
        "method": task.method(number),
        "folder": str(folder.folder),
        "bleu": score["bleu"],
        "signature": score["bleu_signature"],
        "published": SELF_DISTILLATION_BLEU[number] if known else None,
        "valid_loss": score["valid_loss"],
        "update": score["update"],
        "sensitivity": measured["summary"] if current else None,
        # With the digest of the data: on another corpus, equal settings make other batches.
        "sensitivity_settings": {**measured["settings"], "data": measured["asked"]["data"]} if current else None,
    }


def _differences(rows: list[dict[str, Any]]) -> list[str]:
    """The settings in which the measured rounds differ, as in "batches (100 in round 0, 20 in round 1)"."""
    measured = {row["round"]: row["sensitivity_settings"] for row in rows if row["sensitivity_settings"]}
    lines = []
    for key in next(iter(measured.values()), {}):
        values = {place: settings.get(key) for place, settings in measured.items()}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{_short(value)} in round {place}" for place, value in values.items())
            lines.append(f"{key} ({shown})")
    return lines


def _short(value: object) -> str:
    """A setting's value; of a digest only the beginning."""
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def markdown(table: dict[str, Any]) -> str:
    """The table with the lines under it."""
    has_sensitivity = any(row["sensitivity_settings"] for row in table["rows"])
    header = ["round", "BLEU", "change", "p", "published" if table["of_paper"] else "published (another corpus)"]
    header += ["valid loss", *(_SENSITIVITY.values() if has_sensitivity else ())]
    lines = []
    for row in table["rows"]:
        name = f"{row['round']} (baseline)" if not row["round"] else f"{row['round']} ({row['method']} student)"
        texts = [name, number(row["bleu"], ".2f"), number(row["change"], "+.2f"), number(row["p"], ".3f")]
        texts += [number(row["published"], ".2f"), number(row["valid_loss"], ".3f")]
        if has_sensitivity:
            texts += [number((row["sensitivity"] or {}).get(key), ".4g") for key in _SENSITIVITY]
        lines.append(texts)
    corpus = f"{table['corpus'] or 'a corpus without a name'}, {table['pair']}"
    notes = [
        f"BLEU on the test set of {corpus}, seed {table['seed']}: {', '.join(table['signatures'])}.",
        f"p: sacrebleu's paired bootstrap against round 0 ({RESAMPLES:,} resamples, seed {SEED}); it tells nothing of "
        "the variation from seed to seed.",
        "Published: Table 1 of Xu, Koehn, Murray (EMNLP 2022), IWSLT'14 de-en"
        + ("." if table["of_paper"] else ": another corpus, whose numbers are not to be compared with these."),
        "Valid loss: label-smoothed cross-entropy of the scored checkpoint, bits per token.",
        *([_sensitivity_note(table)] if has_sensitivity else []),
    ]
    return f"# Table 1: self-distillation\n\n{grid(header, lines)}\n\n" + "\n".join(notes) + "\n"


def _sensitivity_note(table: dict[str, Any]) -> str:
    if table["sensitivity_differs"]:
        return (
            "Sensitivity: left out, as the rounds were measured with different settings: "
            f"{'; '.join(table['sensitivity_differs'])}."
        )
    one = next(row["sensitivity_settings"] for row in table["rows"] if row["sensitivity_settings"])
    return (
        f"Sensitivity: of the {one['objective'].replace('_', '-')} loss on {one['batches']} batches of {one['split']} "
        f"({one['tokens']:,} target tokens), seed {one['seed']}, dropout {'on' if one['dropout'] else 'off'}, "
        f"average: {one['average']}, {'' if one['normalised'] else 'not '}normalised."
    )


def tsv(table: dict[str, Any]) -> str:
    """One line for each round; an empty field where there is nothing to say."""
    lines = [list(_TSV)]
    for row in table["rows"]:
        values = {**(row["sensitivity"] or {}), **row}
        lines.append(["" if values.get(key) is None else str(values[key]) for key in _TSV])
    return "".join("\t".join(line) + "\n" for line in lines)
