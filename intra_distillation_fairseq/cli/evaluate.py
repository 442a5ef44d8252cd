"""`intra-distillation evaluate`: translate the test set with a run's checkpoint and score it."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.paths import check_for_fairseq
from intra_distillation_fairseq.experiments.prepared import PreparedData, open_prepared
from intra_distillation_fairseq.experiments.recipes import evaluation_as_dict, evaluation_from
from intra_distillation_fairseq.experiments.runs import RunFolder
from intra_distillation_fairseq.experiments.translation import TranslationFailed, raw_references, translate_and_score
from intra_distillation_fairseq.files import file_sha256, lock, read_json, write_json

_AVERAGE = re.compile(r"average([1-9]\d*)\Z")


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of evaluate.sh."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="run folder of train.sh")
    parser.add_argument(
        "--data", type=Path, metavar="DATA", help="prepared data folder (default: the one it was trained on)"
    )
    parser.add_argument(
        "--checkpoint",
        default="best",
        help="best (lowest validation loss), last, or averageN: mean of the newest N epochs (default: %(default)s)",
    )
    parser.add_argument("--cpu", action="store_true", help="keep off the GPU")
    parser.add_argument("--force", action="store_true", help="translate and score again even if that is done")


def run(args: argparse.Namespace) -> int:
    """Evaluate; returns the exit status."""
    folder = RunFolder(args.run_dir)
    record = folder.read()
    if record is None:
        raise UserError(
            f"'{args.run_dir}' is not a run folder, it has no run.json: train it with scripts/train.sh first"
        )
    check_for_fairseq("RUN_DIR", folder.folder)
    sources = _sources(folder, args.checkpoint)
    data = open_prepared(args.data or Path(record["data"]), ("test",))
    if data.dictionary_digest != record["dictionary_digest"]:
        raise UserError(
            f"the dictionaries of '{data.folder}' are not those the model was trained with: evaluate on "
            f"'{record['data']}', or on one prepared with its sentencepiece model"
        )
    sentences = len(raw_references(data))
    with lock(folder.folder / "eval" / args.checkpoint / ".lock", "the evaluation folder"):
        return _evaluate(args, folder, record, sources, data, sentences)


def check_checkpoint_name(name: str) -> int:
    """How many epochs a value of --checkpoint averages; 0 for best and last.

    Raises:
        UserError: it is none of them.
    """
    match = _AVERAGE.match(name)
    if not match and name not in ("best", "last"):
        raise UserError(f"--checkpoint is '{name}': allowed are best, last and averageN, as in average5")
    return int(match[1]) if match else 0


def _sources(folder: RunFolder, name: str) -> list[Path]:
    """The checkpoint files that `--checkpoint` means.

    Raises:
        UserError: an unknown name, a missing file, or too few epochs to average.
    """
    if name in ("best", "last"):
        path = folder.folder / f"checkpoint_{name}.pt"
        if not path.exists():
            there = ", ".join(path.name for path in folder.checkpoints()) or "no checkpoint"
            raise UserError(f"--checkpoint '{name}': '{path}' does not exist (the folder has {there}): train first")
        return [path]
    number = check_checkpoint_name(name)
    paths = folder.epoch_checkpoints()
    if len(paths) < number:
        raise UserError(
            f"--checkpoint '{name}' needs {number} epoch checkpoints (checkpoint<epoch>.pt), '{folder.folder}' has "
            f"{len(paths)}: train more epochs, and keep more of them with keep-last-epochs in the config"
        )
    return paths[:number]


def _evaluate(
    args: argparse.Namespace,
    folder: RunFolder,
    record: dict[str, Any],
    sources: list[Path],
    data: PreparedData,
    sentences: int,
) -> int:
    out = folder.folder / "eval" / args.checkpoint
    out_score, link = out / "score.json", out / ".checkpoint.pt"
    shown = args.run_dir / out_score.relative_to(folder.folder)  # as the user gave it
    evaluation = evaluation_from(record["evaluation"])
    # Asked before the checkpoints are kept: a run that had finished does not exchange them any more.
    finished = (read_json(folder.finished) or {}).get("time")
    kept = [_keep(path, out / f".source{index}.pt") for index, path in enumerate(sources)]
    try:
        inputs = {
            "checkpoints": [file_sha256(path) for path in kept],
            "test": [file_sha256(path) for path in _test_files(data)],
            "evaluation": evaluation_as_dict(evaluation),
        }
        old = read_json(out_score)
        if not args.force and isinstance(old, dict) and old.get("inputs") == inputs and _complete(out, sentences):
            if "finished" not in old or old["finished"] != finished:
                write_json(out_score, {**old, "finished": finished})
            print("already evaluated, nothing to do (--force does it again)", file=sys.stderr)
            print(_line(old, data, shown))
            return 0
        out_score.unlink(missing_ok=True)  # it belongs to the texts that are replaced now
        started = time.monotonic()
        try:
            facts = _facts(kept[0], averaged=len(kept) > 1)  # before the translation: it tells a file that is refused
            checkpoint = _averaged(kept, link) if args.checkpoint not in ("best", "last") else kept[0]
        except UserError as error:
            message = str(error)
            for name, path in zip(kept, sources):
                message = message.replace(str(name), str(path))
            raise UserError(message) from None
        try:
            values = translate_and_score(data, checkpoint, evaluation, out, cpu=args.cpu)
        except TranslationFailed as failure:
            print(f"error: {failure}", file=sys.stderr)
            return failure.status
        result = {
            **values,
            **facts,
            "lowercased": evaluation.lowercase,
            "checkpoint": args.checkpoint,
            "files": [path.name for path in sources],
            "pair": data.pair,
            "seconds": round(time.monotonic() - started, 1),
            "finished": finished,
            "inputs": inputs,
        }
        write_json(out_score, result)
        print(_line(result, data, shown))
        return 0
    finally:
        for path in [*kept, link]:
            path.unlink(missing_ok=True)


def _keep(source: Path, link: Path) -> Path:
    """A second name for a checkpoint's bytes, so that a training that goes on cannot exchange them meanwhile."""
    link.unlink(missing_ok=True)
    try:
        os.link(source, link)
    except OSError:  # a file system without hard links
        link.write_bytes(source.read_bytes())
    return link


def _averaged(paths: list[Path], output: Path) -> Path:
    from intra_distillation_fairseq import checkpoints  # imports torch

    checkpoints.average(paths, output)
    return output


def _facts(checkpoint: Path, *, averaged: bool) -> dict[str, Any]:
    from intra_distillation_fairseq import checkpoints  # imports torch

    facts = checkpoints.facts(checkpoint)
    # The validation loss of a mean of models is not the newest one's, and nobody measured it.
    return {"update": facts.update, "valid_loss": None if averaged else facts.valid_loss}


def _test_files(data: PreparedData) -> list[Path]:
    stem = data.bin / f"test.{data.pair}.{data.source_lang}"
    return [stem.with_name(stem.name + ".bin"), stem.with_name(stem.name + ".idx"), data.references]


def _complete(out: Path, sentences: int) -> bool:
    texts = [out / "hypotheses.txt", out / "references.txt"]
    return all(path.is_file() and path.read_bytes().count(b"\n") == sentences for path in texts)


def _line(result: dict[str, Any], data: PreparedData, path: Path) -> str:
    where = f"{data.pair} test, checkpoint {result['checkpoint']} (update {result['update']})"
    return (
        f"{where}: BLEU {result['bleu']:.2f}, chrF {result['chrf']:.2f}, {result['sentences']} sentences, "
        f"{result['seconds']:.0f} s -> {path}"
    )
