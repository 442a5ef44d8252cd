"""`intra-distillation layers`: score, size and speed of trained models cut to their first layers."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from intra_distillation_fairseq.analysis import figures
from intra_distillation_fairseq.analysis.labels import run_labels
from intra_distillation_fairseq.analysis.run_files import check_folder
from intra_distillation_fairseq.cli.quiet import quiet
from intra_distillation_fairseq.cli.say import say
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import devices
from intra_distillation_fairseq.experiments.comparison import relative
from intra_distillation_fairseq.experiments.depth_curve import markdown, opened, tsv
from intra_distillation_fairseq.files import write_text


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
    parser.add_argument(
        "--force", action="store_true", help="measure again even if that is done, or was with other inputs"
    )
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
    if args.out:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out '{args.out}' cannot be made ({error.strerror}): give another folder") from None
    quiet()
    device = None if args.cpu else next(iter(devices.probe()["devices"]), None)
    records = {}
    options = {"layers": args.layers, "data": args.data, "device": device, "force": args.force}
    with contextlib.ExitStack() as stack:  # every mistake is found before the first translation
        curves = {
            label: stack.enter_context(opened(folder, args.checkpoint, **options))
            for label, folder in zip(labels, args.runs)
        }
        for label, curve in curves.items():
            curve.measure(args.repeats, lambda line, label=label: say(f"{label}: {line}"))
            records[label] = curve.record
    name = curves[labels[0]].path.stem
    table = (args.out or args.runs[0] / "analysis") / f"{name}.tsv"
    write_text(table, tsv(records))
    print(markdown(records), end="", flush=True)
    say(f"table: {relative(table.absolute())}{_draw(args.runs, table.with_suffix(''), labels)}")
    return 0


def _draw(runs: list[Path], path: Path, labels: list[str]) -> str:
    """Draws the figure; says what came of it."""
    if path.name != "layers":
        return "; no figure: it is one of the best checkpoints"
    try:
        figures.draw_layers(runs, path, labels)
    except ImportError:
        return "; no figure: matplotlib is not installed"
    return ", with the figure beside it"
