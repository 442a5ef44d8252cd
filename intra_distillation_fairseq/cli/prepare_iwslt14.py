"""`intra-distillation prepare-iwslt14`: the IWSLT'14 archive -> a data folder for each language pair."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.cli.prepare_options import (
    add_common,
    add_max_unpacked,
    common_options,
    max_unpacked,
    report,
)
from intra_distillation_fairseq.cli.say import say
from intra_distillation_fairseq.corpus.disk import explain_full_disk
from intra_distillation_fairseq.corpus.download import IWSLT14_URLS, fetch
from intra_distillation_fairseq.corpus.iwslt14 import TARGET, Iwslt14, make_raw
from intra_distillation_fairseq.corpus.pipeline import OUTPUTS, Options, finish
from intra_distillation_fairseq.corpus.stages import DataFolder, FileDigests
from intra_distillation_fairseq.corpus.wit3 import LANGUAGES, PUBLISHED_COUNTS
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.files import lock


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--langs",
        metavar='"de es"',
        default=" ".join(LANGUAGES),
        help="source languages; the target is English (default: %(default)s)",
    )
    parser.add_argument(
        "--archive", metavar="FILE", help="2014-01.tgz, or the archive of a single pair (default: download)"
    )
    parser.add_argument(
        "--url", help="where to download 2014-01.tgz (default: two copies on Google Drive, tried in order)"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="data/iwslt14",
        help="folder for DIR/de-en and the others (default: %(default)s)",
    )
    parser.add_argument(
        "--consistent-test",
        action="store_true",
        help="treat the test text as the training text: tokenised and detokenised, XML escapes undone in both "
        "(default: as published, the test is lower-cased only)",
    )
    add_max_unpacked(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Make or complete the data folders."""
    langs = _languages(args.langs)
    if args.archive and args.url:
        raise UserError(f"--archive '{args.archive}' and --url '{args.url}' are both given: give one of them")
    options = {lang: common_options(args, f"iwslt14_{lang}_{TARGET}", (lang, TARGET)) for lang in langs}
    if args.archive and not Path(args.archive).is_file():
        raise UserError(f"--archive '{args.archive}' is not a file: give the path of 2014-01.tgz")
    out, limit = Path(args.out), max_unpacked(args)
    archive = Path(args.archive) if args.archive else out / "download" / "2014-01.tgz"
    with explain_full_disk(out):
        _prepare(args, langs, options, out, archive, limit)
    return 0


def _prepare(
    args: argparse.Namespace, langs: list[str], options: dict[str, Options], out: Path, archive: Path, limit: int
) -> None:
    with lock(out / "download" / ".lock", "the download folder", say):
        known = FileDigests(out / "download" / "known.json")
        if not args.archive:
            fetch((args.url,) if args.url else IWSLT14_URLS, archive, known, say, max_unpacked=limit)
        text = Iwslt14(archive, known.sha256(archive), args.consistent_test, args.replace_invalid_utf8, limit)
    for lang in langs:
        path = out / f"{lang}-{TARGET}"
        with lock(path / ".lock", "the data folder"):
            folder = DataFolder(
                path,
                names=("orig", *OUTPUTS),
                inputs=(archive,),
                force=args.force,
                say=lambda line, lang=lang: say(f"{lang}-{TARGET}: {line}"),
            )
            raw = make_raw(folder, options[lang], text)
            manifest = finish(folder, options[lang], raw)
        report(path, manifest, folder.done, raw["report"])
        _report_test_sets(lang, raw["report"])
        _compare(lang, manifest)


def _languages(given: str) -> list[str]:
    langs = given.replace(",", " ").split()
    wrong = [lang for lang in langs if not re.fullmatch("[a-z]{2,3}", lang) or lang == TARGET]
    if wrong or not langs:
        raise UserError(
            f"--langs '{given}': needed are codes of source languages with a space between them, of the published "
            f"ones ({' '.join(LANGUAGES)}) or others of the archive; the target is always English"
        )
    return list(dict.fromkeys(langs))


def _report_test_sets(lang: str, raw: dict[str, Any]) -> None:
    sets = ", ".join(f"{one['name'].removeprefix('IWSLT14.')} {one['lines']:,}" for one in raw["test_sets"])
    print(f"  test: {sets}", flush=True)
    if raw["test_sets_absent"]:
        absent = ", ".join(raw["test_sets_absent"])
        print(f"  note: {lang}-{TARGET} has no {absent}; the test set goes without", flush=True)
    if raw["test_sets_left_out"]:
        print(f"  note: not part of the published test set: {', '.join(raw['test_sets_left_out'])}", flush=True)


def _compare(lang: str, manifest: dict[str, Any]) -> None:
    published = PUBLISHED_COUNTS.get(lang)
    if not published:
        return
    got = tuple(manifest["splits"][split]["lines"] for split in ("train", "valid", "test"))
    counts = " / ".join(f"{count:,}" for count in published)
    verdict = "as here" if got == published else "not as here: this archive has another text"
    print(f"  the published archive gives {counts} lines for {lang}-{TARGET}, {verdict}", flush=True)
