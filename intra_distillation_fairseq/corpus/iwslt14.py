"""orig/ and raw/ of one pair of the IWSLT'14 archive, as the published steps make them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.corpus import wit3
from intra_distillation_fairseq.corpus.clean import count_lines, read_lines
from intra_distillation_fairseq.corpus.oddities import Oddities, scan_all, write_report
from intra_distillation_fairseq.corpus.pairs import (
    Pair,
    Treat,
    Treatment,
    check_pair,
    hold_out,
    pack,
    process,
    write_splits,
)
from intra_distillation_fairseq.corpus.pipeline import Options, version
from intra_distillation_fairseq.corpus.segments import join_segments
from intra_distillation_fairseq.corpus.stages import DataFolder, Stage, digests
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.files import file_sha256

TARGET = "en"
_MAX_WORDS = 175
_RATIO = 1.5
_VALID_EVERY = 23


@dataclass(frozen=True)
class Iwslt14:
    """Where the text is and what to do to it.

    Attributes:
        archive: 2014-01.tgz.
        archive_sha256: its checksum.
        consistent_test: treat the test as the training text (XML escapes undone, tokenised and detokenised).
        replace_invalid: put U+FFFD where the text is not UTF-8.
        max_unpacked: bytes that the archive may unpack to.
    """

    archive: Path
    archive_sha256: str
    consistent_test: bool
    replace_invalid: bool
    max_unpacked: int

    def treatments(self) -> tuple[Treatment, Treatment]:
        """For the training text and for the test text.

        As published, the test is lower-cased only. Where both shall be alike, the escapes are undone in both: the
        tokeniser would split them ("r & amp; d").
        """
        train = Treatment(
            unescape=self.consistent_test,
            moses=True,
            drop_empty=True,
            ratio=_RATIO,
            max_words=_MAX_WORDS,
            lowercase=True,
        )
        test = Treatment(unescape=self.consistent_test, moses=self.consistent_test, lowercase=True)
        return train, test


def make_raw(folder: DataFolder, options: Options, text: Iwslt14) -> dict[str, Any]:
    """Extract and clean one pair; returns the stamp of the stage that made raw/."""
    lang = options.languages[0]

    def extract(out: Path) -> dict[str, Any]:
        (out / "orig").mkdir()
        return {"files": wit3.extract_pair(text.archive, lang, out / "orig", text.max_unpacked)}

    archive = {"archive": text.archive_sha256}
    extracted = folder.run(Stage("extract", {"language": lang}, archive, extract))
    names = extracted["report"]["files"]
    chosen, absent, beyond = wit3.choose_test_sets(names, lang)
    train, test = text.treatments()

    def clean(out: Path) -> dict[str, Any]:
        orig = folder.path / "orig"
        pair = f"{lang}-{TARGET}"
        read = [f"train.tags.{pair}.{side}" for side in options.languages]
        read += [f"{name}.{pair}.{side}.xml" for name in chosen for side in options.languages]
        found = scan_all({name: orig / name for name in read}, options.jobs, text.replace_invalid)
        lines, given = _make_train_and_valid(orig, out / "raw", options, train, text.replace_invalid, found)
        test_sets = _make_test(orig, out / "raw", options, test, chosen, text.replace_invalid, found)
        lines["test"] = check_pair(out / "raw/test", options.languages, f"the test set of {lang}-en is empty")
        left_out = {"train and valid": given - lines["train"] - lines["valid"], "test": 0}
        odd = write_report(out, {name: oddities.as_json() for name, oddities in found.items()}, left_out)
        return {
            "lines": lines,
            "given_lines": {"train": given},
            "oddities": odd,
            "test_sets": test_sets,
            "test_sets_absent": absent,
            "test_sets_left_out": beyond,
            "inputs": archive,
        }

    settings = {
        "train": train.settings(),
        "test": test.settings(),
        "valid_every": _VALID_EVERY,
        "test_set_names": chosen,
        "languages": list(options.languages),
        "replace_invalid_utf8": text.replace_invalid,
        "sacremoses": version("sacremoses"),
        "unicode": unicodedata.unidata_version,
    }
    return folder.run(Stage("clean", settings, digests(extracted), clean))


def _make_train_and_valid(
    orig: Path,
    raw: Path,
    options: Options,
    treatment: Treatment,
    replace_invalid: bool,
    found: dict[str, Oddities],
) -> tuple[dict[str, int], int]:
    pair = "-".join(options.languages)
    paths = [orig / f"train.tags.{pair}.{side}" for side in options.languages]
    sides = tuple(read_lines(path, replace_invalid) for path in paths)
    names, odd = tuple(map(str, paths)), tuple(found[path.name] for path in paths)
    given = 0

    def counted() -> Iterator[Pair]:
        nonlocal given
        for both in wit3.train_pairs(sides, names, odd):
            given += 1
            yield both

    chunks = pack("train", counted())
    lines = count_lines(paths[0])  # with the tags, which are few
    treated = process(chunks, Treat, (treatment, options.languages), options.jobs, f"clean {pair} train", lines)
    write_splits(hold_out(treated, _VALID_EVERY), raw, options.languages, ("train", "valid"))
    few = f"{pair} has too little training text: of {given} pairs, fewer than {_VALID_EVERY} are left after cleaning"
    return {split: check_pair(raw / split, options.languages, few) for split in ("train", "valid")}, given


def _make_test(
    orig: Path,
    raw: Path,
    options: Options,
    treatment: Treatment,
    chosen: list[str],
    replace_invalid: bool,
    found: dict[str, Oddities],
) -> list[dict[str, Any]]:
    pair = "-".join(options.languages)
    test_sets, texts = [], []
    for name in chosen:
        paths = [orig / f"{name}.{pair}.{side}.xml" for side in options.languages]
        names, odd = tuple(map(str, paths)), tuple(found[path.name] for path in paths)
        sides = tuple(
            wit3.test_segments(read_lines(path, replace_invalid), name, oddities)
            for path, name, oddities in zip(paths, names, odd)
        )
        pairs = join_segments(sides, names, odd)
        if not pairs:
            raise UserError(f"'{paths[0]}' has no <seg> line: the archive is not whole, get it again")
        checksums = {side: file_sha256(path) for side, path in zip(options.languages, paths)}
        test_sets.append({"name": name, "lines": len(pairs), "sha256": checksums})
        texts += pairs
    chunks = pack("test", texts)
    treated = process(chunks, Treat, (treatment, options.languages), options.jobs, f"clean {pair} test", len(texts))
    write_splits(treated, raw, options.languages, ("test",))
    return test_sets
