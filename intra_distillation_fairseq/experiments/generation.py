"""Translates a binarised test set with fairseq-generate and reads its output."""

from __future__ import annotations

from pathlib import Path

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.launch import TASK, USER_DIR
from intra_distillation_fairseq.experiments.prepared import PreparedData
from intra_distillation_fairseq.experiments.recipes import Evaluation


def generate_command(
    executable: str, data: PreparedData, checkpoint: Path, evaluation: Evaluation, *, cpu: bool
) -> list[str]:
    """The words of fairseq-generate on the test set.

    The precision is float32 whatever the training's, as published. `--required-batch-size-multiple 1` keeps
    fairseq-fixed from dropping sentences (P1) even if the plugin's mend were not in place.
    """
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
        UserError: a sentence is missing or there twice.
    """
    found: dict[int, str] = {}
    for line in output.read_bytes().decode("utf-8").split("\n"):
        if is_hypothesis(line):
            number, _, text = line.split("\t", 2)
            if int(number[2:]) in found:
                raise UserError(
                    f"'{output}' has two translations of sentence {number[2:]}: evaluate again with --force"
                )
            found[int(number[2:])] = text
    missing = sorted(set(range(max(found, default=-1) + 1)) - found.keys())
    if missing:
        raise UserError(f"'{output}' has no translation of {len(missing)} sentences, the first is number {missing[0]}")
    return [found[number] for number in sorted(found)]
