"""Builds the fairseq-train command of a run, and refuses those that would train nothing, or twice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.prepared import PreparedData
from intra_distillation_fairseq.experiments.recipes import (
    OPTIONS_OF_EVERY_START,
    OPTIONS_OF_TRAIN,
    as_flags,
    at_every_start,
)
from intra_distillation_fairseq.experiments.rendezvous import Launched, Told, on_this_machine, why_not

TASK = "translation_intra_distillation"
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
USER_DIR = Path(__file__).resolve().parents[1]
_PRECISION_FLAGS = ("amp", "memory-efficient-fp16", "memory-efficient-bf16")
# How many processes train, and how they find each other: differs from process to process and from launch to launch.
_PROCESSES = (
    *("distributed-world-size", "distributed-rank", "distributed-init-method", "distributed-port"),
    *("distributed-backend", "device-id", "local_rank"),
)
_BARE = ("distributed-no-spawn",)
# Where the curves are shown decides nothing: one may begin, or stop, to look at a run that goes on.
_BOARDS = ("tensorboard-logdir", "wandb-project")
# What becomes of an update that goes wrong: a training that stopped for one may go on without it.
_POLICIES = ("id-nan-policy",)


def last_value(words: list[str], option: str) -> str | None:
    """The value that counts of an option given perhaps several times, as `--name value` or `--name=value`, or None."""
    value = None
    for index, word in enumerate(words):
        if word == f"--{option}":
            value = words[index + 1] if index + 1 < len(words) else ""
        elif word.startswith(f"--{option}="):
            value = word.partition("=")[2]
    return value


def has_flag(words: list[str], option: str) -> bool:
    """Whether a bare flag is given, perhaps shortened: argparse takes any unambiguous beginning of it for the flag."""
    return any(word.startswith("--") and len(word) > 4 and f"--{option}".startswith(word) for word in words)


def max_update(words: list[str]) -> int:
    """--max-update of a command, 0 where it is not limited.

    Raises:
        UserError: not a whole number, or neither --max-update nor --max-epoch limits the training.
    """
    given = last_value(words, "max-update") or "0"
    if not given.isdigit():
        raise UserError(f"--max-update is '{given}': it must be a whole number of updates")
    if given == "0" and (last_value(words, "max-epoch") or "0") == "0":
        raise UserError(
            "neither max-update nor max-epoch is given: the training would never end; add one to the config"
        )
    return int(given)


def check_flags(flags: list[str]) -> None:
    """Refuse flags after `--` that train.sh sets itself, and those that would undo a run when it goes on.

    Raises:
        UserError: names the flag, and where its value comes from or what to give instead.
    """
    for flag in flags:
        name = flag.partition("=")[0].removeprefix("--")
        # argparse takes any unambiguous beginning of an option for the option.
        whole = next((option for option in OPTIONS_OF_TRAIN if len(name) > 2 and option.startswith(name)), None)
        if flag.startswith("--") and whole:
            raise UserError(f"'{flag}' cannot be given after --: it comes from {OPTIONS_OF_TRAIN[whole]}")
        if flag.startswith("--") and (undoes := _of_every_start(name)):
            raise UserError(f"'{flag}' cannot be given after --: {at_every_start(undoes)}")


def _of_every_start(name: str) -> str | None:
    return next((option for option in OPTIONS_OF_EVERY_START if len(name) > 2 and option.startswith(name)), None)


def lasting_flags(flags: list[str]) -> list[str]:
    """Flags without those that are no settings of a run: its processes, where curves are shown, what stops it."""
    kept, skip = [], False
    for flag in flags:
        name, equals, _ = flag.removeprefix("--").partition("=")
        if skip:
            skip = False
        elif flag.startswith("--") and name in (*_PROCESSES, *_BOARDS, *_POLICIES):
            skip = not equals
        elif not (flag.startswith("--") and name in _BARE):
            kept.append(flag)
    return kept


def choose_precision(asked: str, devices: list[str], words: list[str]) -> str:
    """Turn `auto` into float16 on a GPU (as published) and float32 on a CPU.

    Args:
        asked: --precision of train.sh.
        devices: the GPUs.
        words: the recipe's options and the flags after `--`. One of fairseq's own flags of mixed precision among them
            decides alone: `auto` then means fp32, which adds none.
    Raises:
        UserError: float16 without a GPU, two precisions at once, or --tpu.
    """
    if has_flag(words, "tpu"):
        raise UserError("'--tpu' cannot be given to train.sh, which trains on GPUs and CPUs only: leave it out")
    other = next((flag for flag in _PRECISION_FLAGS if has_flag(words, flag)), None)
    if other and asked in ("fp16", "bf16"):
        raise UserError(f"--precision '{asked}' and '--{other}' contradict each other: leave one of them out")
    gpu = bool(devices) and "--cpu" not in words
    if asked == "auto":
        return "fp16" if gpu and not other else "fp32"
    if asked == "fp16" and not gpu:
        raise UserError("--precision 'fp16' needs a GPU, and there is none: use auto, fp32 or bf16")
    return asked


class Batch(NamedTuple):
    """What several processes make of the recipe's batch.

    Attributes:
        flags: words to put before the user's own, by which the batch stays the recipe's; perhaps none.
        line: the same for the reader, in one line.
    """

    flags: list[str]
    line: str


def usable_gpus(words: list[str], devices: list[str]) -> int:
    """How many GPUs a command may use: none with --cpu."""
    return 0 if "--cpu" in words else len(devices)


def number_of_processes(options: list[str], flags: list[str], devices: list[str], by: Launched | None = None) -> int:
    """Processes that train together: --distributed-world-size, else those that were launched, else one for each GPU.

    Args:
        options: the recipe's options, as words.
        flags: what the user gave after `--`.
        devices: the GPUs.
        by: the launcher of this process.
    """
    given = last_value(options + flags, "distributed-world-size")
    if given and given.isdigit():
        return max(1, int(given))
    return by.world_size if by else max(1, usable_gpus(options + flags, devices))


def batch(options: list[str], flags: list[str], devices: list[str], by: Launched | None = None) -> Batch | None:
    """The batch on several processes (one per GPU), each of which takes max-tokens for itself.

    A recipe that collects several batches for an update (update-freq above 1) collects fewer on each process. One that
    does not is left as it is, and the line says what to give.

    Args:
        options: the recipe's options, as words.
        flags: what the user gave after `--`.
        devices: the GPUs.
        by: the launcher of this process.
    Returns:
        None with one process, or where the user has decided on the batch.
    """
    given = last_value(options + flags, "distributed-world-size")
    processes = number_of_processes(options, flags, devices, by)
    tokens, frequency = (last_value(options, name) or "" for name in ("max-tokens", "update-freq"))
    if processes < 2 or not tokens.isdigit() or any(last_value(flags, name) for name in ("max-tokens", "update-freq")):
        return None
    what = f"{processes} {'GPUs' if usable_gpus(options + flags, devices) else 'processes'}"
    if frequency.isdigit() and int(frequency) > 1:
        derived = max(1, int(int(frequency) / processes + 0.5))
        words, total, wanted = ["--update-freq", str(derived)], processes * derived, int(frequency)
        line = f"{what}: update-freq {derived}, so a batch has {processes} x {derived} x {tokens} = "
        line += f"{total * int(tokens):,} tokens, "
        recipe = f"{wanted} x {tokens} = {wanted * int(tokens):,}"
        return Batch(words, line + ("as the recipe's" if total == wanted else f"the nearest to the recipe's {recipe}"))
    if given is not None:
        return None
    return Batch(
        [],
        f"each of the {what} takes max-tokens {tokens}, so a batch is {processes} times the recipe's: "
        f"-- --max-tokens {int(tokens) // processes} keeps the recipe's batch",
    )


def meeting_flags(options: list[str], flags: list[str], devices: list[str], by: Launched | None) -> list[str]:
    """fairseq's flags by which the processes of one training find each other; the user's own, put after them, win.

    Args:
        options: the recipe's options, as words.
        flags: what the user gave after `--`.
        devices: the GPUs.
        by: the launcher of this process.
    Raises:
        UserError: a launch of several processes that would do nothing, hang, or train several times into one folder
            (P9); it says what to give instead.
    """
    gpus = usable_gpus(options + flags, devices)
    words = by.flags(gpus) if by else []
    given = options + words + flags
    told = Told(
        world_size=_whole_number(given, "distributed-world-size", max(1, gpus)),
        rank=_whole_number(given, "distributed-rank", 0),
        init_method=last_value(given, "distributed-init-method"),
        no_spawn="--distributed-no-spawn" in given,
        backend=last_value(given, "distributed-backend") or ("nccl" if gpus else "gloo"),
    )
    if reason := why_not(told, by, gpus, os.environ):
        raise UserError(reason)
    if by is None and told.no_spawn and not gpus:
        return ["--distributed-backend", "gloo"]
    if by is None and told.world_size > 1 and told.init_method is None and "SLURM_JOB_ID" in os.environ:
        return on_this_machine()
    return words


def _whole_number(words: list[str], option: str, otherwise: int) -> int:
    given = last_value(words, option)
    if given is not None and not (given.isascii() and given.isdigit()):
        raise UserError(f"--{option} is '{given}': it must be a whole number")
    return otherwise if given is None else int(given)


def train_command(
    executable: str,
    data: PreparedData,
    options: dict[str, Any],
    *,
    save_dir: Path,
    seed: int,
    precision: str,
    cpu: bool,
    flags: list[str],
) -> list[str]:
    """The words of fairseq-train; `flags` come last, because the last value given counts.

    Args:
        executable: path of fairseq-train.
        data: the data folder.
        options: the recipe's options for the method.
        save_dir: the run folder.
        seed: --seed.
        precision: fp32, fp16 or bf16.
        cpu: keep off the GPU.
        flags: what the user gave after `--`.
    """
    return [
        *(executable, str(data.bin), "--user-dir", str(USER_DIR), "--task", TASK),
        *("--source-lang", data.source_lang, "--target-lang", data.target_lang),
        *as_flags(options),
        *("--save-dir", str(save_dir), "--seed", str(seed), "--log-format", "json"),
        *([f"--{precision}"] if precision != "fp32" else []),
        *(["--cpu"] if cpu and "--cpu" not in flags else []),
        # fairseq flattens gradients of 16 bits into a GPU's memory, whether there is a GPU or not.
        *(["--fp16-no-flatten-grads"] if precision == "bf16" and (cpu or "--cpu" in flags) else []),
        *flags,
    ]
