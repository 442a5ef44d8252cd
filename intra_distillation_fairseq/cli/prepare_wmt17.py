"""`intra-distillation prepare-wmt17`: the WMT'17 English-German archives -> a data folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.cli.prepare_options import (
    add_common,
    add_max_unpacked,
    common_options,
    max_unpacked,
    ratio,
    report,
    whole_number,
)
from intra_distillation_fairseq.cli.say import say
from intra_distillation_fairseq.corpus import newstest2014
from intra_distillation_fairseq.corpus.disk import explain_full_disk
from intra_distillation_fairseq.corpus.download import fetch_published
from intra_distillation_fairseq.corpus.pipeline import OUTPUTS, Options, finish
from intra_distillation_fairseq.corpus.stages import DataFolder, FileDigests
from intra_distillation_fairseq.corpus.wmt17 import SOURCE, TARGET, Wmt17, make_raw
from intra_distillation_fairseq.corpus.wmt17_archives import (
    ARCHIVES,
    TEST_ARCHIVE,
    TEST_PAIRS,
    check_local,
    find_local,
)
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.files import lock

_VOCAB_SIZE = 32000
# Learning the pieces takes about 2.6 kB for each line (benchmarks/prepare.py), and shall stay below 2 GB.
_SPM_LINES = 500_000
_COUNTS = ("pieces", "words")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--archives",
        metavar="DIR",
        help=f"folder with the three archives of training text, .tgz or .zip, and perhaps {TEST_ARCHIVE} (default: "
        f"download them; without {TEST_ARCHIVE} the test set comes through sacrebleu)",
    )
    parser.add_argument(
        "--accept-other-archives",
        action="store_true",
        help="take archives of --archives whose checksum is not the published one",
    )
    parser.add_argument(
        "--out", metavar="DIR", default="data/wmt17", help="folder for DIR/en-de (default: %(default)s)"
    )
    parser.add_argument(
        "--count",
        metavar="WHAT",
        default=_COUNTS[0],
        help="what --ratio and --max-length count: 'pieces' of sentencepiece, as fairseq's script, which filters after "
        "its BPE, or 'words', Moses' tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--ratio",
        metavar="R",
        default="1.5",
        help="leave out pairs of train and valid whose longer side has more than R times the pieces or words of the "
        "other (default: %(default)s)",
    )
    parser.add_argument(
        "--max-length",
        metavar="N",
        default="256",
        help="leave out pairs of train and valid with a side of more than N pieces or words (default: %(default)s)",
    )
    parser.add_argument(
        "--spm-lines",
        metavar="N",
        default=str(_SPM_LINES),
        help="lines of both languages together, evenly spaced, to learn the pieces from; each takes about 2.6 kB of "
        "memory (default: %(default)s)",
    )
    add_max_unpacked(parser)
    add_common(parser, _VOCAB_SIZE)


def run(args: argparse.Namespace) -> int:
    """Make or complete the data folder."""
    if args.count not in _COUNTS:
        raise UserError(f"--count '{args.count}': needed is one of {', '.join(_COUNTS)}")
    if args.accept_other_archives and not args.archives:
        raise UserError("--accept-other-archives is for archives of yours: give --archives DIR too")
    limits = (ratio("--ratio", args.ratio), whole_number("--max-length", args.max_length, 1))
    most = max_unpacked(args)
    options = common_options(
        args,
        f"wmt17_{SOURCE}_{TARGET}",
        (SOURCE, TARGET),
        spm_lines=whole_number("--spm-lines", args.spm_lines, 1),
        piece_limits=limits if args.count == "pieces" else None,
    )
    if args.archives:  # before anything is made
        if not Path(args.archives).is_dir():
            raise UserError(f"--archives '{args.archives}' is not a folder: give the one that holds the archives")
        for archive in ARCHIVES:
            find_local(archive, Path(args.archives))
    out = Path(args.out)
    with explain_full_disk(out):
        _prepare(args, options, limits if args.count == "words" else None, most, out)
    return 0


def _prepare(
    args: argparse.Namespace, options: Options, word_limits: tuple[float, int] | None, most: int, out: Path
) -> None:
    with lock(out / "download" / ".lock", "the download folder", say):
        known = FileDigests(out / "download" / "known.json")
        test = _test_set(args, known)
        archives = {}
        for archive in ARCHIVES:
            if args.archives:
                archives[archive.name] = check_local(archive, Path(args.archives), known, args.accept_other_archives)
            else:
                archives[archive.name] = fetch_published(archive.mirrors, out / "download", known, say)
    text = Wmt17(archives, test, word_limits, args.replace_invalid_utf8, most)
    path = out / f"{SOURCE}-{TARGET}"
    with lock(path / ".lock", "the data folder"):
        inputs = tuple(file for file, _ in archives.values())
        folder = DataFolder(path, names=("orig", *OUTPUTS), inputs=inputs, force=args.force, say=say)
        raw = make_raw(folder, options, text)
        manifest = finish(folder, options, raw)
    report(path, manifest, folder.done, raw["report"])
    _report_text(raw["report"], manifest, args)


def _test_set(args: argparse.Namespace, known: FileDigests) -> newstest2014.TestSet:
    local = Path(args.archives or "") / TEST_ARCHIVE
    if args.archives and local.is_file():
        return newstest2014.from_archive(local, known, args.accept_other_archives)
    return newstest2014.from_sacrebleu(known)


def _report_text(raw: dict[str, Any], manifest: dict[str, Any], args: argparse.Namespace) -> None:
    given = raw["given_lines"]
    total = sum(given.values())
    for split, before in (("train", total - raw["held_out_before_filter"]), ("valid", raw["held_out_before_filter"])):
        left = manifest["splits"][split]["binarised_lines"]
        print(
            f"  {split}: {left:,} of {before:,} pairs left by the filter ({args.count}, ratio {args.ratio}, "
            f"at most {args.max_length})",
            flush=True,
        )
    print(f"  test: newstest2014, {raw['lines']['test']:,} pairs, from {raw['test_sets'][0]['from']}", flush=True)
    counts = ", ".join(f"{name} {lines:,}" for name, lines in given.items())
    published = {archive.name: archive.pairs for archive in ARCHIVES}
    alike = given == published and raw["lines"]["test"] == TEST_PAIRS
    print(
        f"  pairs given: {counts}; the published archives give {' / '.join(f'{n:,}' for n in published.values())} and "
        f"{TEST_PAIRS:,} of the test set (the third from memory), "
        f"{'as here' if alike else 'not as here: these archives have another text'}",
        flush=True,
    )
