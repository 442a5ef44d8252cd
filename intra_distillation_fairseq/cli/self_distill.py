"""`intra-distillation self-distill`: train a student from its teacher, round after round (Table 1 of the paper)."""

from __future__ import annotations

import argparse
from pathlib import Path

from intra_distillation_fairseq.cli.prepare_options import whole_number
from intra_distillation_fairseq.cli.say import say_with_time
from intra_distillation_fairseq.cli.train import ROOT
from intra_distillation_fairseq.corpus.disk import explain_full_disk
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import launch, processes
from intra_distillation_fairseq.experiments.comparison import relative
from intra_distillation_fairseq.experiments.paths import check_for_fairseq
from intra_distillation_fairseq.experiments.prepared import open_prepared
from intra_distillation_fairseq.experiments.published import TABLES
from intra_distillation_fairseq.experiments.recipes import find_recipe, read_recipe
from intra_distillation_fairseq.experiments.reproduction import SPLITS
from intra_distillation_fairseq.experiments.self_distillation import BASELINE, CHECKPOINT, Rounds, Task, check
from intra_distillation_fairseq.experiments.self_distillation_table import build_table, markdown, tsv
from intra_distillation_fairseq.experiments.significance import PairedBootstrap
from intra_distillation_fairseq.experiments.time_left import runs_left
from intra_distillation_fairseq.files import Held, lock, write_json, write_text

TAKES_FLAGS = True  # what follows -- goes to fairseq-train


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of self_distill.sh."""
    parser.usage = f"{parser.prog} DATA [options] [-- FLAGS]"
    parser.add_argument("data", metavar="DATA", type=Path, help="prepared data folder (holds manifest.json and bin/)")
    parser.add_argument("--rounds", metavar="N", default="2", help="rounds after the baseline (default: %(default)s)")
    parser.add_argument("--config", default=TABLES[2].recipe, help="recipe (default: %(default)s)")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        default=Path("runs/table1"),
        help="gets round0, round1, ... and the table (default: %(default)s)",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="RUN_DIR",
        help="a finished run to take as round 0, evaluated in its own folder (default: train it)",
    )
    parser.add_argument(
        "--student",
        metavar="METHOD",
        default=BASELINE,
        help="method of the config for the rounds from 1 on; id_x: with intra-distillation (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of every training (default: %(default)s)")
    parser.add_argument("--precision", choices=launch.PRECISIONS, default="auto", help="as of train.sh")
    parser.add_argument("--skip-sensitivity", action="store_true", help="do not measure the parameters' sensitivity")
    parser.epilog = "FLAGS: any flags of fairseq-train, for all rounds; they win over the config"


def run(args: argparse.Namespace) -> int:
    """Run all rounds; returns 0, or the exit status of what failed or was stopped."""
    task = Task(
        data=open_prepared(args.data, SPLITS),
        recipe=read_recipe(find_recipe(args.config, ROOT)),
        student=args.student,
        rounds=whole_number("--rounds", args.rounds, 1),
        results=args.results.resolve(),
        baseline=args.baseline,
        seed=args.seed,
        precision=args.precision,
        flags=args.after_dashes,
        sensitivity=not args.skip_sensitivity,
    )
    check_for_fairseq("--results", task.results)
    if task.results.exists() and not task.results.is_dir():
        raise UserError(f"--results '{args.results}' is a file: give a folder")
    for note in check(task):
        say_with_time(note)
    with explain_full_disk(task.results, "--results"):
        with lock(task.results / ".self_distill.lock", "the results folder") as held:
            return _run_rounds(task, held)


def _run_rounds(task: Task, held: Held) -> int:
    rounds, bootstrap = (
        Rounds(task, held, say_with_time),
        PairedBootstrap(task.results / "p_values.json", say_with_time),
    )
    text = ""
    for number in range(task.rounds + 1):
        if status := rounds.run(number):
            logs = relative(task.results / "logs")
            if processes.was_stopped(status):
                how = f"stopped by {processes.describe_status(status)} in round {number}: the same command goes on"
            else:
                how = f"error: failed in round {number}, see above: with that mended, the same command goes on"
            say_with_time(f"{how}; logs: {logs}")
            return status
        # After each round: the later ones can take days.
        table = build_table(task, number, bootstrap)
        text = markdown(table)
        write_text(task.results / "table1.md", text)
        write_text(task.results / "table1.tsv", tsv(table))
        write_json(task.results / "table1.json", table)
        say_with_time(f"round {number}: BLEU {table['rows'][-1]['bleu']:.2f}; {_rest(task, number)}")
    print(text, end="", flush=True)
    say_with_time(f"table: {relative(task.results / 'table1.md')}, with .tsv and .json beside it")
    return 0


def _rest(task: Task, number: int) -> str:
    """The rounds after this one. Round 0 has no teacher, so it tells little of their time."""
    done = [("student" if one else "baseline", task.folder(one).folder) for one in range(number + 1)]
    return runs_left(done, ["student"] * (task.rounds - number), CHECKPOINT, "rounds")
