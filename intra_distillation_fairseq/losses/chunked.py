"""The loss of K passes over chunks of tokens with its gradient in closed form. Torch only, CPU and GPU.

Automatic differentiation of the definition keeps several tensors of the size of the logits alive, each in float32.
Here a chunk of tokens is worked on while it lies in the cache: forward keeps one number per row (its logsumexp),
backward computes the probabilities of a chunk again from it and writes the gradient.

Per token, with l_i = log p_i, m = mean_i p_i, d_j = l_j - mean_i l_i, e_j = l_j - log m, t the smoothed target and
<a, b> the sum over the vocabulary, the gradients with respect to the logits of pass j are
    cross-entropy   (p_j - t) / K
    X               [p_j * (d_j - <p_j, d_j>) + p_j - m] / K
    JS              p_j * (e_j - <p_j, e_j>) / K
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of one (K, chunk, V) block in float32. Six such blocks are in use at once. CPU: 12 MiB of cache. GPU: 384 MiB,
# small beside the logits and large enough to fill the device. With K = 3 and V = 12,001 a token takes 144 KB: 14 tokens
# per chunk on a CPU, 466 on a GPU.
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}


def chunk_tokens(num_passes: int, vocabulary: int, device: torch.device) -> int:
    """How many tokens to work on at a time."""
    block = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"])
    return max(1, block // (4 * num_passes * vocabulary))


def by_pass(given: tuple[Tensor, ...]) -> list[Tensor]:
    """K tensors (N, V), given as such or as one tensor (K, N, V)."""
    return list(given[0]) if given[0].dim() == 3 else list(given)


def chunks(logits: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits as one (K, n, V) tensor in float32 or float64), chunk by chunk."""
    tokens, vocabulary = logits[0].shape
    dtype = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    step = chunk_tokens(len(logits), vocabulary, logits[0].device)
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        block = logits[0].new_empty((len(logits), rows.stop - start, vocabulary), dtype=dtype)
        for one_pass, z in zip(block, logits):
            one_pass.copy_(z[rows])
        yield rows, block


def log_mean_of(lprobs: Tensor) -> Tensor:
    """log of the mean over the passes, (K, n, V) -> (n, V), without the logarithm of a probability."""
    return torch.logsumexp(lprobs, 0) - math.log(lprobs.size(0))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, target, ignore_index, label_smoothing, divergence, *given):
        logits = by_pass(given)
        k, (tokens, vocabulary) = len(logits), logits[0].shape
        dtype = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
        padding = target.eq(ignore_index)  # N
        # What backward needs of each row: K x N numbers beside the logits themselves.
        log_normaliser = logits[0].new_empty((k, tokens), dtype=dtype)
        nll, smooth, divergences = (logits[0].new_empty(tokens, dtype=dtype) for _ in range(3))
        for rows, block in chunks(logits):
            log_normaliser[:, rows] = torch.logsumexp(block, -1)
            lprobs = block.sub_(log_normaliser[:, rows, None])  # K x n x V
            index = target[rows].expand(k, -1).unsqueeze(-1)  # K x n x 1
            nll[rows] = -lprobs.gather(-1, index).sum((0, -1)) / k
            smooth[rows] = -lprobs.sum((0, -1)) / k
            probs = lprobs.exp()
            if divergence == "x":
                probs.sub_(probs.mean(0))
                lprobs.sub_(lprobs.mean(0))
            else:
                lprobs.sub_(log_mean_of(lprobs))
            divergences[rows] = probs.mul_(lprobs).sum((0, -1)) / k
        ctx.save_for_backward(target, padding, log_normaliser, *given)
        ctx.settings = label_smoothing, divergence
        eps_i = label_smoothing / (vocabulary - 1)
        nll_sum, smooth_sum, divergence_sum = (
            per_token.masked_fill_(padding, 0.0).sum() for per_token in (nll, smooth, divergences)
        )
        ctx.mark_non_differentiable(nll_sum)
        return (1.0 - label_smoothing - eps_i) * nll_sum + eps_i * smooth_sum, nll_sum, divergence_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, ls_gradient, _nll_gradient, divergence_gradient):
        target, padding, log_normaliser, *given = ctx.saved_tensors
        logits = by_pass(given)
        label_smoothing, divergence = ctx.settings
        k, vocabulary = len(logits), logits[0].size(-1)
        eps_i = label_smoothing / (vocabulary - 1)
        # The weights of the two terms. They multiply the float32 values, before these are rounded to the logits' type:
        # a gradient rounded to float16 first and scaled afterwards would be 0 where the loss scale had saved it.
        ls_weight, divergence_weight = ls_gradient / k, divergence_gradient / k
        given_gradients = [torch.empty_like(z) for z in given]
        gradients = by_pass(given_gradients)
        for rows, block in chunks(logits):
            lprobs = block.sub_(log_normaliser[:, rows, None])  # K x n x V
            probs = lprobs.exp()
            if divergence == "x":
                gradient = lprobs.sub_(lprobs.mean(0))
                gradient.sub_((probs * gradient).sum(-1, keepdim=True)).mul_(probs)
                gradient.add_(probs).sub_(probs.mean(0))
            else:
                gradient = lprobs.sub_(log_mean_of(lprobs))
                gradient.sub_((probs * gradient).sum(-1, keepdim=True)).mul_(probs)
            gradient.mul_(divergence_weight).add_(probs.sub_(eps_i).mul_(ls_weight))
            index = target[rows].expand(k, -1).unsqueeze(-1)  # K x n x 1
            on_target = (-(1.0 - label_smoothing - eps_i) * ls_weight).to(gradient.dtype).expand(index.shape)
            gradient.scatter_add_(-1, index, on_target)
            gradient.masked_fill_(padding[rows, None], 0.0)
            for whole, one_pass in zip(gradients, gradient):
                whole[rows] = one_pass
        return (None, None, None, None, *given_gradients)


def chunked(
    logits: Sequence[Tensor], target: Tensor, ignore_index: int, label_smoothing: float, divergence: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(ls_sum, nll_sum, divergence_sum) of K tensors of logits (N, V) or one (K, N, V); see backends.reference."""
    given = (logits,) if torch.is_tensor(logits) else logits
    return _ChunkedLoss.apply(target, ignore_index, label_smoothing, divergence, *given)
