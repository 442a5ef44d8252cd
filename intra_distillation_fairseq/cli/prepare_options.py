"""What the prepare commands have in common: options, checks of them, the table at the end."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.corpus import oddities
from intra_distillation_fairseq.corpus.archives import MAX_UNPACKED
from intra_distillation_fairseq.corpus.pipeline import Options
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.paths import check_for_fairseq

DEFAULT_VOCAB_SIZE = 12000


def add_common(parser: argparse.ArgumentParser, vocab_size: int = DEFAULT_VOCAB_SIZE) -> None:
    """Add the options that all commands have.

    Args:
        parser: the command's.
        vocab_size: default of --vocab-size.
    """
    parser.set_defaults(default_vocab_size=vocab_size)
    parser.add_argument(
        "--vocab-size",
        metavar="N",
        help=f"sentencepiece's number of pieces, joint for both languages (default: {vocab_size}, or as many as "
        f"the text gives where it is too small; a dictionary of {vocab_size} pieces has {vocab_size + 1:,} types in "
        "fairseq)",
    )
    parser.add_argument(
        "--spm-train-on-all",
        action="store_true",
        help="learn the pieces from valid and test too, as the published script does (default: from train only)",
    )
    parser.add_argument(
        "--replace-invalid-utf8",
        action="store_true",
        help="put U+FFFD for bytes that are not UTF-8 (default: stop and name file and line)",
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        default=str(len(os.sched_getaffinity(0))),
        help="processes to work with; the result does not depend on it (default: the cores of this machine, "
        "%(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="make every stage again, even if it is up to date")


def add_max_unpacked(parser: argparse.ArgumentParser) -> None:
    """Add the option of the commands that unpack archives."""
    parser.add_argument(
        "--max-unpacked-gb",
        metavar="GB",
        default=f"{MAX_UNPACKED / 1e9:g}",
        help="stop at an archive that unpacks to more, as a damaged or malicious one may (default: %(default)s)",
    )


def max_unpacked(args: argparse.Namespace) -> int:
    """The bytes of --max-unpacked-gb.

    Raises:
        UserError: it is no number above 0.
    """
    try:
        gigabytes = float(args.max_unpacked_gb)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < float("inf"):
        raise UserError(f"--max-unpacked-gb '{args.max_unpacked_gb}': needed is a number above 0")
    return int(gigabytes * 1e9)


def whole_number(flag: str, given: str, least: int) -> int:
    """Check an option that has to be a whole number.

    Raises:
        UserError: it is not one, or is below `least`.
    """
    try:
        value = int(given)
    except ValueError:
        value = least - 1
    if value < least:
        raise UserError(f"{flag} '{given}': needed is a whole number, at least {least}")
    return value


def ratio(flag: str, given: str) -> float:
    """Check an option that has to be a ratio of lengths.

    Raises:
        UserError: it is no number, or is below 1.
    """
    try:
        value = float(given)
    except ValueError:
        value = 0.0
    if not 1.0 <= value < float("inf"):
        raise UserError(f"{flag} '{given}': needed is a number, at least 1")
    return value


def common_options(args: argparse.Namespace, corpus: str, languages: tuple[str, str], **further: Any) -> Options:
    """Check the options of `add_common` and put them together.

    Args:
        args: the command line.
        corpus: name for the manifest.
        languages: source and target.
        further: other fields of Options.

    Raises:
        UserError: one of them is wrong.
    """
    check_for_fairseq("--out", Path(args.out))
    given = args.vocab_size is not None
    return Options(
        corpus=corpus,
        languages=languages,
        vocab_size=whole_number("--vocab-size", args.vocab_size, 8) if given else args.default_vocab_size,
        vocab_size_at_most=not given,
        spm_train_on_all=args.spm_train_on_all,
        jobs=whole_number("--jobs", args.jobs, 1),
        **further,
    )


def report(path: Path, manifest: dict[str, Any], done: list[str], raw: dict[str, Any]) -> None:
    """Print what is in a data folder, and what was odd in its text.

    Args:
        path: the folder.
        manifest: its manifest.
        done: the stages that this run made.
        raw: report of the stage that made raw/.
    """
    pair = f"{manifest['source_lang']}-{manifest['target_lang']}"
    counts = " / ".join(f"{split} {values['lines']:,}" for split, values in manifest["splits"].items())
    state = f"made: {', '.join(done)}" if done else "nothing to do"
    print(f"{pair}: {counts} lines, {manifest['vocab_types']:,} types in {path} ({state})", flush=True)
    if odd := raw.get("oddities"):
        print(oddities.summary(odd, path), flush=True)
