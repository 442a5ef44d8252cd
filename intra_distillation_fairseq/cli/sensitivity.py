"""`intra-distillation sensitivity`: |theta * dL/dtheta| of a trained model, or what its training measured."""

from __future__ import annotations

import argparse
import re
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intra_distillation_fairseq.analysis.run_files import check_folder, read_measurements, sensitivity_file
from intra_distillation_fairseq.cli.quiet import quiet
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.runs import RunFolder, environment
from intra_distillation_fairseq.files import fingerprint, lock, read_json, replacing, unchanged, write_json
from intra_distillation_fairseq.progress import Progress

if TYPE_CHECKING:  # both import torch
    from intra_distillation_fairseq.analysis.sensitivity import Sensitivity
    from intra_distillation_fairseq.loading import Loaded

FORMAT = 1
_SHOWN = {
    "mean": "mean",
    "std": "standard deviation",
    "std_trimmed": "the same without the top 1%",
    "top_mean": "mean of the top 20%",
    "rest_mean": "mean of the rest",
    "ratio": "ratio of these two",
    "gini": "Gini coefficient (0 = even)",
    "cv": "standard deviation / mean",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="run folder of train.sh, or a checkpoint file")
    parser.add_argument("--checkpoint", default="best", help="best, last or a file's name (default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="DATA", help="data folder (default: the one it was trained on)")
    parser.add_argument("--batches", type=int, default=100, metavar="N", help="random batches (default: %(default)s)")
    parser.add_argument("--split", default="train", help="of the data that they come from (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=1, help="of the choice of batches and of dropout (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="arrays; numbers go into the same name with .json "
        "(default: RUN_DIR/analysis/sensitivity_<checkpoint>.npz, or ..._gradient.npz etc.: any chosen --average, "
        "--no-dropout, --normalise, --objective and --split are in the name)",
    )  # fmt: skip
    parser.add_argument(
        "--average",
        choices=("absolute", "gradient"),
        default="absolute",
        help="absolute: mean over batches of |theta * gradient|; gradient: |theta * mean gradient| "
        "(default: %(default)s)",
    )
    parser.add_argument("--no-dropout", action="store_true", help="measure in evaluation mode")
    parser.add_argument("--normalise", action="store_true", help="divide each batch's values by its loss")
    parser.add_argument(
        "--objective",
        choices=("cross_entropy", "training"),
        default="cross_entropy",
        help="cross_entropy: with the run's label smoothing, comparable between methods; training: what the run's "
        "criterion minimises (default: %(default)s)",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of a batch (default: as it was trained)")
    parser.add_argument("--cpu", action="store_true", help="keep off the GPU")
    parser.add_argument("--force", action="store_true", help="measure again, and replace what was measured otherwise")
    parser.add_argument(
        "--during-training",
        action="store_true",
        help="measure nothing: show what the training measured, if it had --sensitivity-interval",
    )


def run(args: argparse.Namespace) -> int:
    """Measure or show; returns the exit status."""
    if args.during_training:
        return _show_training(args.run_dir)
    for flag, value in (("--batches", args.batches), ("--max-tokens", args.max_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}: allowed is at least 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}: allowed is 0 to {2**32 - 1}")
    if args.objective == "training" and args.no_dropout:
        raise UserError(
            "--objective training and --no-dropout exclude each other: in evaluation mode every criterion is the plain "
            "cross-entropy, so leave one of them out"
        )
    out = args.out
    if out is not None and (out.suffix != ".npz" or not out.parent.is_dir()):
        reason = f"its folder '{out.parent}' does not exist" if out.suffix == ".npz" else "its name must end in .npz"
        raise UserError(f"--out '{out}': {reason}")
    if not args.run_dir.exists():
        raise UserError(f"'{args.run_dir}' does not exist: give a run folder of train.sh or a checkpoint file")

    from intra_distillation_fairseq import loading  # imports torch

    checkpoint = loading.find_checkpoint(args.run_dir, args.checkpoint)
    if out is None:
        out = sensitivity_file(checkpoint, _variant(args))
    with lock(out.parent / f".{out.stem}.lock", "the folder of the measurement"):
        return _measure(args, checkpoint, out)


def _variant(args: argparse.Namespace) -> str:
    """What a file name says of the kind of measurement: nothing of the defaults."""
    chosen = {
        "gradient": args.average == "gradient",
        "no_dropout": args.no_dropout,
        "normalised": args.normalise,
        "training": args.objective == "training",
        args.split.replace("/", "_"): args.split != "train",
    }
    return "".join(f"_{name}" for name, given in chosen.items() if given)


def _measure(args: argparse.Namespace, checkpoint: Path, out: Path) -> int:
    from intra_distillation_fairseq import loading
    from intra_distillation_fairseq.analysis import balance

    record_file = out.with_suffix(".json")
    state = fingerprint(checkpoint)
    asked = {
        "batches": args.batches,
        "split": args.split,
        "seed": args.seed,
        "average": args.average,
        "dropout": not args.no_dropout,
        "normalised": args.normalise,
        "objective": args.objective,
        "max_tokens": args.max_tokens,
        "data": _data_digest(args.data, checkpoint),
    }
    old = read_json(record_file)
    if not args.force and out.is_file() and isinstance(old, dict) and old.get("format") == FORMAT:
        same_bytes = old.get("checkpoint_sha256") == state["sha256"]
        different = _differences(old, asked if same_bytes else {"checkpoint": checkpoint.name, **asked})
        if same_bytes and not different:
            print("already measured, nothing to do (--force does it again)", file=sys.stderr)
            _show(old, out)
            return 0
        # Other bytes under the same name: the training went on, and what was measured is of a model that is gone.
        if same_bytes or old.get("checkpoint") != checkpoint.name:
            raise UserError(
                f"'{out}' was measured with {', '.join(different)}: --force replaces it, --out FILE keeps both"
            )
    started = time.monotonic()
    quiet()
    loaded = loading.load(checkpoint, data=args.data, device=_device(args.cpu))
    if not unchanged(checkpoint, state):
        raise UserError(f"'{checkpoint}' was replaced while it was read, by a training that goes on: try again")
    measured = _measured(args, loaded)
    arrays = measured.arrays()
    layers, modules = balance.groups(arrays, balance.layer_name, balance.module_name)
    record = {
        "format": FORMAT,
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": state["sha256"],
        "update": loaded.update,
        "settings": {
            **{key: asked[key] for key in ("split", "seed", "dropout", "average", "objective", "normalised")},
            "batches": measured.batches,
            "tokens": measured.tokens,
        },
        "asked": asked,
        "skipped_batches": measured.skipped,
        "loss": measured.loss,
        "summary": balance.summary(measured.in_order()),
        "layers": layers,
        "modules": modules,
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_mib": _peak_memory(loaded),
        "environment": environment(),
    }
    record_file.unlink(missing_ok=True)  # it belongs to the arrays that are replaced now
    _write_arrays(out, arrays)
    write_json(record_file, record)
    _show(record, out)
    return 0


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Which settings of a measurement are not those that are asked for now."""
    there = {"checkpoint": old.get("checkpoint"), **(old.get("asked") or {})}
    return [
        f"{key} {_brief(there.get(key))} (asked for: {_brief(value)})"
        for key, value in new.items()
        if there.get(key) != value
    ]


def _brief(value: Any) -> str:
    """Of a checksum, enough to tell two apart."""
    if value is None:
        return "as trained"
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)


def _measured(args: argparse.Namespace, loaded: Loaded) -> Sensitivity:
    from intra_distillation_fairseq.analysis import sensitivity

    model, task, config = loaded
    _load_split(loaded, args.split)
    dataset = task.dataset(args.split)
    batches = sensitivity.choose_batches(
        dataset,
        args.batches,
        args.seed,
        max_tokens=args.max_tokens or config.dataset.max_tokens,
        max_sentences=config.dataset.batch_size,
        multiple=config.dataset.required_batch_size_multiple,
        max_positions=_max_positions(loaded),
    )
    if len(batches) < args.batches:
        print(f"note: '{args.split}' has {len(batches)} batches, all of them are measured", file=sys.stderr)
    if args.objective == "training":
        criterion = task.build_criterion(config.criterion).to(loaded.device).train()
        if hasattr(criterion, "set_num_updates"):
            criterion.set_num_updates(loaded.update or 0)
    else:
        criterion = sensitivity.cross_entropy(task, float(getattr(config.criterion, "label_smoothing", 0.0)))
    with Progress("sensitivity", len(batches), "batches") as progress:
        measured = sensitivity.measure(
            model,
            criterion,
            sensitivity.collated(dataset, batches, loaded.device),
            seed=args.seed,
            dropout=not args.no_dropout,
            average=args.average,
            normalise=args.normalise,
            done=lambda number, loss: progress.show(number, {"loss": loss}),
        )
    if measured.skipped:
        print(f"note: {measured.skipped} batches were left out, their gradient is not finite", file=sys.stderr)
    return measured


def _load_split(loaded: Loaded, split: str) -> None:
    try:
        loaded.task.load_dataset(split)
    except FileNotFoundError:
        folder = Path(loaded.config.task.data.split(":")[0])
        there = ", ".join(sorted({path.name.split(".")[0] for path in folder.glob("*.idx")})) or "none"
        raise UserError(f"--split is '{split}': '{folder}' has {there}") from None


def _max_positions(loaded: Loaded) -> Any:
    from fairseq import utils

    return utils.resolve_max_positions(loaded.task.max_positions(), loaded.model.max_positions())


def _device(cpu: bool) -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and not cpu else "cpu"


def _data_digest(given: Path | None, checkpoint: Path) -> str | None:
    """What tells one data folder from another: its manifest, or its path where it has none; None if unknown."""
    record = RunFolder(checkpoint.parent).read()
    folder = given or (Path(record["data"]) if record else None)
    if folder is None:
        return None
    manifest = folder / "manifest.json"
    return fingerprint(manifest)["sha256"] if manifest.is_file() else str(folder.resolve())


def _peak_memory(loaded: Loaded) -> float:
    """Of the GPU's tensors, or of this whole process where there is no GPU; MiB."""
    import torch

    if loaded.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(loaded.device) / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    import numpy as np

    with replacing(path) as temporary, open(temporary, "wb") as file:  # given a name, numpy would append .npz to it
        np.savez(file, **arrays)


def _show(record: dict[str, Any], path: Path) -> None:
    settings = record["settings"]
    what = "cross-entropy" if settings["objective"] == "cross_entropy" else "training objective"
    print(
        f"{record['checkpoint']} (update {record['update']}): {what} {record['loss']:.4f} nats per token, "
        f"{settings['batches']} batches of {settings['split']} with {settings['tokens']:,} target tokens, "
        f"dropout {'on' if settings['dropout'] else 'off'}, {record['seconds']:.0f} s"
    )
    numbers = record["summary"]
    unit = "each divided by its batch's loss" if settings["normalised"] else "nats per token"
    print(f"\nsensitivity of {numbers['parameters']:,} parameters, {unit}")
    for key, text in _SHOWN.items():
        print(f"  {text:30} {_number(numbers[key])}")
    width = max(map(len, record["layers"]))
    print(f"\n{'layer':{width}} {'parameters':>12} {'mean':>10} {'std':>10}")
    for name, layer in record["layers"].items():
        print(f"{name:{width}} {layer['parameters']:12,} {_number(layer['mean']):>10} {_number(layer['std']):>10}")
    print(f"\n-> {path}")


def _show_training(run_dir: Path) -> int:
    check_folder(run_dir)
    path = run_dir / "sensitivity.jsonl"
    if not path.is_file():
        raise UserError(
            f"'{path}' does not exist, nothing was measured while training: train with --sensitivity-interval N, as in "
            "scripts/train.sh ... -- --sensitivity-interval 1000"
        )
    rows = [f"{'update':>8}" + "".join(f" {column:>11}" for column in ("loss", *_SHOWN))]
    for line in read_measurements(run_dir):
        values = [line["loss"], *(line["summary"][column] for column in _SHOWN)]
        rows.append(f"{line['update']:8}" + "".join(f" {_number(value):>11}" for value in values))
    print("\n".join(rows))  # not before all lines are known to be whole
    return 0


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4g}"
