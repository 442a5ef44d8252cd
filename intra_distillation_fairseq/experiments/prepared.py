"""Reads a prepared data folder (made by one of the prepare scripts) and checks that it is complete."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from intra_distillation_fairseq.corpus.binarise import index_header
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.paths import check_for_fairseq

_HOW = "make it with scripts/prepare_iwslt14.sh, prepare_wmt17.sh or prepare_parallel.sh"


@dataclass(frozen=True)
class PreparedData:
    """A data folder that is complete.

    Attributes:
        folder: absolute path.
        source_lang, target_lang: language codes, as in the file names.
        digest: sha256 of manifest.json, which itself names every text by sha256: equal digests mean equal data.
        dictionary_digest: sha256 of both fairseq dictionaries; a model only fits the dictionaries it was trained with.
        corpus: its name in the manifest, or "".
        lines: sentence pairs of each split, as far as the manifest says.
    """

    folder: Path
    source_lang: str
    target_lang: str
    digest: str
    dictionary_digest: str
    corpus: str = ""
    lines: dict[str, int] = field(default_factory=dict)

    @property
    def pair(self) -> str:
        """As in `de-en`."""
        return f"{self.source_lang}-{self.target_lang}"

    @property
    def bin(self) -> Path:
        """The folder fairseq reads."""
        return self.folder / "bin"

    @property
    def references(self) -> Path:
        """The raw reference translations of the test set."""
        return self.folder / "raw" / f"test.{self.target_lang}"


def open_prepared(folder: Path, splits: tuple[str, ...]) -> PreparedData:
    """Check a data folder.

    Args:
        folder: the folder that holds manifest.json and bin/.
        splits: the binarised splits that must be there.
    Raises:
        UserError: the folder, the manifest or a binarised file is missing, empty or unreadable.
    """
    if not folder.is_dir():
        raise UserError(f"data folder '{folder}' does not exist: {_HOW}")
    check_for_fairseq("data folder", folder)
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
        inside = inside or sorted(str(path.parent.relative_to(folder)) for path in folder.glob("*/*/manifest.json"))
        hint = f"did you mean '{folder / inside[0]}'?" if inside else _HOW
        raise UserError(f"'{folder}' is not a prepared data folder, it has no manifest.json: {hint}")
    raw = manifest_path.read_bytes()
    try:
        manifest = json.loads(raw)
        source, target = manifest["source_lang"], manifest["target_lang"]
        known = manifest["format"] == 1
        corpus = str(manifest.get("corpus", ""))
        lines = {split: values["lines"] for split, values in manifest.get("splits", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"'{manifest_path}' is damaged ({type(error).__name__}: {error}): prepare again with --force"
        ) from None
    if not known:
        raise UserError(
            f"'{manifest_path}' has the format '{manifest['format']}', this version reads format 1: prepare again"
        )
    files = [f"dict.{lang}.txt" for lang in (source, target)]
    files += [
        f"{split}.{source}-{target}.{lang}.{ending}"
        for split in splits
        for lang in (source, target)
        for ending in ("bin", "idx")
    ]
    for name in files:
        path = folder / "bin" / name
        if not path.is_file() or path.stat().st_size == 0:
            state = "is empty" if path.is_file() else "is missing"
            raise UserError(
                f"'{path}' {state}: run the prepare command of this folder again, it goes on where it stopped"
            )
    dictionaries = hashlib.sha256(b"\0".join((folder / "bin" / name).read_bytes() for name in files[:2])).hexdigest()
    digest = hashlib.sha256(raw).hexdigest()
    return PreparedData(folder.resolve(), source, target, digest, dictionaries, corpus, lines)


def count_binarised(data: PreparedData, split: str) -> int | None:
    """Sentences in a binarised split, or None where the file is not of fairseq's default (mmap) format."""
    header = index_header(data.bin / f"{split}.{data.pair}.{data.source_lang}.idx")
    return header and header[1]


def raw_lines(path: Path) -> list[str]:
    """Lines of a text in raw/ as they are, split at "\\n" only: other separators of Unicode belong to the text.

    Raises:
        UserError: the file is missing or not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"'{path}' does not exist: {_HOW}")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"'{path}' line {number} is not UTF-8 ({error.reason}): convert it first") from None
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return lines
