"""Trains a tiny model on an invented text, stops, goes on and translates: the real commands."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.corpus.invented import Grammar
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import devices, generation, launch, logs, processes
from intra_distillation_fairseq.experiments.prepared import PreparedData, open_prepared
from intra_distillation_fairseq.experiments.recipes import Evaluation
from intra_distillation_fairseq.experiments.reproduction import INTRA_DISTILLATION

UPDATES, STOP = 10, 5
_SENTENCES = {"train": 200, "valid": 16, "test": 1}
_LANGUAGES = ("xx", "en")
_PASSES = 3
_MODEL: dict[str, Any] = {
    "arch": "transformer_small",
    **{f"{side}-layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}-embed-dim": 32 for side in ("encoder", "decoder")},
    **{f"{side}-ffn-embed-dim": 64 for side in ("encoder", "decoder")},
    **{f"{side}-attention-heads": 2 for side in ("encoder", "decoder")},
    "criterion": "intra_distillation",
    "label-smoothing": 0.1,
    "id-num-passes": _PASSES,
    "id-alpha": 5,
    "optimizer": "adam",
    "lr": 0.001,
    "max-tokens": 400,
    "log-interval": 1,
    "num-workers": 0,
    "required-batch-size-multiple": 1,
    "no-epoch-checkpoints": True,
}


class Failed(Exception):
    """A step did not work.

    Attributes:
        log: the end of what it said.
    """

    def __init__(self, step: str, reason: str, log: str = ""):
        super().__init__(f"{step}: {reason}")
        self.log = log


def run(folder: Path, *, cpu: bool) -> str:
    """Try everything once.

    Args:
        folder: an empty one, for the data, the run and their logs.
        cpu: keep off the GPU.
    Returns:
        What worked, in one line.
    Raises:
        Failed: something did not.
        SystemExit: a signal came; with 128 + its number.
    """
    started = time.monotonic()
    try:
        where = _try_all(folder, cpu)
    except (UserError, OSError) as error:
        raise Failed("trial", str(error)) from None
    done = f"{UPDATES} updates with {_PASSES} passes {where}, resumed at {STOP}, and a sentence translated"
    return f"{done}, in {time.monotonic() - started:.0f} s"


def _try_all(folder: Path, cpu: bool) -> str:
    data = _prepare(folder)
    gpus = [] if cpu else devices.probe()["devices"]
    where = f"on {gpus[0]} in float16" if gpus else "on the CPU"
    for until in (STOP, UPDATES):
        _train(folder, data, gpus, until)
    _translate(folder, data, cpu=not gpus)
    return where


def _prepare(folder: Path) -> PreparedData:
    grammar, text = Grammar(1), folder / "text"
    text.mkdir()
    for split, size in _SENTENCES.items():
        sentences = [grammar.sentence() for _ in range(size)]
        for lang, side in zip(_LANGUAGES, ("source", "target")):
            lines = "".join(f"{getattr(sentence, side)}\n" for sentence in sentences)
            (text / f"{split}.{lang}").write_text(lines, encoding="utf-8", newline="\n")
    prefixes = [word for split in _SENTENCES for word in (f"--{split}", str(text / split))]
    languages = ["--src", _LANGUAGES[0], "--tgt", _LANGUAGES[1]]
    words = ["prepare-parallel", *prefixes, *languages, "--out", str(folder / "data"), "--jobs", "1"]
    _step("prepare", [*INTRA_DISTILLATION, *words], folder / "prepare.log")
    return open_prepared(folder / "data", tuple(_SENTENCES))


def _train(folder: Path, data: PreparedData, gpus: list[str], until: int) -> None:
    command = launch.train_command(
        processes.fairseq_command("fairseq-train"),
        data,
        {**_MODEL, "max-update": until},
        save_dir=folder / "run",
        seed=1,
        precision=launch.choose_precision("auto", gpus, []),
        cpu=not gpus,
        # One process, whatever a launcher or the number of GPUs says: it is the installation that is tried.
        flags=["--distributed-world-size", "1"],
    )
    what, log = ("train" if until == STOP else "resume"), folder / f"train{until}.log"
    _step(what, command, log)
    read = logs.read_log(log)
    if read.saved != until or not read.trained:
        raise Failed(what, f"it ended at update {read.update} instead of {until}", processes.tail(log))
    if until > STOP and f"@ {STOP} updates" not in log.read_text(encoding="utf-8", errors="replace"):
        raise Failed(what, f"it did not go on from update {STOP}", processes.tail(log))


def _translate(folder: Path, data: PreparedData, *, cpu: bool) -> None:
    output = folder / "generate.txt"
    command = generation.generate_command(
        processes.fairseq_command("fairseq-generate"),
        data,
        folder / "run" / "checkpoint_last.pt",
        Evaluation(beam=2, max_len_b=20),
        cpu=cpu,
    )
    _step("translate", command, output)
    translations = generation.read_hypotheses(output)
    if len(translations) != _SENTENCES["test"]:
        raise Failed("translate", f"{len(translations)} translations came", processes.tail(output))


def _step(name: str, command: list[str], log: Path) -> None:
    status = processes.run_logged(command, log, follow=lambda line: None)
    if processes.was_stopped(status):
        raise SystemExit(status)
    if status:
        end = processes.tail(log)
        raise Failed(name, f"{processes.describe_status(status)}, {end.split(chr(10))[-1]}", end)
