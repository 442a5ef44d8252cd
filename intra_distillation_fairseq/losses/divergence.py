"""How far the K output distributions of one token are apart: the readable definition.

Notation: K passes, N tokens, V types; l_i = log p_i are the log-probabilities of pass i, m = mean_i p_i.
Everything is computed from log-probabilities, which log_softmax gives finite for any finite logits; the logarithm of a
stored probability, as in the published code, is infinite from a logit gap of about 100 on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def working_type(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, otherwise float32: what losses are computed in, whatever the type of the logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_probabilities(logits: Tensor) -> Tensor:
    """log_softmax over the last dimension, in float32 or better whatever the type of the logits.

    Shape: (..., V) -> (..., V).
    """
    return torch.log_softmax(logits, dim=-1, dtype=working_type(logits.dtype))


def x_divergence(lprobs: Sequence[Tensor]) -> Tensor:
    """X-divergence per token (the paper's choice): X = 1/K sum_i [KL(p_i || m) + KL(m || p_i)].

    = 1/K sum_i sum_v (p_i - m) (log p_i - log m). Since sum_i (p_i - m) = 0 for every v, log m may be replaced by any
    quantity that does not depend on i; with mean_i log p_i no logarithm of m is needed and every v's term is a
    covariance, at least 0, so that nothing cancels. The gradient with respect to the logits of pass j is
    1/K [p_j * (d_j - <p_j, d_j>) + p_j - m] with d_j = l_j - mean_i l_i.

    Args:
        lprobs: K tensors of log-probabilities, each (N, V).

    Returns:
        (N,) in nats; 0 where all passes agree, up to rounding.
    """
    k = len(lprobs)
    probs = [lp.exp() for lp in lprobs]
    mean_prob = sum(probs) / k  # N x V
    mean_lprob = sum(lprobs) / k  # N x V
    return sum(((p - mean_prob) * (lp - mean_lprob)).sum(-1) for p, lp in zip(probs, lprobs)) / k


def js_divergence(lprobs: Sequence[Tensor]) -> Tensor:
    """Generalised Jensen-Shannon divergence per token: JS = 1/K sum_i KL(p_i || m) = H(m) - mean_i H(p_i).

    log m is taken as logsumexp_i l_i - ln K, never from m itself. At most ln K.

    Args:
        lprobs: K tensors of log-probabilities, each (N, V).

    Returns:
        (N,) in nats. Where the passes differ by less than about 1e-3 in their logits, float32 cancels in the value (not
        in its gradient); X does not.
    """
    k = len(lprobs)
    log_mean = lprobs[0]
    for lp in lprobs[1:]:
        log_mean = torch.logaddexp(log_mean, lp)
    log_mean = log_mean - math.log(k)  # N x V
    return sum((lp.exp() * (lp - log_mean)).sum(-1) for lp in lprobs) / k


# The names that --id-divergence takes.
DIVERGENCES: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {"x": x_divergence, "js": js_divergence}
