"""Translates the test set of a prepared data folder with one checkpoint, and scores it."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import devices, generation, processes
from intra_distillation_fairseq.experiments.prepared import PreparedData, count_binarised, raw_lines
from intra_distillation_fairseq.experiments.recipes import Evaluation
from intra_distillation_fairseq.experiments.scores import score
from intra_distillation_fairseq.files import write_text
from intra_distillation_fairseq.progress import Progress

_SPEED = re.compile(
    r"Translated [\d,]+ sentences \([\d,]+ tokens\) in ([\d.]+)s \(([\d.]+) sentences/s, ([\d.]+) tokens/s\)"
)


class TranslationFailed(UserError):
    """fairseq-generate did not end well.

    Attributes:
        status: its exit status; 128 + signal where a signal ended it.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def raw_references(data: PreparedData) -> list[str]:
    """The raw references of the test set.

    Raises:
        UserError: they are missing, or not as many as the binarised sentences that would be translated.
    """
    references = raw_lines(data.references)
    binarised = count_binarised(data, "test")
    if binarised is not None and binarised != len(references):
        raise UserError(
            f"the test set in '{data.bin}' would give {binarised} hypotheses for the {len(references)} references of "
            f"'{data.references}': prepare the data folder again"
        )
    return references


def translate_and_score(
    data: PreparedData, checkpoint: Path, evaluation: Evaluation, out: Path, *, cpu: bool, label: str = "translate"
) -> dict[str, Any]:
    """Translate the test set with fairseq-generate and score it.

    Args:
        data: the prepared folder, with its binarised test set.
        checkpoint: what translates.
        evaluation: how to translate and score.
        out: folder, made if need be; gets hypotheses.txt, references.txt, generate.txt and generate.log.
        cpu: keep off the GPU.
        label: what the progress is called.
    Returns:
        What `scores.score` gives; `seconds`, the time of all of it; and what fairseq reports of the search alone:
        `translation_seconds`, `sentences_per_second`, `tokens_per_second` (of the translations), None where it reports
        nothing.
    Raises:
        TranslationFailed: fairseq-generate failed; why, or the end of its log, has been printed.
        UserError: as many hypotheses as references are not to be had.
    """
    started = time.monotonic()
    references = raw_references(data)
    out.mkdir(parents=True, exist_ok=True)
    hypotheses = _translate(data, checkpoint, evaluation, out, len(references), cpu=cpu, label=label)
    _write_lines(out / "hypotheses.txt", _cased(hypotheses, evaluation.lowercase))
    _write_lines(out / "references.txt", _cased(references, evaluation.lowercase))
    values = score(hypotheses, references, lowercase=evaluation.lowercase, tokenize=evaluation.tokenize)
    return {**values, **_speed(out), "seconds": round(time.monotonic() - started, 1)}


def _translate(
    data: PreparedData, checkpoint: Path, evaluation: Evaluation, out: Path, total: int, *, cpu: bool, label: str
) -> list[str]:
    command = generation.generate_command(
        processes.fairseq_command("fairseq-generate"),
        data,
        checkpoint,
        evaluation,
        cpu=cpu or not devices.probe()["devices"],
    )
    output, log = _outputs(out)
    progress, done = Progress(label, total, "sentences"), 0

    def follow(line: str) -> None:
        nonlocal done
        if generation.is_hypothesis(line):
            done += 1
            progress.show(done)

    # Without this process nobody would score its output, and the next one would write into the same files.
    status = processes.run_logged(command, output, log, follow=follow, dies_with_us=True)
    progress.close()
    if status:
        last = processes.tail(log, 1)
        # A line of ours says all; the log before it is mostly fairseq's list of settings.
        print(last if last.startswith("error: ") else processes.tail(log), file=sys.stderr)
        how = processes.describe_status(status)
        raise TranslationFailed(f"fairseq-generate ended with {how}; its log, of which this is the end: {log}", status)
    hypotheses = generation.read_hypotheses(output)
    if len(hypotheses) != total:
        raise UserError(
            f"'{output}' has {len(hypotheses)} hypotheses and '{data.references}' has {total} references: "
            "nothing was scored"
        )
    return hypotheses


def _outputs(out: Path) -> tuple[Path, Path]:
    """Standard output and standard error of fairseq-generate."""
    return out / "generate.txt", out / "generate.log"


def _speed(out: Path) -> dict[str, float | None]:
    """fairseq's own clock, which runs during the search only. Its log goes to either file."""
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in reversed(_outputs(out)) if path.exists())
    found = next((match for text in texts if (match := _SPEED.search(text))), None)
    seconds, sentences, tokens = map(float, found.groups()) if found else (None, None, None)
    return {"translation_seconds": seconds, "sentences_per_second": sentences, "tokens_per_second": tokens}


def _cased(lines: list[str], lowercase: bool) -> list[str]:
    return [line.lower() for line in lines] if lowercase else lines


def _write_lines(path: Path, lines: list[str]) -> None:
    write_text(path, "".join(f"{line}\n" for line in lines))
