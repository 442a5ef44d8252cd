"""raw/ of a user's own parallel files."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.corpus.oddities import scan_all, write_report
from intra_distillation_fairseq.corpus.pairs import (
    Treat,
    Treatment,
    check_pair,
    process,
    read_chunks,
    unequal,
    write_splits,
)
from intra_distillation_fairseq.corpus.pipeline import SPLITS, Options, version
from intra_distillation_fairseq.corpus.stages import DataFolder, FileDigests, Stage
from intra_distillation_fairseq.errors import UserError


@dataclass(frozen=True)
class UserText:
    """Where the text is and what to do to it.

    Attributes:
        prefixes: split -> PREFIX of PREFIX.xx and PREFIX.yy, each of which may also be PREFIX.xx.gz.
        moses: tokenise before the filter and detokenise after it.
        lowercase: lower-case.
        ratio: for train: longest side / shortest side in words. None: any.
        max_words: for train: most words of a side. None: any number.
        replace_invalid: put U+FFFD where the text is not UTF-8.
    """

    prefixes: dict[str, str]
    moses: bool
    lowercase: bool
    ratio: float | None
    max_words: int | None
    replace_invalid: bool

    def treatment(self, split: str) -> Treatment:
        """What is done to a split: only train is filtered by length, and no test line is ever left out."""
        train = split == "train"
        return Treatment(
            moses=self.moses,
            drop_empty=split != "test",
            ratio=self.ratio if train else None,
            max_words=self.max_words if train else None,
            lowercase=self.lowercase,
        )


def find_side(prefix: str, lang: str, split: str) -> Path:
    """The file of one side: PREFIX.LANG or PREFIX.LANG.gz.

    Raises:
        UserError: neither is there.
    """
    plain = Path(f"{prefix}.{lang}")
    for path in (plain, Path(f"{plain}.gz")):
        if path.is_file():
            return path
    raise UserError(
        f"--{split} '{prefix}': there is no '{plain}' and no '{plain}.gz': check the prefix and the languages"
    )


def make_raw(folder: DataFolder, options: Options, text: UserText, known: FileDigests) -> dict[str, Any]:
    """Make raw/ of the user's files; returns the stage's stamp."""
    files = {split: [find_side(text.prefixes[split], lang, split) for lang in options.languages] for split in SPLITS}
    sides = {f"{split}.{lang}": path for split in SPLITS for lang, path in zip(options.languages, files[split])}
    inputs = {name: known.sha256(path) for name, path in sides.items()}
    settings: dict[str, Any] = {split: text.treatment(split).settings() for split in SPLITS}
    settings |= {
        "languages": list(options.languages),
        "replace_invalid_utf8": text.replace_invalid,
        "unicode": unicodedata.unidata_version,
    }
    if text.moses:
        settings["sacremoses"] = version("sacremoses")

    def make(out: Path) -> dict[str, Any]:
        lines, given = {}, {}
        # all of them before any work
        scans = scan_all(sides, options.jobs, text.replace_invalid)
        for split in SPLITS:
            counts = [scans[f"{split}.{lang}"].lines for lang in options.languages]
            if counts[0] != counts[1]:
                raise unequal((str(files[split][0]), str(files[split][1])), counts)
            given[split] = counts[0]
        for split in SPLITS:
            chunks = read_chunks(split, files[split][0], files[split][1], text.replace_invalid)
            treated = process(
                chunks, Treat, (text.treatment(split), options.languages), options.jobs, f"clean {split}", given[split]
            )
            write_splits(treated, out / "raw", options.languages, (split,))
            lines[split] = check_pair(
                out / "raw" / split,
                options.languages,
                f"--{split} '{text.prefixes[split]}': none of its {given[split]} pairs is left: give other text, or a "
                "wider --ratio and --max-length",
            )
        left_out = {split: given[split] - lines[split] for split in SPLITS}
        odd = write_report(out, {name: found.as_json() for name, found in scans.items()}, left_out)
        return {"lines": lines, "given_lines": given, "inputs": inputs, "oddities": odd}

    return folder.run(Stage("clean", settings, inputs, make))
