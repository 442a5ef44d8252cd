"""`intra-distillation truncate`: cut a checkpoint to its first encoder and decoder layers."""

from __future__ import annotations

import argparse
import os
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
    if args.checkpoint.is_dir():
        raise UserError(f"'{args.checkpoint}' is a folder: {_example(args.checkpoint)}")
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

    whole = checkpoints.load(args.checkpoint)
    _check_writable(out)
    try:
        state = for_plain_fairseq(truncate_state(whole, args.layers))
    except UserError:
        raise
    except Exception as error:  # of a configuration that fairseq did not write
        raise UserError(
            f"'{args.checkpoint}' cannot be cut ({checkpoints.cause(error)}): is it made by fairseq?"
        ) from error
    try:
        checkpoints.write(state, out)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "not all of it: is the disk full?"
        raise UserError(f"--out '{out}' cannot be written ({reason}): give another file") from None
    print(f"the first {args.layers} encoder and decoder layers, {out.stat().st_size / 2**20:.1f} MiB: {relative(out)}")
    return 0


def _example(folder: Path) -> str:
    """Which file of a folder to give instead."""
    files = sorted(folder.glob("*.pt"))
    best = [path for path in files if path.name == "checkpoint_best.pt"]
    return f"give a file in it, as in '{(best or files)[0]}'" if files else "give a checkpoint file (it has none)"


def _check_writable(out: Path) -> None:
    """Refuse with the system's own reason, which torch does not pass on."""
    probe = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out '{out}' cannot be written ({error.strerror}): give another file") from None
