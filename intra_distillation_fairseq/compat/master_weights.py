"""A training in 16 bits goes on with the float32 weights, and the count of the loss scale, that it had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fairseq.optim.fp16_optimizer import (
    FP16Optimizer,
    _FP16OptimizerMixin,
    _MemoryEfficientFP16OptimizerMixin,
)
from fairseq.trainer import Trainer

from intra_distillation_fairseq.compat.wrapping import wrap

# Of fairseq's DynamicLossScaler: what decides when the scale grows next, and whether an overflow lowers it.
SCALER_COUNTS = ("_iter", "_last_overflow_iter", "_last_rescale_iter", "_overflows_since_rescale")


def keep_master_weights() -> None:
    """P19: --fp16 and --bf16 train float32 weights, and only what they round to in 16 bits is in a checkpoint.

    fairseq writes 16 bits as float32 numbers anyway. Here these are the float32 weights themselves: the file is as
    large, and whoever reads it in 16 bits has the same model as before. Without float32 weights apart from the model
    (float32, --amp, --memory-efficient-fp16 and -bf16, fully_sharded), and with --reset-optimizer, nothing changes.
    """

    def saving(state_dict: Callable) -> Callable:
        def state_dict_with_masters(self: Trainer) -> dict[str, Any]:
            state = state_dict(self)
            for part, module in (("model", self.model), ("criterion", self.criterion)):
                for name, parameter, master in _named_masters(module, self.optimizer):
                    if _rounds_to(master, parameter):
                        state[part][name] = master
            return state

        return state_dict_with_masters

    def loading(load_checkpoint: Callable) -> Callable:
        def load_checkpoint_with_masters(
            self: Trainer, filename: str, reset_optimizer: bool = False, *args: Any, **kwargs: Any
        ) -> dict[str, Any] | None:
            if reset_optimizer or not (self.cfg.common.fp16 or self.cfg.common.bf16):
                return load_checkpoint(self, filename, reset_optimizer, *args, **kwargs)
            model, criterion = self.get_model(), self.get_criterion()
            with _noting_what_is_loaded(model) as of_model, _noting_what_is_loaded(criterion) as of_criterion:
                extra_state = load_checkpoint(self, filename, reset_optimizer, *args, **kwargs)
                for module, loaded in ((model, of_model), (criterion, of_criterion)):
                    for name, parameter, master in _named_masters(module, self.optimizer) if loaded else ():
                        if name in loaded and _rounds_to(loaded[name], parameter):
                            master.copy_(loaded[name])
            return extra_state

        return load_checkpoint_with_masters

    wrap(Trainer, "state_dict", saving)
    wrap(Trainer, "load_checkpoint", loading)


def keep_count_of_loss_scale() -> None:
    """P19: a checkpoint of float16 has the loss scale, but not since when: after a resume it grows at other updates.

    fairseq without the plugin leaves unknown entries of an optimizer's state alone.
    """

    def saving(state_dict: Callable) -> Callable:
        def state_dict_with_counts(self: Any) -> dict[str, Any]:
            state = state_dict(self)
            if self.scaler is not None:
                state["loss_scale_counts"] = {name: getattr(self.scaler, name) for name in SCALER_COUNTS}
            return state

        return state_dict_with_counts

    def loading(load_state_dict: Callable) -> Callable:
        def load_state_dict_with_counts(self: Any, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            load_state_dict(self, state_dict, *args, **kwargs)
            if self.scaler is not None and "loss_scale_counts" in state_dict:
                for name in SCALER_COUNTS:
                    setattr(self.scaler, name, state_dict["loss_scale_counts"][name])

        return load_state_dict_with_counts

    for optimizer in (_FP16OptimizerMixin, _MemoryEfficientFP16OptimizerMixin):
        wrap(optimizer, "state_dict", saving)
        wrap(optimizer, "load_state_dict", loading)


def _named_masters(module: torch.nn.Module, optimizer: Any) -> Iterator[tuple[str, torch.nn.Parameter, torch.Tensor]]:
    """Name in the module's state_dict, parameter and master of each that has one; all names of a shared parameter."""
    masters = _masters(optimizer)
    for name, value in module.state_dict(keep_vars=True).items() if masters else ():
        if id(value) in masters:
            yield name, value, masters[id(value)]


def _masters(optimizer: Any) -> dict[int, torch.Tensor]:
    """The float32 weights that are trained, each in the shape and under the id of its 16-bit parameter."""
    if not isinstance(optimizer, FP16Optimizer):
        return {}
    if not optimizer.has_flat_params:
        return {id(p): p32.detach() for p, p32 in zip(optimizer.fp16_params, optimizer.fp32_params)}
    masters = {}
    for device, flat in optimizer.fp32_params.items():  # one after the other, as fairseq's own synchronisation has them
        here = [p for p in optimizer.fp16_params if p.device.index == device]
        pieces = flat.detach().split([p.numel() for p in here])
        masters.update({id(p): piece.view_as(p) for p, piece in zip(here, pieces)})
    return masters


def _rounds_to(value: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether the parameter is what it should be, as after each step. Frozen, or changed by hand, it is not."""
    return torch.equal(value.to(parameter.device).to(parameter.dtype), parameter)


@contextmanager
def _noting_what_is_loaded(module: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The values that the module's load_state_dict gets in the body, under the module's own names; {} without one."""
    loaded: dict[str, torch.Tensor] = {}

    def note(loading: torch.nn.Module, state_dict: dict[str, torch.Tensor], *rest: Any) -> None:
        if loading is module:  # --store-ema copies the module, with its hooks, in the body
            loaded.update(state_dict)

    hook = module.register_load_state_dict_pre_hook(note)
    try:
        yield loaded
    finally:
        hook.remove()
        loaded.clear()
