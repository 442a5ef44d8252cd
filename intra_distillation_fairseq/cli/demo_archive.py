"""`intra-distillation demo-archive`: an invented language pair as an archive of the layout of IWSLT'14."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from intra_distillation_fairseq.corpus.invented_archive import SOURCE_LANG, archive_bytes
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.files import replacing
from intra_distillation_fairseq.progress import Progress


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of demo-archive."""
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="archive to write, as in 2014-01.tgz")
    parser.add_argument("--seed", type=int, default=1, help="names the language and its text (default: %(default)s)")
    parser.add_argument("--train", type=int, default=8000, metavar="N", help="training pairs (default: %(default)s)")
    parser.add_argument("--test", type=int, default=320, metavar="N", help="test pairs (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write the archive, unless it is there already."""
    for name, value, least in (("seed", args.seed, 0), ("train", args.train, 100), ("test", args.test, 4)):
        if value < least:
            raise UserError(f"--{name} '{value}': must be at least {least}")
    if args.out.is_dir():
        raise UserError(f"--out '{args.out}' is a folder: give the name of a file")
    progress, made = Progress("invent", args.train + args.test, "sentences"), 0

    def follow(sentences: int) -> None:
        nonlocal made
        made += sentences
        progress.show(made)

    content = archive_bytes(args.seed, args.train, args.test, follow)
    progress.close()
    if args.out.exists():
        if args.out.read_bytes() == content:
            print(f"already there, nothing to do: {args.out}", file=sys.stderr)
            return 0
        raise UserError(
            f"--out '{args.out}' exists and is not the archive of seed {args.seed} with {args.train} + {args.test} "
            "sentences: choose another file, or remove it"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as temporary:
        temporary.write_bytes(content)
    print(
        f"an invented language (seed {args.seed}; the code '{SOURCE_LANG}' stands in for it) and English, "
        f"{args.train:,} + {args.test:,} sentences -> {args.out}",
        file=sys.stderr,
    )
    return 0
