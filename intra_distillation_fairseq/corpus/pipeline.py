"""The stages of every corpus once its raw text is there (subwords, encode, binarise), and the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.corpus import subwords
from intra_distillation_fairseq.corpus.binarise import binarise, check_binarised
from intra_distillation_fairseq.corpus.manifest import build_manifest
from intra_distillation_fairseq.corpus.oddities import REPORT
from intra_distillation_fairseq.corpus.pairs import check_pair, process, read_chunks, write_splits
from intra_distillation_fairseq.corpus.stages import DataFolder, Stage, digests
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.files import read_json, write_json

SPLITS = ("train", "valid", "test")
# What ends up in a data folder, beside the orig/ of a corpus that comes as an archive.
OUTPUTS = ("raw", REPORT, "spm", "dict.txt", "pieces", "bin", "manifest.json")


@dataclass(frozen=True)
class Options:
    """Options common to all corpora.

    Attributes:
        corpus: name for the manifest.
        languages: source and target.
        vocab_size: sentencepiece's number of pieces.
        vocab_size_at_most: where the text is too small for `vocab_size`, take as many as it gives.
        spm_train_on_all: learn the pieces from valid and test too, as published, and not from train only.
        jobs: number of processes.
        spm_lines: most lines, of both languages together, to learn the pieces from.
        piece_limits: ratio of lengths and most pieces above which a pair of train or valid is not encoded. None: any.
    """

    corpus: str
    languages: tuple[str, str]
    vocab_size: int
    vocab_size_at_most: bool
    spm_train_on_all: bool
    jobs: int
    spm_lines: int = subwords.TRAINING_OPTIONS["input_sentence_size"]
    piece_limits: tuple[float, int] | None = None


def version(*distributions: str) -> str:
    """Version of the first of these packages that is installed.

    Raises:
        UserError: none is.
    """
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise UserError(f"the package '{distributions[0]}' is not installed: run bash scripts/setup.sh")


def finish(folder: DataFolder, options: Options, raw: dict[str, Any]) -> dict[str, Any]:
    """Go from raw text to binarised data.

    Args:
        folder: locked; raw/ is made.
        options: see there.
        raw: the stamp of the stage that made raw/; its report has `lines` per split.

    Returns:
        The manifest, which is also written.
    """
    source, target = options.languages
    data = folder.path
    texts = [f"raw/{split}.{lang}" for split in SPLITS for lang in options.languages]
    # Sorted as `ls` lists them for the published command: the order of the text decides ties between pieces.
    train_on = sorted(name for name in texts if options.spm_train_on_all or name.startswith("raw/train."))
    lines = sum(raw["report"]["lines"][Path(name).stem] for name in train_on)
    raw_digests = digests(raw, "raw/")
    spm_version = version("sentencepiece")

    def make_subwords(out: Path) -> dict[str, Any]:
        (out / "spm").mkdir()
        files, pieces = [data / name for name in train_on], options.vocab_size
        try:
            subwords.train(files, pieces, out / "spm", lines, options.spm_lines)
        except subwords.VocabularyTooLarge as error:
            if not options.vocab_size_at_most:
                raise
            pieces = error.largest
            subwords.train(files, pieces, out / "spm", lines, options.spm_lines)
        types = subwords.write_dictionary(out / "spm/spm.vocab", out / "dict.txt")
        return {"pieces": pieces, "types": types}

    settings = {
        "vocab_size": options.vocab_size,
        "spm_train_on": train_on,
        "sentencepiece": spm_version,
        **subwords.TRAINING_OPTIONS,
    }
    if lines > options.spm_lines:
        settings["spm_lines_evenly_spaced"] = options.spm_lines
    learnt = folder.run(Stage("subwords", settings, {name: raw_digests[name] for name in train_on}, make_subwords))
    pieces = learnt["report"]["pieces"]
    if pieces < options.vocab_size:
        # Made by an earlier run that did not insist on the number.
        if not options.vocab_size_at_most:
            raise subwords.VocabularyTooLarge(options.vocab_size, pieces)
        folder.say(f"note: the text is too small for {options.vocab_size:,} pieces; it gives {pieces:,}")

    def make_pieces(out: Path) -> dict[str, Any]:
        lines = {}
        for split in SPLITS:
            chunks = read_chunks(split, data / f"raw/{split}.{source}", data / f"raw/{split}.{target}")
            arguments = (data / "spm/spm.model", split != "test", options.piece_limits)
            encoded = process(
                chunks, subwords.Encoder, arguments, options.jobs, f"encode {split}", raw["report"]["lines"][split]
            )
            write_splits(encoded, out / "pieces", options.languages, (split,))
            lines[split] = check_pair(
                out / "pieces" / split, options.languages, f"no pair of {split} is left once it is in pieces"
            )
        if lines["test"] != raw["report"]["lines"]["test"]:
            raise UserError(f"{lines['test']} encoded test lines of {raw['report']['lines']['test']}")
        return {"lines": lines}

    settings = {"sentencepiece": spm_version}
    if options.piece_limits:
        settings |= dict(zip(("ratio_in_pieces", "max_pieces"), options.piece_limits))
    inputs = {**raw_digests, **digests(learnt, "spm/spm.model")}
    encoded = folder.run(Stage("encode", settings, inputs, make_pieces))

    def make_binary(out: Path) -> dict[str, Any]:
        lines = encoded["report"]["lines"]
        # Each worker of fairseq-preprocess takes seconds to start.
        workers = max(1, min(options.jobs, lines["train"] // 20000))
        binarise(data, out / "bin", options.languages, workers, data / "logs" / "binarise.log")
        check_binarised(out / "bin", options.languages, lines, learnt["report"]["types"] - subwords.FAIRSEQ_SPECIALS)
        return {}

    settings = {"languages": list(options.languages), "fairseq": version("fairseq", "fairseq-fixed")}
    inputs = {**digests(encoded), **digests(learnt, "dict.txt")}
    binary = folder.run(Stage("binarise", settings, inputs, make_binary))

    manifest = build_manifest(options.corpus, options.languages, raw, learnt, encoded, binary)
    if read_json(data / "manifest.json") != manifest:
        write_json(data / "manifest.json", manifest)
    return manifest
