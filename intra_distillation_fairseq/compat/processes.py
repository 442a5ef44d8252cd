"""Training in several processes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model

from intra_distillation_fairseq.compat.wrapping import wrap
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments import rendezvous


def let_ddp_run_on_cpu() -> None:
    """--ddp-backend c10d names a GPU even where there is none, which torch's DistributedDataParallel refuses."""

    class DistributedDataParallel(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module, device_ids=None, output_device=None, **kwargs):
            if all(parameter.device.type == "cpu" for parameter in module.parameters()):
                device_ids = output_device = None
            super().__init__(module, device_ids=device_ids, output_device=output_device, **kwargs)

    distributed_fairseq_model.DistributedDataParallel = DistributedDataParallel


def refuse_launches_that_do_not_train() -> None:
    """P9: launches that end with exit code 0 without training, train several times into one folder, or hang."""

    def wrapper(call_main: Callable) -> Callable:
        def call_main_checked(cfg, main, **kwargs):
            if not cfg.common.tpu:
                try:
                    reason = _why_not(cfg)
                except UserError as error:
                    reason = str(error)
                if reason:
                    raise SystemExit(f"error: {reason}")
            return call_main(cfg, main, **kwargs)

        return call_main_checked

    wrap(distributed_utils, "call_main", wrapper)


def _why_not(cfg: FairseqConfig) -> str | None:
    distributed = cfg.distributed_training
    gpus = 0 if cfg.common.cpu else torch.cuda.device_count()
    told = rendezvous.Told(
        distributed.distributed_world_size,
        distributed.distributed_rank,
        distributed.distributed_init_method,
        distributed.distributed_no_spawn,
        distributed.distributed_backend,
    )
    return rendezvous.why_not(told, rendezvous.launched(os.environ), gpus, os.environ) or _why_not_sharded(cfg, gpus)


def _why_not_sharded(cfg: FairseqConfig, gpus: int) -> str | None:
    """--ddp-backend fully_sharded is fairscale's: GPUs only; a layer's parameters are whole only in its own forward."""
    if cfg.distributed_training.ddp_backend != "fully_sharded":
        return None
    sharded, instead = "--ddp-backend is 'fully_sharded'", "use --ddp-backend legacy_ddp or pytorch_ddp"
    if gpus == 0:
        return f"{sharded}, which needs a GPU: {instead}"
    if importlib.util.find_spec("fairscale") is None:
        return f"{sharded}, which needs fairscale: install it (pip install fairscale), or {instead}"
    if str(getattr(cfg.criterion, "id_pass_mode", "")) == "recompute":
        return (
            f"{sharded} and --id-pass-mode 'recompute', which runs the model in backward, where its parameters are not "
            "whole: use stacked with --checkpoint-activations, which recomputes layer by layer"
        )
    if str(getattr(cfg.model, "arch", "")).startswith("switch_"):
        return f"{sharded}, under which the routers of experts cannot be trained by their own loss: {instead}"
    if max(getattr(cfg.model, f"{side}_layerdrop", 0) or 0 for side in ("encoder", "decoder")) > 0:
        return f"{sharded} with LayerDrop, where the processes would wait for layers that others leave out: {instead}"
    return None
