"""fairseq's commands in processes of their own, without three seconds of imports for each.

A fork server imports fairseq and the plugin once; each command is a fork of it, with its own arguments, output and exit
code. What depends on the order of imports is tested through real processes (`fresh=True`).
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import intra_distillation_fairseq

USER_DIR = Path(intra_distillation_fairseq.__file__).parent

# A model that takes milliseconds per update.
TINY_MODEL = (
    "--arch transformer_small --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16 "
    "--encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 --encoder-attention-heads 2 --decoder-attention-heads 2"
).split()
# The same as the beginning of a recipe for train.sh; further options of the section `train` may follow.
TINY_RECIPE = "train:" + "".join(
    f"\n  {name.removeprefix('--')}: {value}" for name, value in zip(TINY_MODEL[::2], TINY_MODEL[1::2])
)
TRAINING = (
    "--optimizer adam --lr 0.005 --max-tokens 300 --num-workers 0 --log-format json --log-interval 1 --cpu"
).split()

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["fairseq_cli.train", "fairseq_cli.generate", "intra_distillation_fairseq"])


def _run_here(name: str, arguments: list[str], output: str, errors: str, before: Callable[[], None] | None) -> None:
    """In the forked process: the command with its output in files; leaves with the command's exit code."""
    for stream, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    sys.argv = [f"fairseq-{name}", *arguments]
    multiprocessing.set_start_method("fork", force=True)  # data loaders as in a process that was started by hand
    code = 0
    try:
        if before:
            before()
        importlib.import_module(f"fairseq_cli.{name}").cli_main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as where nothing catches it
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    sys.modules["fairseq.logging.progress_bar"]._close_writers()  # TensorBoard's, for an exit that is none
    for data_loader in multiprocessing.active_children():
        data_loader.kill()
    os._exit(code)


class Running:
    """A command under way; `before` is a function of a test module, called in its process before it."""

    def __init__(self, name: str, *arguments: object, before: Callable[[], None] | None = None):
        self.arguments = [str(a) for a in arguments]
        self._files = [tempfile.mkstemp(prefix="fairseq-")[1] for _ in range(2)]
        self._process = forkserver.Process(target=_run_here, args=(name, self.arguments, *self._files, before))
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def output(self) -> str:
        """What it has written so far."""
        return Path(self._files[0]).read_text(encoding="utf-8", errors="replace")

    def ended(self, within: float) -> bool:
        """Wait for its end, for so many seconds at most."""
        self._process.join(within)
        return self._process.exitcode is not None

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        texts = [Path(f).read_text(encoding="utf-8", errors="replace") for f in self._files]
        for f in self._files:
            os.unlink(f)
        return subprocess.CompletedProcess(self.arguments, self._process.exitcode, *texts)


def command(name: str, *arguments: object, fresh: bool = False, **kwargs) -> subprocess.CompletedProcess:
    """Run a fairseq command (train, generate, ...); the result has its texts and exit code.

    Args:
        name: module of fairseq_cli.
        arguments: its command line.
        fresh: start a new interpreter; further keyword arguments are subprocess.run's.
    """
    if not fresh:
        return Running(name, *arguments).wait()
    return subprocess.run(
        [sys.executable, "-m", f"fairseq_cli.{name}", *map(str, arguments)], capture_output=True, text=True, **kwargs
    )
