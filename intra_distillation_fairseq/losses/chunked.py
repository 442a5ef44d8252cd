"""The loss of K passes from their logits, over chunks of tokens with the gradient in closed form. Torch only.

Automatic differentiation of the definition keeps several tensors of the size of the logits alive, each in float32.
Here a chunk of tokens is worked on while it lies in the cache; forward keeps nothing, backward evaluates a chunk again
and writes its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from intra_distillation_fairseq.losses import closed_form
from intra_distillation_fairseq.losses.divergence import working_type
from intra_distillation_fairseq.losses.objective import ConsistencyLoss, Objective, weighted

# Bytes of one (K, chunk, V) block in float32. Three such blocks are in use at once: the logits, the probabilities and a
# product. CPU: 12 MiB, in the cache; of 1 to 16 MiB a block, 4 was the fastest on two cores. GPU: 192 MiB, small beside
# the logits and large enough to fill the device. With K = 3 and V = 12,001 a token takes 144 KB: 29 tokens per chunk on
# a CPU, 466 on a GPU.
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}


def chunk_tokens(num_passes: int, vocabulary: int, device: torch.device) -> int:
    """How many tokens to work on at a time."""
    block = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"])
    return max(1, block // (4 * num_passes * vocabulary))


def by_pass(given: Sequence[Tensor]) -> list[Tensor]:
    """K tensors (N, .), given as such or as one tensor (K, N, .)."""
    return list(given[0]) if given[0].dim() == 3 else list(given)


def chunks(logits: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """(rows, a copy of their logits as one (K, n, V) tensor in the working type), chunk by chunk."""
    tokens, vocabulary = logits[0].shape
    step = chunk_tokens(len(logits), vocabulary, logits[0].device)
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        block = logits[0].new_empty((len(logits), rows.stop - start, vocabulary), dtype=working_type(logits[0].dtype))
        for one_pass, z in zip(block, logits):
            one_pass.copy_(z[rows])
        yield rows, block


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, target, objective, overwrite_logits, *given):
        logits = by_pass(given)
        tokens, vocabulary = logits[0].shape
        sums = logits[0].new_empty((3, tokens), dtype=working_type(logits[0].dtype))
        for rows, block in chunks(logits):
            for one_sum, values in zip(sums, closed_form.evaluate_(block, target[rows], objective).tokens):
                one_sum[rows] = values
        ctx.save_for_backward(target, *given)
        ctx.settings = objective, overwrite_logits
        result = weighted(objective, vocabulary, *sums.sum(-1))
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        target, *given = ctx.saved_tensors
        objective, overwrite_logits = ctx.settings
        gradients = [z.detach() if overwrite_logits else torch.empty_like(z) for z in given]
        for rows, block in chunks(by_pass(given)):
            evaluated = closed_form.evaluate_(block, target[rows], objective)
            # The upstream gradient (fairseq's loss scale, say) multiplies the float32 values, before these are rounded
            # to the logits' type: scaled after it, float16 would have lost the small ones.
            gradient = closed_form.gradient_(evaluated, target[rows], objective, upstream)
            for whole, one_pass in zip(by_pass(gradients), gradient):
                whole[rows] = one_pass
        return (None, None, None, *gradients)


def chunked(
    logits: Sequence[Tensor] | Tensor, target: Tensor, objective: Objective, overwrite_logits: bool = False
) -> ConsistencyLoss:
    """K tensors of logits (N, V) or one (K, N, V); see backends.Backend.from_logits."""
    given = (logits,) if torch.is_tensor(logits) else logits
    return ConsistencyLoss(*_Chunked.apply(target, objective, overwrite_logits, *given))
