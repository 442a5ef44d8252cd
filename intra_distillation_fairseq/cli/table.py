"""`intra-distillation table`: our results beside the published ones, from whatever a results folder holds by now."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from intra_distillation_fairseq.analysis.table_figure import draw_table
from intra_distillation_fairseq.cli.evaluate import check_checkpoint_name
from intra_distillation_fairseq.cli.say import say
from intra_distillation_fairseq.cli.train import ROOT
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.cells import read_plan
from intra_distillation_fairseq.experiments.comparison import relative
from intra_distillation_fairseq.experiments.published import TABLES
from intra_distillation_fairseq.experiments.recipes import Recipe, find_recipe, read_recipe
from intra_distillation_fairseq.experiments.results_table import build_table, choose_table
from intra_distillation_fairseq.experiments.significance import PairedBootstrap
from intra_distillation_fairseq.experiments.table_text import markdown, tsv
from intra_distillation_fairseq.files import write_json, write_text


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of table."""
    parser.add_argument("results", metavar="RESULTS_DIR", type=Path, help="results folder of reproduce_table2.sh or 3")
    parser.add_argument(
        "--table", type=int, choices=sorted(TABLES), help="table of the paper (default: the one it was made for)"
    )
    parser.add_argument(
        "--checkpoint", help="the evaluations that count: best, last or averageN (default: the ones it was made with)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="gets table.md, .tsv, .json, .png and .pdf (default: RESULTS_DIR)"
    )


def run(args: argparse.Namespace) -> int:
    """Write and print the table."""
    if not args.results.is_dir():
        raise UserError(f"results folder '{args.results}' does not exist: give one of scripts/reproduce_table2.sh or 3")
    if args.checkpoint:
        check_checkpoint_name(args.checkpoint)
    write_table(args.results, args.table, args.checkpoint, args.out or args.results, say)
    return 0


def write_table(
    results: Path, number: int | None, checkpoint: str | None, out: Path, say: Callable[[str], None]
) -> None:
    """Make all files of a table, and print it.

    Args:
        results: the results folder.
        number: table of the paper; None for the one it was made for.
        checkpoint: best, last or averageN; None for the one it was made with.
        out: where the files go.
        say: prints one line of progress.

    Raises:
        UserError: the folder is of another table, holds no run, or `out` cannot be a folder.
    """
    plan = read_plan(results)
    if plan and number not in (None, plan["table"]):
        raise UserError(f"--table '{number}': '{results}' holds the runs of table {plan['table']}: leave --table out")
    published = TABLES[number or choose_table(results, plan)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out '{out}' cannot be made ({error.strerror}): give another folder") from None
    table = build_table(
        results,
        published,
        plan=plan,
        checkpoint=checkpoint or plan.get("checkpoint", "best"),
        recipe=_published_recipe(published.recipe),
        bootstrap=PairedBootstrap(out / "p_values.json", say),
    )
    text = markdown(table)
    write_text(out / "table.md", text)
    write_text(out / "table.tsv", tsv(table))
    write_json(out / "table.json", table)
    print(text, end="", flush=True)
    try:
        draw_table(table, out / "table")
    except ImportError:
        say("no figure: matplotlib is not installed")
    say(f"table: {relative(out / 'table.md')}, with .tsv, .json and the figure beside it")


def _published_recipe(name: str) -> Recipe | None:
    """None in an installation without the repository's configs."""
    try:
        return read_recipe(find_recipe(str(ROOT / name), ROOT))
    except UserError:
        return None
