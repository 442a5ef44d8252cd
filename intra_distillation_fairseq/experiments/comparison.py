"""What runs on the same data gave, side by side, and what one gets without a model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.prepared import PreparedData, raw_lines
from intra_distillation_fairseq.experiments.recipes import Evaluation
from intra_distillation_fairseq.experiments.runs import RunFolder
from intra_distillation_fairseq.experiments.scores import score
from intra_distillation_fairseq.files import read_json

_HEADER = ("method", "BLEU", "chrF", "valid loss", "updates", "seconds", "files")


def run_result(folder: RunFolder) -> dict[str, Any]:
    """Scores, validation loss (bits per token, of the scored checkpoint) and training time (s) of a finished run.

    Raises:
        UserError: the run is not there, has not finished, or was not evaluated.
    """
    record, finished = folder.read(), read_json(folder.finished)
    scores = folder.score("best")
    if record is None or finished is None:
        raise UserError(f"'{folder.folder}' is not a finished run: train it with scripts/train.sh first")
    if scores is None:
        raise UserError(f"'{folder.folder}' was not evaluated: run scripts/evaluate.sh on it first")
    return {
        "method": record["settings"]["method"],
        "bleu": scores["bleu"],
        "chrf": scores["chrf"],
        "valid_loss": scores["valid_loss"],
        "updates": finished["updates"],
        "seconds": finished["seconds"],
        "bleu_signature": scores["bleu_signature"],
        "chrf_signature": scores["chrf_signature"],
        "sentences": scores["sentences"],
        "files": str(folder.folder),
    }


def baselines(data: PreparedData, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Scores of two answers that need no model: the source as it is, and always the same sentence.

    Args:
        data: the data folder.
        evaluation: how the runs were scored.
    Returns:
        Rows as those of `run_result`, without losses and times.
    """
    raw = data.folder / "raw"
    references = raw_lines(data.references)
    sources = raw_lines(raw / f"test.{data.source_lang}")
    # Of equally frequent sentences the first one in the text: Counter keeps their order.
    frequent = Counter(raw_lines(raw / f"train.{data.target_lang}")).most_common(1)[0][0]
    answers = {"(copy the source)": sources, "(most frequent sentence)": [frequent] * len(references)}
    return [
        {
            "method": name,
            **score(lines, references, lowercase=evaluation.lowercase, tokenize=evaluation.tokenize),
            **dict.fromkeys(("valid_loss", "updates", "seconds", "files")),
        }
        for name, lines in answers.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of plain text; a dash where there is nothing to say."""

    def cell(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    cells = [
        (
            row["method"],
            cell(row["bleu"], ".2f"),
            cell(row["chrf"], ".2f"),
            cell(row["valid_loss"], ".3f"),
            cell(row["updates"], ",d"),
            cell(row["seconds"], ".0f"),
            cell(row["files"] and relative(Path(row["files"])), "s"),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [_HEADER, *cells]) for column in range(len(_HEADER))]
    lines = []
    for line in (_HEADER, tuple("-" * width for width in widths), *cells):
        # Words to the left, numbers to the right.
        aligned = [
            text.ljust(width) if column in (0, len(_HEADER) - 1) else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths))
        ]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def relative(path: Path) -> str:
    """The path as seen from the current folder, if that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)
