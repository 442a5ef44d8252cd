"""The texts of a table (see `results_table.build_table`): Markdown that also reads well in a terminal, and TSV."""

from __future__ import annotations

from typing import Any

from intra_distillation_fairseq.experiments.results_table import BASELINE
from intra_distillation_fairseq.experiments.significance import RESAMPLES, SEED

DASH = "-"
_TSV = ("method", "pair", "bleu", "sd", "seeds", "planned", "published", "difference", "p", "state")


def markdown(table: dict[str, Any]) -> str:
    """The whole table with the lines under it."""
    parts = [f"# {table['title']}", grid(*_scores(table)), grid(*_runs(table)), _explanations(table)]
    if table["notes"]:
        parts.append("Notes:\n\n" + "\n".join(f"- {_escape(note)}" for note in table["notes"]))
    return "\n\n".join(parts) + "\n"


def tsv(table: dict[str, Any]) -> str:
    """One line for each method and pair; an empty field where there is nothing to say."""
    lines = ["\t".join(_TSV)]
    for method in table["methods"]:
        for pair in table["pairs"]:
            entry = table["bleu"][method][pair]
            values = (
                *(method, pair, number(entry["mean"], ".4f", ""), number(entry["sd"], ".4f", ""), len(entry["scores"])),
                *(entry["planned"], number(entry["published"], ".2f", ""), number(entry["difference"], "+.4f", "")),
                *(number(entry["largest_p"], ".4f", ""), ", ".join(entry["states"])),
            )
            lines.append("\t".join(map(str, values)))
    return "\n".join(lines) + "\n"


def hours(seconds: float) -> str:
    """A duration as 12:34:56, without a limit to the hours."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def number(value: float | None, form: str, nothing: str = DASH) -> str:
    """A number in a format as of `format`, or what stands for one that there is not."""
    return nothing if value is None else format(value, form)


def _scores(table: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    pairs, several = table["pairs"], len(table["pairs"]) > 1
    lines = []
    for method in table["methods"]:
        entries = [table["bleu"][method][pair] for pair in pairs]
        average = table["averages"][method]
        columns = [*entries, average] if several else entries
        ours = [_score(entry) for entry in entries] + ([_mean(average, len(pairs))] if several else [])
        lines.append([method, "ours" if table["has_published"] else "BLEU", *ours])
        if table["has_published"]:
            lines.append(["", "published", *(number(one["published"], ".2f") for one in columns)])
            lines.append(["", "difference", *(number(one["difference"], "+.2f") for one in columns)])
        if method != BASELINE and any(entry["p"] for entry in entries):
            lines.append(["", "p", *map(_p, entries), *([""] if several else [])])
    return ["method", "", *pairs, *(["average"] if several else [])], lines


def _score(entry: dict[str, Any]) -> str:
    if entry["mean"] is None:
        return ", ".join(entry["states"])
    count = len(entry["scores"])
    partial = f" ({count} of {entry['planned']})" if count < entry["planned"] else ""
    return f"{entry['mean']:.2f}" + (f" ± {entry['sd']:.2f}" if entry["sd"] is not None else "") + partial


def _mean(average: dict[str, Any], pairs: int) -> str:
    if average["mean"] is None:
        return DASH
    deviation = f" ± {average['sd']:.2f}" if average["sd"] is not None else ""
    partial = f" (partial, {average['pairs']} of {pairs})" if not average["complete"] else ""
    return f"{average['mean']:.2f}{deviation}{partial}"


def _p(entry: dict[str, Any]) -> str:
    if not entry["p"]:
        return DASH
    return "seeds disagree" if entry["seeds_disagree"] else f"{entry['largest_p']:.3f}"


def _runs(table: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = [
        "method",
        "parameters",
        "updates",
        "time of a run",
        "target tokens/s",
        "peak memory",
        "seeds",
        "cells done",
    ]
    if table["has_published"]:
        header.insert(2, "published")
    lines = []
    for method in table["methods"]:
        run = table["runs"][method]
        memory = (
            f"{run['peak_memory_mib']:,.0f} MiB {'/'.join(run['peak_memory_of'])}" if run["peak_memory_of"] else DASH
        )
        line = [
            method,
            _range(run["parameters"]),
            _range(run["updates"]),
            DASH if run["median_seconds"] is None else hours(run["median_seconds"]),
            number(run["median_tokens_per_second"], ",.0f"),
            memory,
            str(len(run["seeds"])) if run["planned"] else DASH,
            f"{run['done']} of {run['planned']}" if run["planned"] else DASH,
        ]
        if table["has_published"]:
            parameters = run["published_parameters"]
            line.insert(2, DASH if parameters is None else f"{parameters / 1e6:g}M")
        lines.append(line)
    return header, lines


def _range(values: list[int]) -> str:
    if not values:
        return DASH
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _explanations(table: dict[str, Any]) -> str:
    lines = [f"Checkpoint: {table['checkpoint']}. BLEU: {'; '.join(table['signatures']) or 'nothing scored yet'}."]
    if table["has_published"]:
        lines.append("Published: Xu, Koehn, Murray (EMNLP 2022); number of seeds unknown, probably one.")
    if any(entry["sd"] is not None for row in table["bleu"].values() for entry in row.values()):
        lines.append("±: sample standard deviation over the seeds.")
    if any(entry["p"] for row in table["bleu"].values() for entry in row.values()):
        lines.append(
            f"p: sacrebleu's paired bootstrap against the {BASELINE} of the same seed ({RESAMPLES:,} resamples, seed "
            f"{SEED}), the largest over the seeds; it tells nothing of the variation from seed to seed."
        )
    if any(not one["complete"] and one["pairs"] for one in table["averages"].values()) and len(table["pairs"]) > 1:
        lines.append(
            "Partial averages are over the pairs that have a score, the published ones beside them over the same."
        )
    lines.append(
        "Time, tokens/s: medians over the runs; a run that was stopped counts its repeated work. Memory: maximum."
    )
    return "\n".join(lines)


def grid(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns; the first one to the left, numbers to the right."""
    cells = [[_escape(text) for text in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    left = [column < 1 or (column == 1 and not header[1]) for column in range(len(header))]

    def line(row: list[str]) -> str:
        aligned = [
            text.ljust(width) if to_left else text.rjust(width) for text, width, to_left in zip(row, widths, left)
        ]
        return "| " + " | ".join(aligned) + " |"

    rule = ["-" * width if to_left else "-" * (width - 1) + ":" for width, to_left in zip(widths, left)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
