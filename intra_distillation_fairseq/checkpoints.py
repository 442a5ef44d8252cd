"""Reads checkpoints, averages them, tells what one holds. Files are vetted, and read with torch's safe loader only."""

from __future__ import annotations

import argparse
import errno
import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from intra_distillation_fairseq import vetting
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.files import replacing

# Of an error of fairseq's in a message, in characters: some hold whole configurations.
_LONGEST_CAUSE = 200


@dataclass(frozen=True)
class CheckpointFacts:
    """Attributes:
    update: completed updates, None if the file does not say.
    valid_loss: validation loss (per token, base 2) when it was saved, None without a validation.
    """

    update: int | None
    valid_loss: float | None


class RefusedCheckpoint(UserError, pickle.UnpicklingError):
    """A checkpoint that was not loaded, and why."""


def refusal(error: Exception, path: Path | str) -> RefusedCheckpoint | None:
    """What an error of torch's loader says about the file, in one line and without torch's advice for programmers.

    Args:
        error: what `torch.load` raised.
        path: the file, as the user knows it.
    Returns:
        The error to raise instead; None where the file is not to blame.
    """
    if isinstance(error, pickle.UnpicklingError):
        _, found, rest = str(error).partition("GLOBAL ")
        what = f"it holds {rest.split(' ')[0]}" if found else "its content is not that of a checkpoint"
        return RefusedCheckpoint(
            f"checkpoint '{path}' was not loaded: {error if isinstance(error, vetting.Unwanted) else what}; allowed "
            "are tensors, plain values and the types of fairseq's own checkpoints, since anything else can run code "
            "while it is read"
        )
    # Of torch's RuntimeErrors: a zip file without its end, a file of the old format without its end, a damaged one.
    reasons = ("zip archive", "unexpected EOF", "central directory", "corrupt")
    cut = isinstance(error, EOFError) or (
        isinstance(error, RuntimeError) and any(reason in str(error) for reason in reasons)
    )
    # Looking for the end of some cut zip files, torch seeks to before their beginning.
    if cut or (isinstance(error, OSError) and error.errno == errno.EINVAL):
        return RefusedCheckpoint(
            f"checkpoint '{path}' is not a whole file (cut off while it was written or copied?): take another one "
            "(to train on from it: --continue-once)"
        )
    return None


def unreadable(error: Exception, path: Path | str) -> RefusedCheckpoint:
    """What to raise for an error that `refusal` knows nothing about."""
    return RefusedCheckpoint(f"checkpoint '{path}' cannot be read ({cause(error)}): is it made by fairseq?")


def cause(error: Exception) -> str:
    """An error in one line, shortened."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST_CAUSE else f"{text[:_LONGEST_CAUSE]}..."


def load(path: Path) -> dict[str, Any]:
    """Read a fairseq checkpoint to the CPU; tensors are mapped from the file, where its format allows, until used.

    Raises:
        UserError: the file is missing, cut off, not a checkpoint, or holds what fairseq's checkpoints do not.
    """
    _allow_fairseq_types()
    if not path.is_file():
        raise UserError(f"checkpoint '{path}' does not exist")
    try:
        state = read(path)
    except OSError as error:
        raise UserError(f"checkpoint '{path}' cannot be read ({error.strerror}): check its permissions") from None
    if "model" not in state:
        raise UserError(f"'{path}' is not a fairseq checkpoint: it has no 'model'")
    for part, right, what in _PARTS:
        if not right(state.get(part)):
            raise UserError(f"'{path}' is not a fairseq checkpoint: its '{part}' is not {what}")
    return state


def _is_model(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(held, torch.Tensor) for name, held in value.items()
    )


def _is_history(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(entry, dict) for entry in value))


# What a checkpoint may have beside others, how it is told, and its name in a message.
_PARTS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("model", _is_model, "a dict of tensors"),
    ("optimizer_history", _is_history, "a list of dicts"),
    ("extra_state", lambda value: value is None or isinstance(value, dict), "a dict"),
    ("cfg", lambda value: value is None or isinstance(value, (dict, DictConfig)), "a dict"),
    ("args", lambda value: value is None or isinstance(value, argparse.Namespace), "a Namespace"),
)


def read(path: Path) -> dict[Any, Any]:
    """What a file of torch.save holds, if that is nothing but what fairseq writes (see vetting.py).

    Raises:
        RefusedCheckpoint: anything else, or a file that is damaged or cut off; nothing of it has run.
        OSError: the file cannot be opened.
    """
    try:
        zipped = vetting.check_file(path)
        # The format of PyTorch before 1.6 cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        vetting.check_values(state, path.stat().st_size)
        return state
    except Exception as error:  # torch raises many kinds for what is no checkpoint at all
        refused = refusal(error, path)
        if refused is None and isinstance(error, OSError):
            raise
        raise refused or unreadable(error, path) from None


def _allow_fairseq_types() -> None:
    """Have the plugin tell torch's safe loader which types fairseq's checkpoints hold."""
    before = logging.root.manager.disable
    # fairseq advises to install packages that it does not need here
    logging.disable(max(before, logging.INFO))
    try:
        from intra_distillation_fairseq import plugin  # noqa: F401
    finally:
        logging.disable(before)


def facts(path: Path) -> CheckpointFacts:
    """What a checkpoint says about itself."""
    state = load(path)
    history = state.get("optimizer_history") or [{}]
    update, loss = history[-1].get("num_updates"), (state.get("extra_state") or {}).get("val_loss")
    return CheckpointFacts(
        update if isinstance(update, int) else None, loss if isinstance(loss, (int, float, np.number)) else None
    )


def average(paths: list[Path], output: Path) -> None:
    """Write the mean of several checkpoints' parameters.

    Sums are float64 and the mean is cast back to each parameter's type; whole numbers are rounded down. Configuration
    and history are the first file's; the optimizer's state is left out, since a mean of it means nothing.

    Args:
        paths: checkpoints of one model, at least one.
        output: the file to write, whole or not at all.
    Raises:
        UserError: a file cannot be read, or its parameters differ in name or shape from the first one's.
    """
    first = load(paths[0])
    sums = {name: value.to(torch.float64, copy=True) for name, value in first["model"].items()}
    for path in paths[1:]:
        model = load(path)["model"]
        if model.keys() != sums.keys():
            name = sorted(model.keys() ^ sums.keys())[0]
            raise UserError(f"'{path}' and '{paths[0]}' are not of one model: only one of them has '{name}'")
        for name, value in model.items():
            if value.shape != sums[name].shape:
                raise UserError(
                    f"'{path}' and '{paths[0]}' are not of one model: '{name}' has the shapes "
                    f"{tuple(value.shape)} and {tuple(sums[name].shape)}"
                )
            sums[name] += value
    mean = {}
    for name, value in first["model"].items():
        total = sums[name] / len(paths)
        mean[name] = (total if value.is_floating_point() else total.floor()).to(value.dtype)
    state = {key: value for key, value in first.items() if key != "last_optimizer_state"}
    write({**state, "model": mean}, output)


def write(state: dict[str, Any], output: Path) -> None:
    """Write a checkpoint, whole or not at all."""
    with replacing(output) as temporary:
        torch.save(state, temporary)
