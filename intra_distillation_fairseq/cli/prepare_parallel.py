"""`intra-distillation prepare-parallel`: a user's own parallel files -> a data folder for training."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from intra_distillation_fairseq.cli.prepare_options import (
    add_common,
    common_options,
    ratio,
    report,
    whole_number,
)
from intra_distillation_fairseq.cli.say import say
from intra_distillation_fairseq.corpus.disk import explain_full_disk
from intra_distillation_fairseq.corpus.pipeline import OUTPUTS, SPLITS, finish
from intra_distillation_fairseq.corpus.stages import DataFolder, FileDigests
from intra_distillation_fairseq.corpus.user_text import UserText, find_side, make_raw
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.files import lock


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    for split in SPLITS:
        parser.add_argument(
            f"--{split}",
            metavar="PREFIX",
            required=True,
            help=f"{split} text: PREFIX.SRC and PREFIX.TGT, plain or with .gz after the language",
        )
    parser.add_argument("--src", metavar="LANG", required=True, help="source language, such as de")
    parser.add_argument("--tgt", metavar="LANG", required=True, help="target language, such as en")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to make")
    parser.add_argument("--name", help="the corpus's name in the manifest (default: the name of the folder)")
    parser.add_argument("--lowercase", action="store_true", help="lower-case all text")
    parser.add_argument(
        "--moses",
        action="store_true",
        help="tokenise as Moses does before the filter and detokenise after it, all splits",
    )
    parser.add_argument(
        "--ratio",
        metavar="R",
        help="leave out training pairs whose longer side has more than R times the words of the other (IWSLT'14: 1.5)",
    )
    parser.add_argument(
        "--max-length", metavar="N", help="leave out training pairs with a side of more than N words (IWSLT'14: 175)"
    )
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Make or complete the data folder."""
    for flag, lang in (("--src", args.src), ("--tgt", args.tgt)):
        if not re.fullmatch("[A-Za-z0-9_]+", lang):
            raise UserError(f"{flag} '{lang}': needed are letters, digits and '_', such as 'de'")
    if args.src == args.tgt:
        raise UserError(f"--src and --tgt are both '{args.src}': fairseq needs two different names")
    text = UserText(
        prefixes={split: getattr(args, split) for split in SPLITS},
        moses=args.moses,
        lowercase=args.lowercase,
        ratio=None if args.ratio is None else ratio("--ratio", args.ratio),
        max_words=None if args.max_length is None else whole_number("--max-length", args.max_length, 1),
        replace_invalid=args.replace_invalid_utf8,
    )
    out = Path(args.out)
    options = common_options(args, args.name or out.resolve().name, (args.src, args.tgt))
    # before a folder is made
    inputs = tuple(find_side(text.prefixes[split], lang, split) for split in SPLITS for lang in options.languages)
    with explain_full_disk(out), lock(out / ".lock", "the data folder"):
        folder = DataFolder(out, names=OUTPUTS, inputs=inputs, force=args.force, say=say)
        raw = make_raw(folder, options, text, FileDigests(out / "stages" / "inputs.json"))
        manifest = finish(folder, options, raw)
    report(out, manifest, folder.done, raw["report"])
    return 0
