"""What every back end computes: the objective and the four numbers that come back."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Objective(NamedTuple):
    """Label-smoothed cross-entropy + divergence_weight * divergence, over the tokens that are not padding.

    The smoothed target is fairseq's: 1 - eps on the reference token, eps / (V - 1) on every other type.

    Attributes:
        divergence: a key of DIVERGENCES.
        divergence_weight: alpha' of this update, at least 0.
        label_smoothing: eps.
        ignore_index: target tokens with this id (padding) count nowhere and receive no gradient.
    """

    divergence: str
    divergence_weight: float
    label_smoothing: float
    ignore_index: int

    def smoothing_per_type(self, vocabulary: int) -> float:
        """eps / (V - 1): what the smoothed target puts on every type but the reference token."""
        return self.label_smoothing / (vocabulary - 1)


class ConsistencyLoss(NamedTuple):
    """Sums over the real tokens of a batch, in nats, each a scalar tensor; only `loss` carries gradient.

    Attributes:
        loss: ls_sum + divergence_weight * divergence_sum.
        ls_sum: label-smoothed cross-entropy, mean over the K passes.
        nll_sum: negative log-likelihood of the target, mean over the K passes.
        divergence_sum: divergence between the K passes, not yet weighted.
    """

    loss: Tensor
    ls_sum: Tensor
    nll_sum: Tensor
    divergence_sum: Tensor


def weighted(
    objective: Objective, vocabulary: int, nll_sum: Tensor, smooth_sum: Tensor, divergence_sum: Tensor
) -> ConsistencyLoss:
    """The loss from its three sums; smooth_sum is that of -log p over all types, mean over the passes."""
    eps_i = objective.smoothing_per_type(vocabulary)
    ls_sum = (1.0 - objective.label_smoothing - eps_i) * nll_sum + eps_i * smooth_sum
    loss = ls_sum + objective.divergence_weight * divergence_sum
    return ConsistencyLoss(loss, ls_sum.detach(), nll_sum.detach(), divergence_sum.detach())
