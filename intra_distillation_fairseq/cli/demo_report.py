"""`intra-distillation demo-report`: a table and a picture of the training curves of finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from intra_distillation_fairseq.analysis.curves import draw_curves
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.comparison import baselines, relative, run_result, table
from intra_distillation_fairseq.experiments.logs import read_curves
from intra_distillation_fairseq.experiments.prepared import open_prepared
from intra_distillation_fairseq.experiments.recipes import evaluation_from
from intra_distillation_fairseq.experiments.runs import RunFolder
from intra_distillation_fairseq.files import write_json, write_text


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of demo-report."""
    parser.add_argument("--data", type=Path, required=True, metavar="DATA", help="data folder of the runs")
    parser.add_argument(
        "--runs", type=Path, nargs="+", required=True, metavar="RUN", help="run folders, trained and evaluated"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets results.txt, .json and curves.png")


def run(args: argparse.Namespace) -> int:
    """Write the report and print its table."""
    data = open_prepared(args.data, ("test",))
    folders = [RunFolder(path) for path in args.runs]
    rows = [run_result(folder) for folder in folders]
    methods = [row["method"] for row in rows]
    if len(set(methods)) < len(methods):
        raise UserError(f"--runs has two runs of one method ({', '.join(methods)}): give one of each")
    rows += baselines(data, evaluation_from(folders[0].read()["evaluation"]))
    args.out.mkdir(parents=True, exist_ok=True)
    draw_curves({row["method"]: read_curves(folder.log) for row, folder in zip(rows, folders)}, args.out / "curves.png")
    write_json(args.out / "results.json", rows)
    first = rows[0]
    text = (
        f"{table(rows)}\n\n"
        f"{first['sentences']} test sentences. BLEU: {first['bleu_signature']}; chrF: {first['chrf_signature']}.\n"
        "valid loss: label-smoothed cross-entropy of the scored checkpoint, in bits per token; "
        "seconds: training with its validations.\n"
        "Same data, seed and number of updates for both. So short a run shows that everything works, not which method\n"
        "is better: neither has converged.\n"
        f"texts: {relative(data.folder / 'raw')}\n"
        f"translations: eval/best/hypotheses.txt of each method's files; curves: {relative(args.out / 'curves.png')}\n"
    )
    write_text(args.out / "results.txt", text)
    print(text, end="")
    return 0
