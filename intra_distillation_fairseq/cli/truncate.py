"""`intra-distillation truncate`: cut a checkpoint to its first encoder and decoder layers."""

from __future__ import annotations

import argparse
from pathlib import Path

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.comparison import relative


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of truncate."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint file of fairseq")
    parser.add_argument("--layers", type=int, required=True, metavar="N", help="layers to keep on each side")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: <name>.<N>layers.pt beside CHECKPOINT")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> int:
    """Cut; prints the new file."""
    out = args.out or args.checkpoint.with_name(f"{args.checkpoint.stem}.{args.layers}layers.pt")
    if out.exists() and args.checkpoint.exists() and out.samefile(args.checkpoint):
        raise UserError(f"--out '{out}' is the checkpoint itself: give another file")
    if out.is_dir():
        raise UserError(f"--out '{out}' is a folder: give a file, as in '{out / 'checkpoint.pt'}'")
    if out.exists() and not args.force:
        raise UserError(f"'{out}' exists: give another --out, or --force to replace it")
    from intra_distillation_fairseq import checkpoints  # imports torch
    from intra_distillation_fairseq.export import for_plain_fairseq
    from intra_distillation_fairseq.models.depth import truncate_state

    state = for_plain_fairseq(truncate_state(checkpoints.load(args.checkpoint), args.layers))
    try:
        checkpoints.write(state, out)
    except (OSError, RuntimeError) as error:  # of torch's writer where the folder is missing
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise UserError(f"--out '{out}' cannot be written ({reason}): give another file") from None
    print(f"the first {args.layers} encoder and decoder layers, {out.stat().st_size / 2**20:.1f} MiB: {relative(out)}")
    return 0
