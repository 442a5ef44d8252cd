"""Entry point of `intra-distillation`. Each sub-command is one module of this folder."""

from __future__ import annotations

import argparse
import importlib
import sys

from intra_distillation_fairseq.errors import UserError

# sub-command -> (module of this folder, one line of help). A module has configure(parser) and run(args) -> exit code;
# it is imported only when its command is called, so that `--help` does not wait for torch.
COMMANDS = {
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
    args = parser.parse_args(argv)
    command = importlib.import_module(f"{__package__}.{COMMANDS[args.command][0]}")
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
