"""Loss and gradient of a block of tokens in closed form, in memory that fits the cache. Torch only, CPU and GPU.

Per token, with p_i the output distribution of pass i, m = mean_i p_i, t the smoothed target, w = alpha' and <a, b> the
sum over the vocabulary, the gradient with respect to the logits of pass j is
    cross-entropy   (p_j - t) / K
    X               [p_j * (d_j - <p_j, d_j>) + p_j - m] / K       d_j = z_j - mean_i z_i
    JS              p_j * (e_j - <p_j, e_j>) / K                   e_j = log p_j - log m
d_j is usually written with log-probabilities for the logits z. Their normalisers are one number per row, and a number
added to a row of d_j cancels in d_j - <p_j, d_j>. The values are X = mean_j <p_j, d_j>, since sum_j d_j = 0, in which
the numbers added cancel too, and JS = mean_j <p_j, e_j>.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from intra_distillation_fairseq.losses.objective import Objective

# The divergences that this file and triton_kernels.py know; any other one is computed by its definition alone.
CLOSED_FORMS = ("x", "js")


class TokenLosses(NamedTuple):
    """Per token, 0 at padding, each (n,) in float32 or float64.

    Attributes:
        nll: negative log-likelihood of the target, mean over the passes.
        smooth: -log p summed over the types, mean over the passes.
        divergence: the divergence between the passes.
    """

    nll: Tensor
    smooth: Tensor
    divergence: Tensor


class Block(NamedTuple):
    """What loss and gradient of (K, n, V) logits have in common.

    Attributes:
        probs: p, (K, n, V).
        deviation: d for X, e for JS, (K, n, V).
        inner: <p_j, deviation_j>, (K, n, 1).
        tokens: the losses.
    """

    probs: Tensor
    deviation: Tensor
    inner: Tensor
    tokens: TokenLosses


def evaluate_(logits: Tensor, target: Tensor, objective: Objective) -> Block:
    """Evaluates a block of logits (K, n, V) in float32 or float64 and takes their memory for `deviation`."""
    k, _, vocabulary = logits.shape
    largest = logits.amax(-1, keepdim=True)  # K x n x 1
    shifted = logits - largest  # of exp's argument none is above 0
    index = target.expand(k, -1).unsqueeze(-1)  # K x n x 1
    on_target = shifted.gather(-1, index)
    total = shifted.sum(-1, keepdim=True)
    probs = shifted.exp_()
    normaliser = probs.sum(-1, keepdim=True)
    log_normaliser = normaliser.log()
    probs.div_(normaliser)
    nll = log_normaliser - on_target
    smooth = vocabulary * log_normaliser - total
    if objective.divergence == "x":
        # Nothing is lost where the passes nearly agree: the difference of two numbers close to each other is exact, and
        # a constant by which a pass differs from the others, which no divergence sees, is taken off before the mean.
        differences = logits.sub_(logits[0].clone())
        differences.sub_(differences.gather(-1, index))
        deviation = differences.sub_(differences.mean(0))
    else:
        lprobs = logits.sub_(largest).sub_(log_normaliser)
        deviation = lprobs.sub_(torch.logsumexp(lprobs, 0) - math.log(k))  # log m without the log of a probability
    inner = (probs * deviation).sum(-1, keepdim=True)  # K x n x 1
    padding = target.eq(objective.ignore_index)
    per_token = (value.mean(0).squeeze(-1).masked_fill_(padding, 0.0) for value in (nll, smooth, inner))  # n each
    return Block(probs, deviation, inner, TokenLosses(*per_token))


def gradient_(block: Block, target: Tensor, objective: Objective, scale: Tensor | float) -> Tensor:
    """scale times the gradient of the loss, summed over the tokens, with respect to the block's logits.

    Takes the memory of `block.deviation`. scale multiplies before anything is rounded to another type.

    Shape: (K, n, V).
    """
    probs, deviation, inner, _ = block
    k, _, vocabulary = probs.shape
    eps_i = objective.smoothing_per_type(vocabulary)
    weight = objective.divergence_weight
    # X:  p_j * (w d_j - w <p_j, d_j> + w + 1) - w m - eps_i          all over K
    # JS: p_j * (w e_j - w <p_j, e_j>     + 1)       - eps_i
    common = torch.full_like(probs[0], eps_i)
    offset = 1.0 - weight * inner
    if objective.divergence == "x":
        offset += weight
        common.add_(probs.mean(0), alpha=weight)
    gradient = deviation.mul_(weight).add_(offset).mul_(probs).sub_(common)
    index = target.expand(k, -1).unsqueeze(-1)  # K x n x 1
    on_target = gradient.new_full((1, 1, 1), eps_i + objective.label_smoothing - 1.0).expand(index.shape)
    gradient.scatter_add_(-1, index, on_target)
    return gradient.mul_(scale / k).masked_fill_(target.eq(objective.ignore_index)[:, None], 0.0)
