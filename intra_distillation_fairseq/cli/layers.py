"""`intra-distillation layers`: score, size and speed of trained models cut to their first layers."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from intra_distillation_fairseq.analysis import figures
from intra_distillation_fairseq.analysis.labels import run_labels
from intra_distillation_fairseq.analysis.run_files import check_folder
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import devices
from intra_distillation_fairseq.experiments.comparison import relative
from intra_distillation_fairseq.experiments.depth_curve import DepthCurve, markdown, tsv
from intra_distillation_fairseq.files import lock, write_text


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of layers."""
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", type=Path, help="run folders of train.sh")
    parser.add_argument(
        "--layers",
        nargs="+",
        type=int,
        metavar="N",
        help="layers to keep on each side (default: all of them down to 1)",
    )
    parser.add_argument(
        "--checkpoint", default="best", help="best, last or a file's name in RUN_DIR (default: %(default)s)"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DATA", help="prepared data folder (default: that of the training)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="R", help="translations for the median speed (default: %(default)s)"
    )
    parser.add_argument("--cpu", action="store_true", help="keep off the GPU")
    parser.add_argument("--force", action="store_true", help="measure again even if that is done")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="gets layers.tsv, .png and .pdf (default: analysis/ of the first run)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure what is not known yet; prints the table."""
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}: allowed is at least 1")
    for folder in args.runs:
        check_folder(folder)
    labels = run_labels(args.runs)
    out = args.out or args.runs[0] / "analysis"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out '{out}' cannot be made ({error.strerror}): give another folder") from None
    device = None if args.cpu else next(iter(devices.probe()["devices"]), None)
    records = {}
    with contextlib.ExitStack() as locks:
        curves = {}
        for label, folder in zip(labels, args.runs):  # every mistake is found before the first translation
            locks.enter_context(lock(folder / "analysis" / ".layers.lock", "the analysis folder"))
            curves[label] = DepthCurve(folder, args.checkpoint, args.layers, args.data, device, args.force)
        for label, curve in curves.items():
            curve.measure(args.repeats, lambda line, label=label: _say(f"{label}: {line}"))
            records[label] = curve.record
    write_text(out / "layers.tsv", tsv(records))
    print(markdown(records), end="", flush=True)
    try:
        figures.draw_layers(args.runs, out / "layers", labels)
        drawn = ", with the figure beside it"
    except ImportError:
        drawn = "; no figure: matplotlib is not installed"
    _say(f"table: {relative((out / 'layers.tsv').absolute())}{drawn}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
