"""The loss of K passes from the decoder's features and its output projection: the logits never exist as a whole.

A chunk of tokens is projected, its loss and the gradient of its logits are computed in place, and the gradient is at
once multiplied into those of the features and of the projection. Forward does all of it, so that no chunk is projected
twice; it keeps the gradients of features (K, N, H), weight (V, H) and bias (V,), which backward scales by the upstream
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from intra_distillation_fairseq.losses import closed_form
from intra_distillation_fairseq.losses.chunked import by_pass, chunk_tokens
from intra_distillation_fairseq.losses.closed_form import TokenLosses
from intra_distillation_fairseq.losses.divergence import working_type
from intra_distillation_fairseq.losses.objective import ConsistencyLoss, Objective, weighted

# (logits (K, n, V), target (n,), objective, scale) -> losses; the logits become scale times their gradient.
LossAndGradient = Callable[[Tensor, Tensor, Objective, float], TokenLosses]

# Bytes of the logits of one chunk. A matrix product wants many rows: each chunk reads the projection (V x H) twice and
# the projection's gradient once. With K = 3, V = 12,001 in float32: 233 tokens, 699 rows, on a CPU, where the closed
# form then takes them in smaller blocks that fit the cache; 932 tokens on a GPU.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}

# By what the gradient of float16 logits is multiplied before it is rounded: values below 6e-8 would be lost otherwise.
# None reaches 65504 / 256 = 256 while alpha' times the gap between two passes' logits stays below some 1,000.
FLOAT16_SCALE = 256.0


def loss_and_gradient_(logits: Tensor, target: Tensor, objective: Objective, scale: float) -> TokenLosses:
    """The closed form, in blocks that fit the cache; the logits become scale times their gradient."""
    tokens = logits.size(1)
    step = chunk_tokens(logits.size(0), logits.size(-1), logits.device)
    losses = []
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        block = logits[:, rows].to(working_type(logits.dtype), copy=True)
        evaluated = closed_form.evaluate_(block, target[rows], objective)
        losses.append(evaluated.tokens)
        logits[:, rows] = closed_form.gradient_(evaluated, target[rows], objective, scale)
    return TokenLosses(*(torch.cat(values) for values in zip(*losses)))


def token_chunks(target: Tensor, ignore_index: int, size: int) -> Iterator[Tensor | slice]:
    """Which tokens to work on at a time. A CPU leaves padding out; a GPU would have to wait to learn where it is."""
    if target.device.type == "cpu":
        real = target.ne(ignore_index).nonzero().squeeze(-1)
        yield from (real[start : start + size] for start in range(0, real.numel(), size))
    else:
        yield from (slice(start, start + size) for start in range(0, target.size(0), size))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the working type, not rounded to the 16 bits of its operands: float16 would overflow."""
    working = working_type(a.dtype)
    if a.dtype == working:
        return a @ b
    # Tensor cores add up in float32 anyway and hand it over from torch 2.8 on.
    if a.device.type == "cuda" and "dtype" in torch.ops.aten.mm.overloads():
        return torch.ops.aten.mm.dtype(a, b, working)
    return a.to(working) @ b.to(working)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, target, objective, loss_and_gradient, weight, bias, *given):
        features = by_pass(given)
        k, (tokens, _), (vocabulary, width) = len(features), features[0].shape, weight.shape
        working = working_type(weight.dtype)
        scale = FLOAT16_SCALE if weight.dtype == torch.float16 else 1.0
        sums = weight.new_zeros(3, dtype=working)
        feature_gradients = [torch.zeros_like(f, dtype=working) for f in given]
        weight_gradient = torch.zeros_like(weight, dtype=working)
        bias_gradient = None if bias is None else torch.zeros_like(bias, dtype=working)
        chunk_bytes = CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cuda"])
        size = max(1, min(tokens, chunk_bytes // (k * vocabulary * weight.element_size())))
        memory = weight.new_empty((k * size, vocabulary))  # of the logits, then of their gradient
        for rows in token_chunks(target, objective.ignore_index, size):
            x = torch.stack([f[rows] for f in features]).view(-1, width)  # K*n x H
            logits = memory[: x.size(0)]  # K*n x V
            if bias is None:
                torch.mm(x, weight.t(), out=logits)
            else:
                torch.addmm(bias, x, weight.t(), out=logits)  # rounded once
            losses = loss_and_gradient(logits.view(k, -1, vocabulary), target[rows], objective, scale)
            sums += torch.stack([values.sum() for values in losses])
            gradient = logits  # what loss_and_gradient has made of them
            for whole, one_pass in zip(by_pass(feature_gradients), product(gradient, weight).view(k, -1, width)):
                whole[rows] = one_pass
            if gradient.dtype == working:
                weight_gradient.addmm_(gradient.t(), x)
            else:
                weight_gradient.add_(product(gradient.t(), x))
            if bias is not None:
                bias_gradient.add_(gradient.sum(0, dtype=working))
        ctx.save_for_backward(weight_gradient, bias_gradient, *feature_gradients)
        ctx.settings = scale, weight.dtype
        result = weighted(objective, vocabulary, *sums)
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        scale, dtype = ctx.settings
        gradients = (None if g is None else (g * (upstream / scale)).to(dtype) for g in ctx.saved_tensors)
        return (None, None, None, *gradients)


def projected(
    features: Sequence[Tensor] | Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    objective: Objective,
    loss_and_gradient: LossAndGradient = loss_and_gradient_,
) -> ConsistencyLoss:
    """The loss of logits = features @ weight.T + bias; see backends.Backend.from_features.

    Under autocast the projection is computed in autocast's type, as torch's linear would.
    """
    given = (features,) if torch.is_tensor(features) else tuple(features)
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        weight, bias, *given = (None if t is None else t.to(dtype) for t in (weight, bias, *given))
    with torch.autocast(device, enabled=False):
        return ConsistencyLoss(*_Projected.apply(target, objective, loss_and_gradient, weight, bias, *given))
