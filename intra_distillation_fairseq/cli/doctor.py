"""`intra-distillation doctor`: look over the installation and try it; each line is ok, a warning or a failure."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import diagnosis
from intra_distillation_fairseq.experiments.runs import environment
from intra_distillation_fairseq.files import write_json


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--no-run", action="store_true", help="only look: no training of 10 updates")
    parser.add_argument("--cpu", action="store_true", help="keep that training off the GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it for a bug report, too")


def run(args: argparse.Namespace) -> int:
    """Print a line for each part; returns 0, or 1 where one has failed."""
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json '{args.json}': its folder does not exist: make it, or give another file")
    if args.json is not None and (args.json.is_dir() or not os.access(args.json.absolute().parent, os.W_OK)):
        raise UserError(f"--json '{args.json}' cannot be written: give the name of a file in a folder of yours")
    for number in (signal.SIGTERM, signal.SIGHUP):  # by an exception, which takes the temporary folder along
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    findings = []
    for finding in diagnosis.examine(trial=not args.no_run, cpu=args.cpu):
        print(finding.line(), flush=True)
        findings.append(finding)
    if args.json is not None:
        write_json(args.json, {"environment": environment(), "findings": [one._asdict() for one in findings]})
    failed = sum(one.status == diagnosis.FAIL for one in findings)
    warned = sum(one.status == diagnosis.WARNING for one in findings)
    print(f"\n{failed} failed, {warned} warnings, {len(findings) - failed - warned} ok")
    return 1 if failed else 0
