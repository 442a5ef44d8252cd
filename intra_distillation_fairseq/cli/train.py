"""`intra-distillation train`: train one method of a config on a prepared data folder, or go on with it."""

from __future__ import annotations

import argparse
import datetime
import os
import resource
import shlex
import sys
from pathlib import Path

from intra_distillation_fairseq import stopping
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import devices, launch, logs, processes, rendezvous
from intra_distillation_fairseq.experiments.paths import check_for_fairseq
from intra_distillation_fairseq.experiments.prepared import PreparedData, open_prepared
from intra_distillation_fairseq.experiments.recipes import Recipe, evaluation_as_dict, find_recipe, read_recipe
from intra_distillation_fairseq.experiments.runs import RunFolder
from intra_distillation_fairseq.files import Held, lock, write_json
from intra_distillation_fairseq.progress import Progress
from intra_distillation_fairseq.whole_checkpoints import damage

TAKES_FLAGS = True  # what follows -- goes to fairseq-train
ROOT = Path(__file__).resolve().parents[2]
_NUMERIC_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of train.sh."""
    parser.usage = (
        f"{parser.prog} DATA --method METHOD --config CONFIG --save-dir DIR "
        "[--seed N] [--precision P] [--verbose] [-- FLAGS]"
    )
    parser.add_argument("data", metavar="DATA", type=Path, help="prepared data folder (holds manifest.json and bin/)")
    parser.add_argument("--method", required=True, help="a method of the config: transformer, id_x, id_js, ...")
    parser.add_argument("--config", required=True, help="recipe, as in configs/iwslt14_transformer_small[.yaml]")
    parser.add_argument(
        "--save-dir", required=True, type=Path, metavar="DIR", help="run folder: checkpoints, log, records"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of parameters, dropout and batches (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=launch.PRECISIONS,
        default="auto",
        help="auto: fp16 on a GPU, as published, and fp32 on a CPU (default: %(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="show fairseq's whole log on the terminal, too")
    parser.epilog = "FLAGS: any flags of fairseq-train; they win over the config, as in  -- --max-update 1000"


def run(args: argparse.Namespace) -> int:
    """Train; returns fairseq-train's exit status, 0 also where the run had finished before."""
    flags: list[str] = args.after_dashes
    launch.check_flags(flags)
    recipe = read_recipe(find_recipe(args.config, ROOT))
    options = recipe.options(args.method)
    data = open_prepared(args.data, ("train", "valid"))
    folder = RunFolder(args.save_dir)
    check_for_fairseq("--save-dir", folder.folder)
    settings = {
        "method": args.method,
        "options": options,
        "data_digest": data.digest,
        "seed": args.seed,
        "flags": launch.lasting_flags(flags),
    }
    by = rendezvous.launched(os.environ)
    rank = launch.last_value(flags, "distributed-rank") or str(by.rank if by else 0)
    if rank != "0":
        return _train_other_rank(args, folder, data, settings, by, rank)
    folder.read()  # refuses what is not a folder before anything is written
    with lock(folder.folder / ".train.lock", "the run folder") as held:
        return _train(args, folder, recipe, data, settings, by, held)


def _train(
    args: argparse.Namespace,
    folder: RunFolder,
    recipe: Recipe,
    data: PreparedData,
    settings: dict,
    by: rendezvous.Launched | None,
    held: Held,
) -> int:
    flags: list[str] = args.after_dashes
    options = launch.as_flags(settings["options"])
    limit = launch.max_update(options + flags)
    if _is_over(args, folder, settings, limit):
        _note_evaluation(folder, recipe)
        _finish(folder, limit)
        print(f"already finished, nothing to do: {folder.folder}", file=sys.stderr)
        return 0

    device = devices.probe()
    settings["precision"] = launch.choose_precision(args.precision, device["devices"], options + flags)
    folder.admit(settings)
    command = _command(args, folder, data, settings, by, device["devices"])
    if not folder.checkpoints():
        folder.log.unlink(missing_ok=True)  # of an attempt that left nothing to go on from
    batch = launch.batch(options, flags, device["devices"], by)
    if batch and (batch.flags or not folder.checkpoints()):
        print(f"note: {batch.line}", file=sys.stderr)
    folder.write_record(
        {
            "settings": settings,
            "config": str(recipe.path),
            "data": str(data.folder),
            "pair": data.pair,
            "corpus": data.corpus,
            "lines": data.lines,
            "dictionary_digest": data.dictionary_digest,
            "evaluation": evaluation_as_dict(recipe.evaluation),
        }
    )
    folder.write_command(command, {name: os.environ[name] for name in _NUMERIC_ENVIRONMENT if name in os.environ})
    frequency = launch.last_value([*options, *(batch.flags if batch else []), *flags], "update-freq") or "1"
    processes_together = launch.number_of_processes(options, flags, device["devices"], by)
    here = rendezvous.processes_here(os.environ, by) if by else processes_together
    if here < len(device["devices"]) and "--cpu" not in options + flags:
        more = ": start a process for each GPU" if by else ""
        print(f"note: {len(device['devices'])} GPUs are here, {here} of them train{more}", file=sys.stderr)
    for change in folder.add_environment(device, processes=processes_together, update_freq=frequency):
        print(f"note: {change}: the rest of this run may differ in its last digits", file=sys.stderr)
    return _launch(args, folder, command, batch.line if batch else None, limit, held)


def _is_over(args: argparse.Namespace, folder: RunFolder, settings: dict, limit: int) -> bool:
    """Whether the run has finished; told alike by each process of a training, or some would wait for the others.

    Raises:
        UserError: it has, but with other settings, or its last checkpoint is gone.
    """
    words = launch.as_flags(settings["options"]) + args.after_dashes
    last = folder.last_checkpoint
    saves = not any(launch.has_flag(words, flag) for flag in ("no-save", "no-last-checkpoints"))
    lost = saves and not last.exists()
    noted = folder.finished.exists()  # else the log tells: nobody may have been left to note it
    if not noted and (lost or not logs.read_log(folder.log).complete(limit) or (last.exists() and damage(last))):
        return False
    old = folder.read()
    # Nothing will be computed, so what `auto` would mean on this machine does not matter (nor wait for torch).
    precision = old["settings"]["precision"] if old and args.precision == "auto" else args.precision
    folder.admit({**settings, "precision": precision})
    if lost:
        raise UserError(
            f"the run in '{folder.folder}' has finished, but its {last.name} is gone: delete '{folder.finished}' to "
            "train it again, or choose another --save-dir"
        )
    return True


def _command(
    args: argparse.Namespace,
    folder: RunFolder,
    data: PreparedData,
    settings: dict,
    by: rendezvous.Launched | None,
    gpus: list[str],
) -> list[str]:
    options, flags = launch.as_flags(settings["options"]), args.after_dashes
    batch = launch.batch(options, flags, gpus, by)
    return launch.train_command(
        processes.fairseq_command("fairseq-train"),
        data,
        settings["options"],
        save_dir=folder.folder,
        seed=args.seed,
        precision=settings["precision"],
        cpu=not gpus,
        flags=[*(batch.flags if batch else []), *launch.meeting_flags(options, flags, gpus, by), *flags],
    )


def _launch(
    args: argparse.Namespace, folder: RunFolder, command: list[str], batch: str | None, limit: int, held: Held
) -> int:
    log = logs.read_log(folder.log)
    logs.append_line(folder.log, logs.launch_line(shlex.join(command)))
    if batch:
        logs.append_line(folder.log, logs.own_line(f"batch: {batch}"))
    log.feed(logs.launch_line(""))
    progress = Progress(f"train {args.method}", limit, "updates")

    def follow(line: str) -> None:
        news = log.feed(line)
        if args.verbose:
            progress.write(line)
        if news == "train":
            progress.show(log.update, log.latest)
        elif news == "valid":
            progress.milestone(log.update, log.latest)
            logs.write_curves(log.rows(), folder.curves)

    status = processes.run_logged(
        command,
        folder.log,
        follow=follow,
        started=lambda pid: held.tell(
            f"intra-distillation train (process {os.getpid()}) and its fairseq-train ({pid})"
        ),
        pass_fds=(held.fileno(),),
        append=True,
    )
    progress.close()
    for name, number in log.left_out.items():
        print(
            f"note: {number} sentences of the set '{name}' are too long and left out (the log names them)",
            file=sys.stderr,
        )
    end = processes.tail(folder.log)  # as fairseq left it
    # In the log, so that it survives where this launch is not the last one. In KiB; the largest of all processes.
    logs.append_line(folder.log, logs.memory_line(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024))
    logs.write_curves(log.rows(), folder.curves)
    if status == 0 and log.trained:
        _finish(folder, limit)
        done = f"trained {log.update} updates in {log.seconds:.0f} s over all launches"
        if log.skipped:
            done += f", {len(log.skipped)} skipped (the log names their sentences)"
        print(f"{done}: {folder.folder}", file=sys.stderr)
        return 0
    how = processes.describe_status(status)
    if processes.was_stopped(status):
        again = "the same command " + (f"goes on from update {log.saved}" if log.saved else "starts again")
        if status == stopping.STATUS and log.saved >= log.update:  # not every update is logged
            again = "saved: the same command goes on"
        print(f"stopped by {how} at update {max(log.update, log.saved)}, {again}; log: {folder.log}", file=sys.stderr)
        return status
    if status == 0:
        how, status = "exit status 0, but without training", 1
    print(end, file=sys.stderr)
    print(f"error: fairseq-train ended with {how}; its log, of which this is the end: {folder.log}", file=sys.stderr)
    return status


def _train_other_rank(
    args: argparse.Namespace,
    folder: RunFolder,
    data: PreparedData,
    settings: dict,
    by: rendezvous.Launched | None,
    rank: str,
) -> int:
    """One of several processes but the first, which keeps the folder's records.

    What the first one (rank 0) refuses or has finished is not begun here either: nobody would answer this process.
    """
    words = launch.as_flags(settings["options"]) + args.after_dashes
    if _is_over(args, folder, settings, launch.max_update(words)):
        print(f"already finished, nothing to do: {folder.folder}", file=sys.stderr)
        return 0
    gpus = devices.probe()["devices"]
    settings["precision"] = launch.choose_precision(args.precision, gpus, words)
    folder.admit(settings)
    command = _command(args, folder, data, settings, by, gpus)
    log = folder.folder / f"train.rank{rank}.log"
    with lock(folder.folder / f".train.rank{rank}.lock", "the run folder") as held:
        held.tell(f"rank {rank} of intra-distillation train (process {os.getpid()})")
        status = processes.run_logged(
            command, log, follow=lambda line: None, pass_fds=(held.fileno(),), append=True, dies_with_us=True
        )
    if processes.was_stopped(status):
        print(f"rank {rank} stopped by {processes.describe_status(status)}; log: {log}", file=sys.stderr)
    elif status:
        print(processes.tail(log), file=sys.stderr)
        print(f"error: rank {rank} ended with {processes.describe_status(status)}; log: {log}", file=sys.stderr)
    return status


def _note_evaluation(folder: RunFolder, recipe: Recipe) -> None:
    """The evaluate section may change after the training: evaluate.sh then translates again."""
    record = folder.read()
    if record and record["evaluation"] != evaluation_as_dict(recipe.evaluation):
        folder.write_record({**record, "evaluation": evaluation_as_dict(recipe.evaluation)})


def _finish(folder: RunFolder, limit: int) -> None:
    """Write finished.json, which makes the next call a no-op: fairseq itself would train one more update (P10)."""
    if folder.finished.exists():
        return
    log = logs.read_log(folder.log)
    rows = log.rows()
    logs.write_curves(rows, folder.curves)  # a kill may have come between the last validation and its row
    losses = [row["valid_loss"] for row in rows if row["valid_loss"] is not None]
    memory, memory_of = log.peak_memory()
    write_json(
        folder.finished,
        {
            "updates": log.update,
            "max_update": limit,
            "reason": log.stop_reason or "all epochs are done",
            "best_valid_loss": min(losses, default=None),
            "seconds": log.seconds,
            "parameters": log.parameters,
            "skipped_updates": len(log.skipped),
            "spikes": len(log.spikes),
            "sentences_left_out": log.left_out,
            "tokens_per_second": log.tokens_per_second(),
            "peak_memory_mib": memory,
            "peak_memory_of": memory_of,
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        },
    )
