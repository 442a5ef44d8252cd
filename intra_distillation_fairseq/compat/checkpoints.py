"""Checkpoint files: what may be read, how a refusal is worded, how copies are made."""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import typing
from collections.abc import Callable

import numpy as np
import omegaconf
import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager

from intra_distillation_fairseq import checkpoints
from intra_distillation_fairseq.compat.wrapping import wrap


def checkpoint_types() -> list:
    """The types that fairseq's own checkpoints hold beside tensors and plain Python values.

    None of them can run code of the file's choosing when it is built.
    """
    multiarray = (getattr(np, "_core", None) or np.core).multiarray
    numpy_types = [np.ndarray, np.dtype, *(type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8"))]
    # numpy 1 and 2 write the same two functions under different names; a file may come from either.
    numpy_functions = [
        (getattr(multiarray, name), f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ]
    # The configuration as fairseq hands it to other processes, and as fairseq 1.0.0a wrote it to files.
    configuration_types = [
        omegaconf.DictConfig,
        omegaconf.ListConfig,
        omegaconf.nodes.AnyNode,
        omegaconf.base.ContainerMetadata,
        omegaconf.base.Metadata,
        typing.Any,
        dict,
        list,
        int,
        collections.defaultdict,
    ]
    placeholder = getattr(distributed_utils, "_TensorPlaceholder", None)
    return [
        argparse.Namespace,
        *numpy_types,
        *numpy_functions,
        *configuration_types,
        *([placeholder] if placeholder is not None else []),
    ]


def allow_fairseq_checkpoints() -> None:
    """P4, P5: let torch's safe loader read fairseq's checkpoints, and nothing beyond them."""
    torch.serialization.add_safe_globals(checkpoint_types())


def explain_refused_checkpoints() -> None:
    """P3, P4: say in one line why a checkpoint is not loaded, instead of the advice to switch the safe loader off."""

    def wrapper(load: Callable) -> Callable:
        def load_checkpoint_to_cpu(path, *args, **kwargs):
            try:
                return load(path, *args, **kwargs)
            except Exception as error:
                refused = checkpoints.refusal(error, path)
                if refused is None:
                    raise
                raise refused from error

        return load_checkpoint_to_cpu

    wrap(checkpoint_utils, "load_checkpoint_to_cpu", wrapper)


def copy_checkpoints_atomically() -> None:
    """P3: checkpoint_last.pt and checkpoint_best.pt are copies; a kill half-way must leave the old ones."""

    def wrapper(copy: Callable) -> Callable:
        def copy_then_rename(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
            temporary = f"{dst_path}.tmp"
            shutil.copyfile(src_path, temporary)
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, dst_path)
            return True

        return copy_then_rename

    wrap(PathManager, "copy", wrapper)
