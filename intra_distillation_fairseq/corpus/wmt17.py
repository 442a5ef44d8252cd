"""orig/ and raw/ of WMT'17 English-German, by the steps of fairseq's prepare-wmt14en2de.sh."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.corpus.archives import copy_members
from intra_distillation_fairseq.corpus.newstest2014 import TestSet
from intra_distillation_fairseq.corpus.oddities import scan_all, write_report
from intra_distillation_fairseq.corpus.pairs import (
    Pair,
    Treat,
    Treatment,
    check_pair,
    hold_out,
    pack,
    process,
    read_chunks,
    unequal,
    write_splits,
)
from intra_distillation_fairseq.corpus.pipeline import Options, version
from intra_distillation_fairseq.corpus.stages import DataFolder, Stage, digests
from intra_distillation_fairseq.corpus.wmt17_archives import ARCHIVES
from intra_distillation_fairseq.corpus.workers import map_in_order
from intra_distillation_fairseq.errors import UserError

SOURCE, TARGET = "en", "de"
VALID_EVERY = 100
_TEST = "newstest2014"


@dataclass(frozen=True)
class Wmt17:
    """Where the text is and what to do to it.

    Attributes:
        archives: name of each archive (see `wmt17_archives`) -> its file and SHA-256.
        test: the test set.
        word_limits: ratio of lengths and most Moses tokens above which a pair is left out. None: any.
        replace_invalid: put U+FFFD where the text is not UTF-8.
        max_unpacked: bytes that an archive may unpack to.
    """

    archives: dict[str, tuple[Path, str]]
    test: TestSet
    word_limits: tuple[float, int] | None
    replace_invalid: bool
    max_unpacked: int

    def treatment(self) -> Treatment:
        """For the training text, which gives train and valid."""
        ratio, max_words = self.word_limits or (None, None)
        return Treatment(normalise=True, moses=True, aggressive=True, drop_empty=True, ratio=ratio, max_words=max_words)


def make_raw(folder: DataFolder, options: Options, text: Wmt17) -> dict[str, Any]:
    """Extract and clean; returns the stamp of the stage that made raw/."""
    inputs = {path.name: sha256 for path, sha256 in text.archives.values()} | text.test.sha256
    languages = list(options.languages)

    def extract(out: Path) -> dict[str, Any]:
        orig = out / "orig"
        orig.mkdir()
        lines = _extract_training_text(text, orig, options)
        pairs, odd = text.test.read(orig, text.replace_invalid, text.max_unpacked)
        if not pairs:
            raise UserError(f"{text.test.origin} has no sentence of newstest2014: get it again")
        write_splits(pack(_TEST, pairs), orig, options.languages, (_TEST,))
        return {"lines": lines, "test": {name: oddities.as_json() for name, oddities in odd.items()}}

    settings = {"languages": languages}
    if text.replace_invalid:  # only then, so that stamps of older versions still fit
        settings["replace_invalid_utf8"] = True
    extracted = folder.run(Stage("extract", settings, inputs, extract))
    lines = extracted["report"]["lines"]
    given, treatment = sum(lines.values()), text.treatment()

    def clean(out: Path) -> dict[str, Any]:
        orig, raw = folder.path / "orig", out / "raw"
        texts = [_sides(orig / archive.name, options) for archive in ARCHIVES]
        found = scan_all({path.name: path for sides in texts for path in sides}, options.jobs, text.replace_invalid)
        chunks = chain.from_iterable(read_chunks("train", *sides, text.replace_invalid) for sides in texts)
        arguments = (treatment, options.languages)
        treated = process(hold_out(chunks, VALID_EVERY), Treat, arguments, options.jobs, "clean train", given)
        write_splits(treated, raw, options.languages, ("train", "valid"))
        few = f"too little training text: of {given} pairs, fewer than {VALID_EVERY} are left after cleaning"
        kept = {split: check_pair(raw / split, options.languages, few) for split in ("train", "valid")}
        test = read_chunks("test", *_sides(orig / _TEST, options))
        write_splits(process(test, TreatSource, arguments, 1, "clean test"), raw, options.languages, ("test",))
        kept["test"] = check_pair(raw / "test", options.languages, "newstest2014 is empty")
        files = {name: oddities.as_json() for name, oddities in found.items()} | extracted["report"].get("test", {})
        left_out = {"train and valid": given - kept["train"] - kept["valid"], "test": 0}
        return {
            "lines": kept,
            "given_lines": lines,
            "oddities": write_report(out, files, left_out),
            "held_out_before_filter": given // VALID_EVERY,
            "test_sets": [{"name": "newstest2014", "lines": kept["test"], "from": text.test.origin}],
            "inputs": inputs,
        }

    settings = {
        "train": treatment.settings(),
        "test": "source as train, reference as it is",
        "valid_every": VALID_EVERY,
        "corpora": [archive.name for archive in ARCHIVES],
        "languages": languages,
        "replace_invalid_utf8": text.replace_invalid,
        "sacremoses": version("sacremoses"),
        "unicode": unicodedata.unidata_version,
    }
    return folder.run(Stage("clean", settings, digests(extracted), clean))


class TreatSource:
    """Treats the source of test pairs as training text and leaves the reference, and every pair, as it is.

    Args:
        treatment: of the training text.
        languages: source and target.
    """

    def __init__(self, treatment: Treatment, languages: tuple[str, str]) -> None:
        self._treat = Treat(replace(treatment, drop_empty=False, ratio=None, max_words=None), languages)

    def __call__(self, pairs: list[Pair]) -> list[Pair]:
        """Return the same pairs with the source treated."""
        return [(treated, reference) for (treated, _), (_, reference) in zip(self._treat(pairs), pairs)]


def _extract_training_text(text: Wmt17, orig: Path, options: Options) -> dict[str, int]:
    """Copy both sides of each corpus to ORIG/NAME.LANGUAGE; returns name -> lines."""
    tasks = []
    for archive in ARCHIVES:
        members = {f"{archive.inner}.{lang}": orig / f"{archive.name}.{lang}" for lang in options.languages}
        tasks.append((text.archives[archive.name][0], members, text.max_unpacked))
    counted = list(map_in_order(_extract, tasks, min(options.jobs, len(tasks))))
    for (_, members, _), counts in zip(tasks, counted):
        both = [counts[name] for name in members]
        if both[0] != both[1]:
            raise unequal(tuple(members), both)
    return {archive.name: max(counts.values()) for archive, counts in zip(ARCHIVES, counted)}


def _extract(task: tuple[Path, dict[str, Path], int]) -> dict[str, int]:
    return copy_members(*task)


def _sides(stem: Path, options: Options) -> tuple[Path, Path]:
    source, target = (stem.with_name(f"{stem.name}.{lang}") for lang in options.languages)
    return source, target
