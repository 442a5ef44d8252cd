"""Checkpoint files: what may be read, how a refusal is worded, how copies are made."""

from __future__ import annotations

import argparse
import collections
import typing
from collections.abc import Callable
from pathlib import Path

import omegaconf
import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager

from intra_distillation_fairseq import checkpoints
from intra_distillation_fairseq.compat import numpy_values
from intra_distillation_fairseq.compat.wrapping import wrap
from intra_distillation_fairseq.errors import UserError


def checkpoint_types() -> list:
    """The types that fairseq's own checkpoints hold beside tensors and plain Python values, or their safe stand-ins.

    None of them can run code of the file's choosing when it is built.
    """
    # numpy 1 and 2 write the same two functions under different names; a file may come from either.
    numpy_stand_ins = [
        (numpy_values.Array, "numpy.ndarray"),
        (numpy_values.DType, "numpy.dtype"),
        *(
            (stand_in, f"numpy.{core}.multiarray.{name}")
            for core in ("core", "_core")
            for name, stand_in in (("_reconstruct", numpy_values.reconstruct), ("scalar", numpy_values.scalar))
        ),
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
        *numpy_stand_ins,
        *configuration_types,
        *([placeholder] if placeholder is not None else []),
    ]


def allow_fairseq_checkpoints() -> None:
    """P4, P5: let torch's safe loader read fairseq's checkpoints, and nothing beyond them."""
    torch.serialization.add_safe_globals(checkpoint_types())


def refuse_strangers_checkpoints() -> None:
    """P3, P4: fairseq loads a file only after the checks of `checkpoints.load`, which say in one line what is wrong."""

    def wrapper(load: Callable) -> Callable:
        def load_checkpoint_to_cpu(path, *args, **kwargs):
            state = checkpoints.load(Path(PathManager.get_local_path(path)))
            if not state.get("optimizer_history") and "best_loss" not in state:
                raise UserError(f"'{path}' is not a fairseq checkpoint: it has no history ('optimizer_history')")
            try:
                return load(path, *args, **kwargs)
            except Exception as error:
                refused = checkpoints.refusal(error, path)
                if refused is None and isinstance(error, (OSError, RuntimeError, MemoryError)):  # of the machine
                    raise
                raise refused or checkpoints.unreadable(error, path) from error

        return load_checkpoint_to_cpu

    wrap(checkpoint_utils, "load_checkpoint_to_cpu", wrapper)
