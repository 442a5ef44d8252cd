"""Checkpoints are on the disk, whole, before they get their names; a full disk costs none of the old ones."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from intra_distillation_fairseq.compat.wrapping import wrap

logger = logging.getLogger(__name__)

TEMPORARY_ENDING = ".tmp"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# fairseq writes it before it ends with an exception, which is what the user has to see.
_AFTER_A_CRASH = "crash.pt"


def write_checkpoints_whole() -> None:
    """P3: fairseq renames a file that may not be on the disk yet, and tries three times to write on a full one."""

    def wrapper(save: Callable) -> Callable:
        def save_whole(state: dict[str, Any], filename: str, async_write: bool = False) -> None:
            if async_write or not PathManager.supports_rename(filename):
                return save(state, filename, async_write)
            try:
                with _replacing(filename) as temporary, open(temporary, "wb") as file:
                    torch.save(state, file)
            except Exception as error:
                if (why := _no_room(error)) is None:
                    raise
                message = _explain(filename, _size(state), why)
                if Path(filename).name != _AFTER_A_CRASH:
                    raise SystemExit(f"error: {message}") from None
                logger.error(message)

        return save_whole

    wrap(checkpoint_utils, "torch_persistent_save", wrapper)


def copy_checkpoints_atomically() -> None:
    """P3: checkpoint_last.pt and checkpoint_best.pt are copies; a kill half-way must leave the old ones."""

    def wrapper(copy: Callable) -> Callable:
        def copy_whole(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
            try:
                with _replacing(dst_path) as temporary:
                    shutil.copyfile(src_path, temporary)
            except OSError as error:
                if (why := _no_room(error)) is None:
                    raise
                raise SystemExit(f"error: {_explain(dst_path, os.path.getsize(src_path), why)}") from None
            return True

        return copy_whole

    wrap(PathManager, "copy", wrapper)


def let_no_bad_validation_be_best() -> None:
    """P20: after a validation whose loss is NaN fairseq takes the next one for the best, whatever the best was.

    Such a validation counts as none: min() of a number and NaN is NaN, and nothing compares with that.
    """

    def wrapper(save: Callable) -> Callable:
        def save_checkpoint(cfg: Any, trainer: Any, epoch_itr: Any, val_loss: float | None):
            if val_loss is not None and not math.isfinite(val_loss):
                metric = cfg.best_checkpoint_metric
                logger.warning(f"the validation's {metric} is {val_loss}: this is not taken for the best checkpoint")
                val_loss = None
            return save(cfg, trainer, epoch_itr, val_loss)

        return save_checkpoint

    wrap(checkpoint_utils, "save_checkpoint", wrapper)


@contextmanager
def _replacing(path: str) -> Iterator[str]:
    """Give a temporary name; what the body writes there is brought to the disk and takes the place of `path`."""
    temporary = path + TEMPORARY_ENDING
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    with suppress(OSError):  # the name; some network file systems cannot do it for a folder
        _sync(os.path.dirname(path) or ".")


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_room(error: BaseException | None) -> str | None:
    """What the system said where the disk, the quota or the largest allowed file is full, else None.

    torch.save raises an error of its own over that of the file.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return error.strerror
        error = error.__cause__ or error.__context__
    return None


def _explain(path: str, needed: int, why: str) -> str:
    free = shutil.disk_usage(os.path.dirname(path) or ".").free
    return (
        f"checkpoint '{path}' was not saved ({why}): it needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; "
        "the checkpoints before it are whole: make room, then the same command goes on from them"
    )


class _Counter:
    """A file that keeps nothing.

    Attributes:
        size: bytes written.
    """

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        pass


def _size(state: dict[str, Any]) -> int:
    counter = _Counter()
    torch.save(state, counter)
    return counter.size
