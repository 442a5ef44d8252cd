"""Adds the load-balancing loss of a switch transformer to the training loss of any criterion."""

from __future__ import annotations

from typing import Any

from fairseq.logging import metrics
from torch import Tensor, nn

from intra_distillation_fairseq.models.switch_layer import SwitchFeedForward, recording, switch_layers


def mean_over_passes(layers: list[SwitchFeedForward]) -> Tensor | int:
    """Sum over layers of the mean of each one's recorded balance losses; 0 where no layer ran."""
    return sum(sum(r.balance_loss for r in layer.records) / len(layer.records) for layer in layers if layer.records)


class WithRouterLoss:
    """Called as the criterion is; what it returns is the criterion's loss + sample_size * balance loss.

    Times sample_size, because fairseq divides the gradient by it. However often the criterion runs the model, the
    balance loss is the mean over these passes.
    """

    def __init__(self, criterion: nn.Module, layers: list[SwitchFeedForward]):
        self.criterion = criterion
        self.layers = layers

    def __call__(self, model: nn.Module, sample: dict[str, Any]):
        with recording(self.layers):
            loss, sample_size, logging_output = self.criterion(model, sample)
            balance_sum = sample_size * mean_over_passes(self.layers)
            records = [record for layer in self.layers for record in layer.records]
        loss = loss + balance_sum
        return loss, sample_size, {
            **logging_output,
            "loss": logging_output["loss"] + _data(balance_sum),
            "balance_loss": _data(balance_sum),
            "routed_tokens": sum(record.tokens for record in records),
            "dropped_tokens": sum(record.dropped for record in records),
        }  # fmt: skip


def _data(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value


class RouterLossMixin:
    """Put before any fairseq task class to train models with experts (`models/switch_transformer.py`) under it.

    Other models, validation and generation are left alone.
    """

    adds_router_loss = True

    def train_step(self, sample, model, criterion, *args, **kwargs):
        layers = switch_layers(model)
        if layers:
            criterion = WithRouterLoss(criterion, layers)
        return super().train_step(sample, model, criterion, *args, **kwargs)

    def reduce_metrics(self, logging_outputs, criterion) -> None:
        """Beside the criterion's: the balance loss as added per token (not base 2), the fraction of dropped tokens."""
        super().reduce_metrics(logging_outputs, criterion)
        if not any("balance_loss" in log for log in logging_outputs):
            return  # validation, or a model without experts
        total = {
            name: sum(log[name] for log in logging_outputs)
            for name in ("balance_loss", "sample_size", "dropped_tokens", "routed_tokens")
        }
        sample_size, routed = total["sample_size"], total["routed_tokens"]
        metrics.log_scalar("balance_loss", total["balance_loss"] / sample_size, sample_size, round=5)
        metrics.log_scalar("dropped", total["dropped_tokens"] / routed, routed, round=5)
