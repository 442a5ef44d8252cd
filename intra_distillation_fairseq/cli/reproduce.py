"""`intra-distillation reproduce`: every cell of Table 2 or 3, from the archives to the table."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from intra_distillation_fairseq.cli.evaluate import check_checkpoint_name
from intra_distillation_fairseq.cli.prepare_options import whole_number
from intra_distillation_fairseq.cli.say import say_with_time
from intra_distillation_fairseq.cli.table import write_table
from intra_distillation_fairseq.cli.train import ROOT
from intra_distillation_fairseq.corpus.disk import explain_full_disk
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import devices, launch, processes
from intra_distillation_fairseq.experiments.cells import Cell, add_to_plan, failure_lines
from intra_distillation_fairseq.experiments.jobs import Place, cpu_places, gpu_places
from intra_distillation_fairseq.experiments.paths import check_for_fairseq
from intra_distillation_fairseq.experiments.prepared import open_prepared
from intra_distillation_fairseq.experiments.published import TABLES
from intra_distillation_fairseq.experiments.recipes import Recipe, find_recipe, read_recipe
from intra_distillation_fairseq.experiments.reproduction import SPLITS, Reproduction, Task
from intra_distillation_fairseq.files import lock

TAKES_FLAGS = True  # what follows -- goes to fairseq-train
_DATA_ROOTS = {2: "data/iwslt14", 3: "data/wmt17"}


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of reproduce_table2.sh and reproduce_table3.sh."""
    parser.usage = f"{parser.prog} --table {{2,3}} [options] [-- FLAGS]"
    parser.add_argument("--table", type=int, choices=sorted(TABLES), required=True, help="table of the paper")
    parser.add_argument("--langs", metavar='"de es"', help="table 2: source languages (default: all eight)")
    parser.add_argument("--methods", metavar='"transformer id_x"', help="rows (default: all of the table)")
    parser.add_argument("--seeds", metavar='"1 2 3"', default="1", help="seeds of the trainings (default: %(default)s)")
    parser.add_argument("--config", help="recipe (default: the published one of the table)")
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", help="data folders, one per pair (default: data/iwslt14, data/wmt17)"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="run folders and the table (default: runs/table2, runs/table3)"
    )
    parser.add_argument("--archive", type=Path, metavar="FILE", help="table 2: 2014-01.tgz (default: download)")
    parser.add_argument("--archives", type=Path, metavar="DIR", help="table 3: folder of archives (default: download)")
    parser.add_argument(
        "--prepare-flags",
        metavar='"FLAGS"',
        default="",
        help='more flags for the prepare command, as in --prepare-flags="--vocab-size 8000"',
    )
    parser.add_argument("--gpus", metavar="N", help="use this many GPUs (default: all)")
    parser.add_argument(
        "--gpus-per-cell", metavar="N", help="GPUs of one training (default: 1 for table 2, all for table 3)"
    )
    parser.add_argument(
        "--parallel", metavar="N", default="1", help="cells at a time on the CPU, or on each GPU (default: %(default)s)"
    )
    parser.add_argument("--precision", choices=launch.PRECISIONS, default="auto", help="as of train.sh")
    parser.add_argument(
        "--checkpoint", default="best", help="which to evaluate: best, last or averageN (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-checkpoints",
        action="store_true",
        help="keep every checkpoint of a cell that is done (default: best and last; all with --checkpoint averageN)",
    )
    parser.epilog = "FLAGS: any flags of fairseq-train, for all cells; they win over the config"


def run(args: argparse.Namespace) -> int:
    """Reproduce; returns 0, 1 where a cell failed, or 128 + the signal that stopped it."""
    counts = {
        name: None if value is None else whole_number(f"--{name}", value, 1)
        for name, value in (("gpus", args.gpus), ("gpus-per-cell", args.gpus_per_cell), ("parallel", args.parallel))
    }
    task = _task(args)
    work = Reproduction(task, say_with_time)
    # Asked only where there is something to compute, and before anything is written: it can refuse.
    places = _places(task, args.table, counts) if work.left else []
    with explain_full_disk(task.results, "--results"):
        with lock(task.results / ".reproduce.lock", "the results folder") as held:
            of_folder = add_to_plan(task.results, args.table, task.checkpoint, task.data_root, task.cells)
            status = 0
            if work.left:
                where = ", ".join(dict.fromkeys(place.name for place in places))
                cells = f"{len(task.cells)} cells: {work.done} done, {work.left} to go"
                say_with_time(f"{cells}, {len(places)} at a time on {where}; {work.rest(len(places))}")
                status = work.run(places, held)
            else:
                say_with_time(f"all {len(task.cells)} cells are done")
        if status:
            say_with_time(
                f"stopped by {processes.describe_status(status)}, {work.left} cells left: the same command goes on"
            )
            return status
        write_table(task.results, args.table, task.checkpoint, task.results, say_with_time)
    if of_folder != task.checkpoint:
        say_with_time(
            f"note: this table is of --checkpoint {task.checkpoint}; `table` takes {of_folder}, as the first call "
            "in this folder did, unless it is given --checkpoint"
        )
    for failure in failure_lines(work.failures):
        say_with_time(f"error: {failure}")
    if work.failures:
        say_with_time(f"{len(work.failures)} of {len(task.cells)} cells failed: the same command tries them again")
    return 1 if work.failures else 0


def _task(args: argparse.Namespace) -> Task:
    """Everything that can be found wrong before anything is done.

    Raises:
        UserError: names it.
    """
    table, number = TABLES[args.table], args.table
    recipe = read_recipe(find_recipe(args.config or str(ROOT / table.recipe), ROOT))
    methods = _methods(args.methods, table.methods, recipe)
    seeds = _words("--seeds", args.seeds)
    if wrong := [seed for seed in seeds if not re.fullmatch(r"\d{1,9}", seed)]:
        raise UserError(f"--seeds has '{wrong[0]}': needed are whole numbers from 0 on with a space between them")
    data_root = args.data_root or Path(_DATA_ROOTS[number])
    results = args.results or Path(f"runs/table{number}")
    for flag, path in (("--data-root", data_root), ("--results", results)):
        _check_folder(flag, path)
    pairs = _pairs(args, data_root)
    check_checkpoint_name(args.checkpoint)
    launch.check_flags(args.after_dashes)
    for method in methods:
        launch.max_update(launch.as_flags(recipe.options(method)) + args.after_dashes)
    prepare, archive = _prepare(args, pairs, data_root)
    cells = (Cell(pair, method, int(seed)) for seed in seeds for pair in pairs for method in methods)
    return Task(
        table=table,
        cells=tuple(dict.fromkeys(cells)),
        results=results,
        data_root=data_root,
        recipe=recipe,
        flags=args.after_dashes,
        precision=args.precision,
        checkpoint=args.checkpoint,
        prepare=prepare,
        archive=archive,
        keep_checkpoints=args.keep_checkpoints or args.checkpoint not in ("best", "last"),
    )


def _check_folder(flag: str, path: Path) -> None:
    check_for_fairseq(flag, path)
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir():
        what = f"'{path}'" if there == path else f"'{path}' cannot be made: '{there}'"
        raise UserError(f"{flag} {what} is a file: give a folder")


def _words(flag: str, given: str) -> list[str]:
    words = list(dict.fromkeys(given.replace(",", " ").split()))
    if not words:
        raise UserError(f"{flag} '{given}' is empty: give at least one, or leave {flag} out")
    return words


def _methods(given: str | None, rows: tuple[str, ...], recipe: Recipe) -> list[str]:
    if given is None:
        methods = [method for method in rows if method in recipe.methods]
        if not methods:
            raise UserError(f"{recipe.path} has none of the methods {', '.join(rows)}: give --methods")
        if absent := [method for method in rows if method not in methods]:
            say_with_time(f"note: {recipe.path} has no {', '.join(absent)}")
        return methods
    methods = _words("--methods", given)
    for method in methods:
        recipe.options(method)
    return methods


def _pairs(args: argparse.Namespace, data_root: Path) -> list[str]:
    """The columns: those of the table, and any other one that is prepared."""
    table = TABLES[args.table]
    if args.table != 2:
        if args.langs is not None:
            raise UserError(f"--langs '{args.langs}' is for table 2: table {args.table} is about {table.pairs[0]}")
        return list(table.pairs)
    pairs = []
    for lang in _words("--langs", args.langs) if args.langs is not None else [pair[:-3] for pair in table.pairs]:
        pair = f"{lang}-en"
        if pair not in table.pairs:
            try:
                open_prepared(data_root / pair, SPLITS)
            except UserError:
                raise UserError(
                    f"--langs has '{lang}': needed are languages of the table "
                    f"({' '.join(known[:-3] for known in table.pairs)}), or others that are prepared in '{data_root}'"
                ) from None
        pairs.append(pair)
    return pairs


def _prepare(args: argparse.Namespace, pairs: list[str], data_root: Path) -> tuple[dict[str, list[str]], Path]:
    """The command that makes each data folder, and what it needs."""
    try:
        flags = shlex.split(args.prepare_flags)
    except ValueError as error:
        raise UserError(f"--prepare-flags '{args.prepare_flags}' cannot be split ({error}): mind the quotes") from None
    ours, other = ("archive", "archives") if args.table == 2 else ("archives", "archive")
    given = getattr(args, ours)
    if getattr(args, other) is not None:
        raise UserError(f"--{other} '{getattr(args, other)}' is not for table {args.table}: give --{ours}")
    if args.table == 2:
        if given is not None and not given.is_file():
            raise UserError(f"--archive '{given}' is not a file: give the path of 2014-01.tgz")
        own = ["--archive", str(given)] if given is not None else []
        command = {
            pair: ["prepare-iwslt14", "--langs", pair[:-3], "--out", str(data_root), *own, *flags] for pair in pairs
        }
        return command, given or data_root / "download" / "2014-01.tgz"
    if given is not None and not given.is_dir():
        raise UserError(f"--archives '{given}' is not a folder: give the one that holds the archives of WMT'17")
    own = ["--archives", str(given)] if given is not None else []
    return {pair: ["prepare-wmt17", *own, "--out", str(data_root), *flags] for pair in pairs}, given or data_root


def _places(task: Task, table: int, counts: dict[str, int | None]) -> list[Place]:
    found = [] if task.cpu else devices.probe()["devices"]
    side_by_side = counts["parallel"] or 1
    if not found:
        for name in ("gpus", "gpus-per-cell"):
            if counts[name] is not None:
                raise UserError(f"--{name} '{counts[name]}': there is no GPU to use: leave it out")
        if task.precision == "fp16":
            raise UserError("--precision 'fp16' needs a GPU, and there is none: use auto, fp32 or bf16")
        return cpu_places(side_by_side)
    each = counts["gpus-per-cell"] or (1 if table == 2 else None)
    return gpu_places(len(found), counts["gpus"], each, side_by_side)
