"""Training in several processes."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model

from intra_distillation_fairseq.compat.wrapping import wrap


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

    wrap(distributed_utils, "call_main", wrapper)
