"""`intra-distillation figure`: draw a figure of the paper from the files of finished runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from intra_distillation_fairseq.analysis import figures
from intra_distillation_fairseq.analysis.labels import run_labels
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.comparison import relative
from intra_distillation_fairseq.experiments.method_settings import alpha_schedule
from intra_distillation_fairseq.experiments.runs import RunFolder
from intra_distillation_fairseq.schedule import AlphaSchedule

_ALPHA, _PASSES = "4", "8"
# figure -> (what it shows, how it is drawn from run folders); 4 and 8 take something else.
FIGURES = {
    "2": ("sensitivity over training: the top 20% and the rest", figures.draw_sensitivity_curves),
    "3": ("distribution of the sensitivities, as of the rounds of self-distillation", figures.draw_violins),
    _ALPHA: ("alpha' against updates", None),
    "5": ("distribution of the sensitivities, with and without intra-distillation", figures.draw_violins),
    "6": ("BLEU against the share of pruned parameters", figures.draw_pruning),
    "7": ("validation loss against updates", figures.draw_validation),
    _PASSES: ("BLEU against the number of passes K", None),
    "9": ("as 5, of another task", figures.draw_violins),
    "10": ("as 6, of another task", figures.draw_pruning),
    "layers": ("BLEU and speed against the number of layers", figures.draw_layers),
    "importance": ("sensitivity of each layer over training", figures.draw_importance),
}
# Flags of figure 4 and what counts where one is not given: the paper's, of IWSLT'14.
_CURVE = {"alpha": 5.0, "p": 5.0, "q": 10.0, "max_update": 50000.0}


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of figure."""
    parser.usage = f"{parser.prog} FIGURE [RUNS ...] [--labels LABEL ...] [--out PATH]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("figure", metavar="FIGURE", help=f"one of {', '.join(FIGURES)}")
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUNS", help="run folders; for 3, 5 and 9 also sensitivity files (.npz)"
    )
    parser.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="what the runs are called (default: their folders)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="gets .png and .pdf (default: figure<FIGURE> in the current folder)"
    )
    curve = parser.add_argument_group("figure 4 without RUNS; each may be repeated, for several curves")
    for name, default in _CURVE.items():
        flag = f"--{name.replace('_', '-')}"
        curve.add_argument(flag, action="append", metavar="X", help=f"(default: {default:g})")
    parser.epilog = "figures:\n" + "\n".join(f"  {name:11} {what}" for name, (what, _) in FIGURES.items())


def run(args: argparse.Namespace) -> int:
    """Draw; prints the files."""
    if args.figure not in FIGURES:
        raise UserError(f"figure '{args.figure}' is not known: give one of {', '.join(FIGURES)}")
    given = [name for name in _CURVE if getattr(args, name)]
    if args.figure != _ALPHA:
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} is for figure {_ALPHA}: leave it out")
        if not args.runs:
            raise UserError(f"figure {args.figure} needs at least one run folder: give it after the number")
    out = args.out or Path(f"figure_{args.figure}" if args.figure.isalpha() else f"figure{args.figure}")
    if out.suffix in (".png", ".pdf"):
        out = out.with_suffix("")
    if out.is_dir():
        raise UserError(f"--out '{out}' is a folder: give a path for the files, without ending, as in {out / 'figure'}")
    try:
        files = _draw(args, out, given)
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise UserError("no figure: matplotlib is not installed: run scripts/setup.sh") from None
    except OSError as error:
        raise UserError(f"--out '{out}' cannot be written ({error.strerror}): give another path") from None
    for path in files:
        print(relative(path.absolute()))
    return 0


def _draw(args: argparse.Namespace, out: Path, given: list[str]) -> list[Path]:
    if args.figure == _ALPHA:
        if given and args.runs:
            raise UserError(f"figure {_ALPHA} takes RUNS or --{given[0].replace('_', '-')}, not both: leave one out")
        curves = _curves_of_runs(args.runs, args.labels) if args.runs else _curves_of_flags(args)
        return figures.draw_alpha(curves, out)
    if args.figure == _PASSES:
        if args.labels:
            raise UserError(
                f"--labels is not for figure {_PASSES}, which orders the runs by their passes: leave it out"
            )
        return figures.draw_passes(args.runs, out)
    return FIGURES[args.figure][1](args.runs, out, args.labels)


def _curves_of_runs(runs: Sequence[Path], labels: Sequence[str] | None) -> dict[str, AlphaSchedule]:
    curves = {}
    for name, run in zip(run_labels(runs, labels), runs):
        record = RunFolder(run).read()
        if record is None:
            raise UserError(f"'{run}' is not a run folder, it has no run.json: train it with scripts/train.sh first")
        schedule = alpha_schedule(record["settings"])
        if schedule is None:
            raise UserError(f"'{run}' was trained without intra-distillation: it has no alpha'")
        if not schedule.max_update:
            raise UserError(
                f"'{run}' was limited by its epochs, not by --max-update: draw it with --max-update instead"
            )
        curves[name] = schedule
    return curves


def _curves_of_flags(args: argparse.Namespace) -> dict[str, AlphaSchedule]:
    values = {
        name: [_number(name, one) for one in getattr(args, name) or [default]] for name, default in _CURVE.items()
    }
    several = max(len(numbers) for numbers in values.values())
    for name, numbers in values.items():
        if len(numbers) not in (1, several):
            raise UserError(
                f"--{name.replace('_', '-')} is given {len(numbers)} times and another flag {several} times: give it "
                "once, or for each curve"
            )
    of_curves = [
        {name: numbers[n if len(numbers) > 1 else 0] for name, numbers in values.items()} for n in range(several)
    ]
    schedules = [AlphaSchedule(**{**one, "max_update": int(one["max_update"])}) for one in of_curves]
    names = [f"alpha {one.alpha:g}, p {one.p:g}, q {one.q:g}, N {one.max_update:,}" for one in schedules]
    places = [Path(f"curve{number}") for number in range(several)]
    names = run_labels(places, args.labels) if args.labels else names
    return dict(zip(names, schedules))


def _number(name: str, given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (name == "max_update" and not (value >= 1 and value.is_integer())):
        what = "a whole number above 0" if name == "max_update" else "a number"
        raise UserError(f"--{name.replace('_', '-')} '{given}': needed is {what}")
    return value
