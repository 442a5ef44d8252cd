"""`intra-distillation ablation`: the runs that differ in the number of passes, or in alpha', their table and figure."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from intra_distillation_fairseq.analysis import figures
from intra_distillation_fairseq.cli.prepare_options import whole_number
from intra_distillation_fairseq.cli.say import say_with_time
from intra_distillation_fairseq.cli.train import ROOT
from intra_distillation_fairseq.corpus.disk import explain_full_disk
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import launch, processes
from intra_distillation_fairseq.experiments.ablation_table import build_ablation_table, markdown, run_folder, tsv
from intra_distillation_fairseq.experiments.ablations import PASSES, Ablation, alpha_ablation, passes_ablation
from intra_distillation_fairseq.experiments.comparison import relative
from intra_distillation_fairseq.experiments.logs import read_curves
from intra_distillation_fairseq.experiments.paths import check_for_fairseq
from intra_distillation_fairseq.experiments.prepared import open_prepared
from intra_distillation_fairseq.experiments.recipes import Recipe, as_flags, find_recipe, read_recipe
from intra_distillation_fairseq.experiments.run_series import Run, run_series
from intra_distillation_fairseq.experiments.runs import RunFolder
from intra_distillation_fairseq.files import lock, write_json, write_text

TAKES_FLAGS = True  # what follows -- goes to fairseq-train
KINDS = ("passes", "alpha")


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of ablation_passes.sh and ablation_alpha.sh."""
    parser.usage = f"{parser.prog} {{{','.join(KINDS)}}} DATA --config CONFIG --results DIR [options] [-- FLAGS]"
    parser.add_argument(
        "kind", choices=KINDS, help="passes: K = 2 to 6 (Figure 8); alpha: adaptive and constant alpha' (Figure 7)"
    )
    parser.add_argument("data", metavar="DATA", type=Path, help="prepared data folder (holds manifest.json and bin/)")
    parser.add_argument("--config", required=True, help="recipe, as in configs/iwslt14_transformer_small[.yaml]")
    parser.add_argument(
        "--results", required=True, type=Path, metavar="DIR", help="run folders, <name>/seed<N>, table and figure"
    )
    parser.add_argument("--method", default="id_x", help="the method that is varied (default: %(default)s)")
    parser.add_argument(
        "--passes", nargs="+", metavar="K", help=f"numbers of passes (default: {' '.join(map(str, PASSES))})"
    )
    parser.add_argument("--seeds", nargs="+", metavar="N", default=["1"], help="seeds of the trainings (default: 1)")
    parser.add_argument(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with a run of the method transformer to compare with (default: with it)",
    )
    parser.epilog = "FLAGS: any flags of fairseq-train, for all runs; they win over the config"


def run(args: argparse.Namespace) -> int:
    """Run what is left, then show everything.

    Returns:
        0, 1 where a run failed, 128 + the signal that stopped it all, or 75 where a run alone was stopped.
    """
    recipe = read_recipe(find_recipe(args.config, ROOT))
    launch.check_flags(args.after_dashes)
    ablation = _ablation(args, recipe)
    for variant in ablation.variants:
        launch.max_update(as_flags(recipe.options(variant.method)) + args.after_dashes)
    check_for_fairseq("--results", args.results)
    seeds = list(dict.fromkeys(whole_number("--seeds", seed, 0) for seed in args.seeds))
    data = open_prepared(args.data, ("train", "valid", "test"))
    runs = [
        Run(
            f"{variant.name}/seed{seed}",
            run_folder(args.results, variant, seed),
            variant.method,
            seed,
            (*args.after_dashes, *variant.flags),
        )
        for seed in seeds
        for variant in ablation.variants
    ]
    for one in runs:
        RunFolder(one.folder).read()  # refuses what is not a run folder before anything is written
    with explain_full_disk(args.results, "--results"):
        with lock(args.results / ".ablation.lock", "the results folder") as held:
            status, failures = run_series(runs, data.folder, recipe.path, held, say_with_time)
    if not status:
        _write(ablation, args.results, seeds, runs)
    for name, reason in failures.items():
        say_with_time(f"error: {name}: {reason}")
    if status:
        say_with_time(f"stopped by {processes.describe_status(status)}: the same command goes on")
        return status
    if failures:
        say_with_time(f"{len(failures)} of {len(runs)} runs failed: the same command tries them again")
    return 1 if failures else 0


def _ablation(args: argparse.Namespace, recipe: Recipe) -> Ablation:
    if args.kind == "alpha":
        if args.passes:
            raise UserError("--passes is for the ablation of passes: leave it out")
        return alpha_ablation(recipe, args.method, args.after_dashes, baseline=args.baseline)
    passes = [whole_number("--passes", number, 2) for number in args.passes or PASSES]
    return passes_ablation(recipe, args.method, passes, args.after_dashes, baseline=args.baseline)


def _write(ablation: Ablation, results: Path, seeds: Sequence[int], runs: Sequence[Run]) -> None:
    """All files of the table, and the figure of what is done."""
    table = build_ablation_table(ablation, results, seeds)
    out, text = results / f"ablation_{ablation.kind}", markdown(table)
    write_text(out.with_suffix(".md"), text)
    write_text(out.with_suffix(".tsv"), tsv(table))
    write_json(out.with_suffix(".json"), table)
    print(text, end="", flush=True)
    try:
        if ablation.kind == "passes":
            drawn = [one.folder for one in runs if RunFolder(one.folder).score("best")]
            draw = figures.draw_passes
        else:
            drawn = [one.folder for one in runs if read_curves(one.folder / "train.log")]
            draw = figures.draw_validation
        if drawn:
            draw(drawn, out)
    except ImportError:
        say_with_time("no figure: matplotlib is not installed")
    except UserError as error:
        say_with_time(f"no figure: {error}")
    say_with_time(f"table: {relative(out.with_suffix('.md'))}, with .tsv, .json and the figure beside it")
