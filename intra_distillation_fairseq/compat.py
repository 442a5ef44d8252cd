"""What fairseq needs on today's Python and PyTorch, in one place.

Each function is one mend for which fairseq has no extension point. P1, P3, ... are the entries of docs/fairseq.md,
which says for all eleven what goes wrong and where it is mended; each has a test that fails without it.
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import shutil
import sys
import typing
from collections.abc import Callable

import numpy as np
import omegaconf
import torch
from fairseq import checkpoint_utils, options
from fairseq.data import data_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.models import distributed_fairseq_model

from intra_distillation_fairseq import checkpoints


def install() -> None:
    """Put every mend in place, once."""
    allow_fairseq_checkpoints()
    explain_refused_checkpoints()
    keep_last_batch()
    copy_checkpoints_atomically()
    let_bf16_mean_bf16()
    let_ddp_run_on_cpu()
    refuse_launches_that_do_not_train()


def _wrap(owner: object, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace owner.name by wrapper(owner.name), once however often it is asked for."""
    original = getattr(owner, name)
    if getattr(original, "mended_by", None) == __name__:
        return
    replacement = functools.wraps(original)(wrapper(original))
    replacement.mended_by = __name__
    setattr(owner, name, staticmethod(replacement) if isinstance(owner, type) else replacement)


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

    _wrap(checkpoint_utils, "load_checkpoint_to_cpu", wrapper)


def keep_last_batch() -> None:
    """P1: fairseq-fixed drops the end of a set whose size is no multiple of --required-batch-size-multiple."""

    def wrapper(batch_by_size: Callable) -> Callable:
        def batch_by_size_keeping_all(indices, *args, **kwargs):
            if not isinstance(indices, np.ndarray):
                indices = np.fromiter(indices, dtype=np.int64)
            if len(indices) == 0:
                return []
            batches = batch_by_size(indices, *args, **kwargs)
            kept = sum(len(batch) for batch in batches)
            return [*batches, indices[kept:]] if kept < len(indices) else batches

        return batch_by_size_keeping_all

    _wrap(data_utils, "batch_by_size", wrapper)


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

    _wrap(PathManager, "copy", wrapper)


def let_bf16_mean_bf16() -> None:
    """P7: fairseq-train takes --bf16 for "this is a TPU" and crashes for want of one."""

    def wrapper(parse: Callable) -> Callable:
        def parse_args_and_arch(parser, input_args=None, *args, **kwargs):
            parsed = parse(parser, input_args, *args, **kwargs)
            namespace = parsed[0] if isinstance(parsed, tuple) else parsed
            namespace.tpu = "--tpu" in (sys.argv if input_args is None else input_args)
            return parsed

        return parse_args_and_arch

    _wrap(options, "parse_args_and_arch", wrapper)


def let_ddp_run_on_cpu() -> None:
    """--ddp-backend c10d names a GPU even where there is none, which torch's DistributedDataParallel refuses."""

    class DistributedDataParallel(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module, device_ids=None, output_device=None, **kwargs):
            if all(parameter.device.type == "cpu" for parameter in module.parameters()):
                device_ids = output_device = None
            super().__init__(module, device_ids=device_ids, output_device=output_device, **kwargs)

    distributed_fairseq_model.DistributedDataParallel = DistributedDataParallel


def refuse_launches_that_do_not_train() -> None:
    """P9: two launches end with exit code 0 without training, or train several times into one folder."""

    def wrapper(call_main: Callable) -> Callable:
        def call_main_checked(cfg, main, **kwargs):
            distributed = cfg.distributed_training
            launched = int(os.environ.get("WORLD_SIZE", "1"))
            if launched > 1 and distributed.distributed_world_size == 1:
                raise SystemExit(
                    f"error: a launcher started {launched} processes (WORLD_SIZE), but --distributed-world-size is 1: "
                    "each would train alone into the same folder; give --distributed-world-size $WORLD_SIZE "
                    "--distributed-rank $RANK --distributed-init-method env:// --distributed-no-spawn"
                )
            if (
                distributed.distributed_init_method is not None
                and not distributed.distributed_no_spawn
                and torch.cuda.device_count() == 0
            ):
                raise SystemExit(
                    "error: --distributed-init-method is given on a machine without a GPU, where fairseq would start "
                    "no process and train nothing; start each process yourself with --distributed-rank, "
                    "--distributed-no-spawn and --distributed-backend gloo"
                )
            return call_main(cfg, main, **kwargs)

        return call_main_checked

    _wrap(distributed_utils, "call_main", wrapper)
