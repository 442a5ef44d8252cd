"""`intra-distillation prune`: set the least sensitive parameters to zero, step by step, and score the model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.analysis.figures import draw_pruning
from intra_distillation_fairseq.analysis.run_files import sensitivity_file
from intra_distillation_fairseq.cli.quiet import quiet
from intra_distillation_fairseq.cli.say import say
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import pruning_curve
from intra_distillation_fairseq.experiments.prepared import open_prepared
from intra_distillation_fairseq.experiments.recipes import evaluation_as_dict
from intra_distillation_fairseq.experiments.translation import translate_and_score
from intra_distillation_fairseq.files import file_sha256, lock, write_text


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of prune."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="run folder of train.sh, or a checkpoint file")
    parser.add_argument(
        "--checkpoint", default="best", help="best, last, or the name of a file in RUN_DIR (default: %(default)s)"
    )
    parser.add_argument(
        "--sensitivity",
        type=Path,
        metavar="FILE",
        help="npz file of `intra-distillation sensitivity` (default: RUN_DIR/analysis/sensitivity_<checkpoint>.npz)",
    )
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        default=[0, 0.1, 0.2, 0.3, 0.4, 0.5],
        metavar="R",
        help="shares of the prunable parameters to set to zero, each 0 to 1 (default: 0 to 0.5 by 0.1)",
    )
    controls = pruning_curve.ORDERS[1:]
    parser.add_argument(
        "--controls",
        nargs="*",
        choices=controls,
        default=controls,
        help="other orders to compare with: smallest first, and at random (default: both; none without a value)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the random order (default: %(default)s)")
    parser.add_argument(
        "--data", type=Path, metavar="DATA", help="prepared data folder (default: the one it was trained on)"
    )
    parser.add_argument(
        "--save", type=Path, metavar="DIR", help="keep each pruned model as DIR/pruned_<order>_<ratio>.pt"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="gets pruning.json and .tsv (default: RUN_DIR/analysis, with the figure)",
    )
    parser.add_argument("--cpu", action="store_true", help="keep off the GPU")
    parser.add_argument(
        "--force", action="store_true", help="measure these points again, and drop those of other settings"
    )


def run(args: argparse.Namespace) -> int:
    """Prune and score; returns the exit status."""
    wrong = [ratio for ratio in args.ratios if not 0 <= ratio <= 1]
    if wrong:
        raise UserError(f"--ratios has '{wrong[0]:g}': allowed are shares of the parameters, from 0 to 1, as in 0.3")
    from intra_distillation_fairseq.loading import find_checkpoint  # imports torch

    checkpoint = find_checkpoint(args.run_dir, args.checkpoint)
    out = args.out or checkpoint.parent / "analysis"
    with lock(out / ".prune.lock", "the folder of the pruning curve"):
        return _prune(args, checkpoint, out)


def _prune(args: argparse.Namespace, checkpoint: Path, out: Path) -> int:
    import torch

    from intra_distillation_fairseq.experiments.prunable_model import PrunableModel, read_sensitivity
    from intra_distillation_fairseq.loading import load

    quiet()
    loaded = load(checkpoint, data=args.data)
    if loaded.data is None:
        raise UserError(
            f"'{checkpoint}' is not in a run folder, which would name its test set: give --data a folder made by one "
            "of the prepare scripts"
        )
    data = open_prepared(loaded.data.folder, ("test",))
    evaluation = loaded.evaluation
    model = PrunableModel(checkpoint, loaded.model)
    file = args.sensitivity or sensitivity_file(checkpoint)
    sensitivity = read_sensitivity(file, model)
    settings = {
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": model.sha256,
        "sensitivity_sha256": file_sha256(file),
        "seed": args.seed,
        "prunable": len(model),
        "data_digest": data.digest,
        "evaluation": evaluation_as_dict(evaluation),
    }
    if args.save:
        _make_folder(args.save)
    record = pruning_curve.PruningRecord(out / "pruning.json", settings, force=args.force)
    cpu = args.cpu or not torch.cuda.is_available()

    def score(pruned: Path, folder: Path, label: str) -> dict[str, Any]:
        return translate_and_score(data, pruned, evaluation, folder, cpu=cpu, label=label)

    measured = pruning_curve.measure(
        record,
        model,
        sensitivity,
        [order for order in pruning_curve.ORDERS if order == "sensitivity" or order in args.controls],
        sorted({abs(ratio) for ratio in args.ratios}),  # abs: -0 is 0
        seed=args.seed,
        force=args.force,
        score=score,
        save=args.save,
        say=say,
    )
    if not measured:
        say("every score is known already (--force measures again)")
    write_text(out / "pruning.tsv", pruning_curve.tsv(record))
    print(pruning_curve.table(record), end="", flush=True)
    beside = ".tsv and the figure" if _draw(checkpoint.parent, out) else ".tsv"
    say(f"-> {out / 'pruning.json'}, with {beside} beside it")
    return 0


def _draw(run: Path, out: Path) -> bool:
    """Whether there is a figure now."""
    if out.resolve() != (run / "analysis").resolve():
        return False  # figures are drawn from what run folders hold
    try:
        draw_pruning([run], out / "pruning")
    except ImportError:
        say("no figure: matplotlib is not installed")
        return False
    return True


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save '{path}' cannot be made ({error.strerror}): give another folder") from None
