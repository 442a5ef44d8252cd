"""Translates a binarised test set with fairseq-generate and reads its output."""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.launch import TASK, USER_DIR
from intra_distillation_fairseq.experiments.paths import check_for_fairseq
from intra_distillation_fairseq.experiments.prepared import PreparedData
from intra_distillation_fairseq.experiments.recipes import Evaluation

_HYPOTHESIS = re.compile(r"D-([0-9]{1,18})\t[^\t]*\t(.*)", re.DOTALL)


def generate_command(
    executable: str, data: PreparedData, checkpoint: Path, evaluation: Evaluation, *, cpu: bool
) -> list[str]:
    """The words of fairseq-generate on the test set.

    The precision is float32 whatever the training's, as published. `--required-batch-size-multiple 1` keeps
    fairseq-fixed from dropping sentences (P1) even if the plugin's mend were not in place.

    Raises:
        UserError: fairseq would not take the checkpoint's path for one file.
    """
    check_for_fairseq("checkpoint", checkpoint)
    return [
        *(executable, str(data.bin), "--user-dir", str(USER_DIR), "--task", TASK),
        *("--source-lang", data.source_lang, "--target-lang", data.target_lang, "--gen-subset", "test"),
        *("--path", str(checkpoint), "--post-process", "sentencepiece", "--required-batch-size-multiple", "1"),
        *(
            "--beam",
            str(evaluation.beam),
            "--lenpen",
            str(evaluation.lenpen),
            "--batch-size",
            str(evaluation.batch_size),
        ),
        *("--max-len-a", str(evaluation.max_len_a), "--max-len-b", str(evaluation.max_len_b)),
        # --scoring only because the default one needs a compiled library; the score itself is computed from the text.
        *("--num-workers", "0", "--no-progress-bar", "--scoring", "sacrebleu"),
        *(["--cpu"] if cpu else []),
    ]


def is_hypothesis(line: str) -> bool:
    """Tell whether a line of fairseq-generate's output is a detokenised translation."""
    return line.startswith("D-")


def read_hypotheses(output: Path) -> list[str]:
    """Translations in the order of the test set.

    Args:
        output: what fairseq-generate wrote to its standard output.
    Raises:
        UserError: a sentence is missing or there twice, or a line is damaged.
    """
    found: dict[int, str] = {}
    for number, raw in enumerate(output.read_bytes().split(b"\n"), start=1):
        if raw.startswith(b"D-"):
            sentence, text = _read_hypothesis(raw, f"'{output}' line {number}")
            if sentence in found:
                raise UserError(f"'{output}' has two translations of sentence {sentence}: evaluate again with --force")
            found[sentence] = text
    if missing := max(found, default=-1) + 1 - len(found):
        first = next(number for number in count() if number not in found)
        raise UserError(f"'{output}' has no translation of {missing} sentences, the first is number {first}")
    return [found[number] for number in sorted(found)]


def _read_hypothesis(raw: bytes, where: str) -> tuple[int, str]:
    """Number and text of a line "D-NUMBER<tab>SCORE<tab>TEXT"; other separators of Unicode belong to the text."""
    try:
        match = _HYPOTHESIS.fullmatch(raw.decode())
    except UnicodeDecodeError:
        match = None
    if not match:
        raise UserError(f"{where} is not a whole translation of fairseq-generate: evaluate again with --force")
    return int(match[1]), match[2]
