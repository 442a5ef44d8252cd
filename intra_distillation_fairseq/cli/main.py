"""Entry point of `intra-distillation`. Each sub-command is one module of this folder."""

from __future__ import annotations

import argparse
import importlib
import sys

from intra_distillation_fairseq.errors import UserError

# sub-command -> (module of this folder, one line of help). A module has configure(parser) and run(args) -> exit code;
# it is imported only when its command is called, so that `--help` does not wait for torch.
COMMANDS = {
    "prepare-iwslt14": ("prepare_iwslt14", "IWSLT'14 archive -> data folders for training, one per language pair"),
    "prepare-wmt17": ("prepare_wmt17", "WMT'17 English-German archives -> a data folder for training"),
    "prepare-parallel": ("prepare_parallel", "your own parallel text files -> a data folder for training"),
    "train": ("train", "train one method of a config on a data folder, or go on with it"),
    "evaluate": ("evaluate", "translate the test set with a trained model and score it"),
    "reproduce": ("reproduce", "every run of Table 2 or 3 of the paper, from the archives to the table"),
    "table": ("table", "our results beside the published ones, from whatever a results folder holds"),
    "sensitivity": ("sensitivity", "how much each parameter of a trained model contributes, |theta * dL/dtheta|"),
    "prune": ("prune", "set the least sensitive parameters to zero, step by step, and score the model at each step"),
    "self-distill": ("self_distill", "train a student from its teacher, round after round (Table 1 of the paper)"),
    "truncate": ("truncate", "cut a model to its first layers: a small ordinary checkpoint"),
    "layers": ("layers", "score, size and speed of a model cut to its first layers"),
    "ablation": ("ablation", "runs that differ in the number of passes, or in alpha, and their figure"),
    "figure": ("figure", "draw a figure of the paper from the files of finished runs"),
    "doctor": ("doctor", "look over the installation and try it with a tiny training; start here when something fails"),
    "demo-archive": ("demo_archive", "write an invented language pair as an archive of the layout of IWSLT'14"),
    "demo-report": ("demo_report", "table and training curves of finished runs, beside answers without a model"),
    "user-dir": ("user_dir", "print the folder to give to fairseq as --user-dir"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; returns the process's exit code (0 success, 2 a mistake of the user)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="intra-distillation", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, help_line) in COMMANDS.items():
        sub = commands.add_parser(name, help=help_line, description=help_line)
        if argv and argv[0] == name:
            importlib.import_module(f"{__package__}.{module}").configure(sub)
    # Split off here: argparse cannot tell a sub-command's flags from those meant for another program.
    own, after_dashes = argv, []
    if "--" in argv:
        own, after_dashes = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args = parser.parse_args(own)
    command = importlib.import_module(f"{__package__}.{COMMANDS[args.command][0]}")
    args.after_dashes = after_dashes
    if after_dashes and not getattr(command, "TAKES_FLAGS", False):
        parser.error(f"{args.command} takes nothing after --: '{' '.join(after_dashes)}'")
    try:
        return command.run(args) or 0
    except UserError as error:
        print(f"intra-distillation {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"intra-distillation {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
