"""The loss of K passes under one signature, and which implementation of it is used.

Every back end is a function (logits, target, ignore_index, label_smoothing, divergence) -> ConsistencyLoss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.losses import chunked as chunked_loss
from intra_distillation_fairseq.losses.divergence import DIVERGENCES, log_probabilities

logger = logging.getLogger(__name__)


class ConsistencyLoss(NamedTuple):
    """Three sums over the real tokens of a batch, in nats, each a scalar tensor.

    Attributes:
        ls_sum: label-smoothed cross-entropy, mean over the K passes; carries gradient.
        nll_sum: negative log-likelihood of the target, mean over the K passes; for logging.
        divergence_sum: divergence between the K passes, not yet weighted by alpha'; carries gradient.
    """

    ls_sum: Tensor
    nll_sum: Tensor
    divergence_sum: Tensor


def reference(
    logits: Sequence[Tensor], target: Tensor, ignore_index: int, label_smoothing: float, divergence: str
) -> ConsistencyLoss:
    """The definition in plain PyTorch; every other back end is held against it.

    The smoothed target is fairseq's: 1 - eps on the reference token, eps / (V - 1) on every other type.

    Args:
        logits: K tensors (N, V) of any floating type, or one tensor (K, N, V).
        target: (N,) token ids.
        ignore_index: tokens with this id (padding) count nowhere and receive no gradient.
        label_smoothing: eps.
        divergence: a key of DIVERGENCES.
    """
    lprobs = [log_probabilities(z) for z in logits]
    k, vocabulary = len(lprobs), lprobs[0].size(-1)
    padding = target.eq(ignore_index)  # N
    index = target.unsqueeze(-1)  # N x 1
    eps_i = label_smoothing / (vocabulary - 1)

    def over_tokens(per_token: Tensor) -> Tensor:
        return per_token.masked_fill(padding, 0.0).sum()

    nll_sum = sum(over_tokens(-lp.gather(-1, index).squeeze(-1)) for lp in lprobs) / k
    smooth_sum = sum(over_tokens(-lp.sum(-1)) for lp in lprobs) / k
    return ConsistencyLoss(
        ls_sum=(1.0 - label_smoothing - eps_i) * nll_sum + eps_i * smooth_sum,
        nll_sum=nll_sum.detach(),
        divergence_sum=over_tokens(DIVERGENCES[divergence](lprobs)),
    )


def chunked(*args) -> ConsistencyLoss:
    """The same with a closed-form gradient over chunks of tokens, without full-size float32 copies (chunked.py)."""
    return ConsistencyLoss(*chunked_loss.chunked(*args))


BACKENDS: dict[str, Callable[..., ConsistencyLoss]] = {"reference": reference, "chunked": chunked}


def choose(name: str) -> Callable[..., ConsistencyLoss]:
    """The back end of that name; "auto" takes chunked, and the choice is logged.

    Raises:
        UserError: no such back end.
    """
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"--id-loss-backend is '{name}': allowed are auto, {', '.join(BACKENDS)}")
    chosen = "chunked" if name == "auto" else name
    logger.info("loss back end: %s%s", chosen, " (chosen automatically)" if name == "auto" else "")
    return BACKENDS[chosen]
