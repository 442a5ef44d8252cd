"""A feed-forward layer of experts, of which each token uses one. Knows torch only.

Fedus, Zoph, Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity"
(JMLR 2022), section 2; docs/switch.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RoutingRecord(NamedTuple):
    """What one training forward of one layer tells. Three scalars, the first with its graph.

    Attributes:
        balance_loss: weight * E * sum_e f_e P_e (eq. 4).
        tokens: real tokens.
        dropped: those of them that no expert had room for.
    """

    balance_loss: Tensor
    tokens: Tensor
    dropped: Tensor


def expert_capacity(tokens: int, capacity_factor: float, num_experts: int) -> int:
    """Eq. 3: how many tokens an expert takes, ceil(capacity_factor * tokens / E)."""
    return math.ceil(tokens * capacity_factor / num_experts)


class SwitchFeedForward(nn.Module):
    """y = p_e(x) E_e(x) with e = argmax p(x), p = softmax(W_r x); each E_e is linear, activation, dropout, linear.

    In training an expert takes at most `expert_capacity` of a batch's real tokens, the first ones in the order in which
    fairseq holds them: position after position, within a position sentence after sentence. So whether a token finds
    room never depends on a later position, and the K copies of a stacked batch fare alike. A token without room gets 0
    and goes on through the residual connection alone. In evaluation there is room for all. Padding goes to no expert.
    """

    def __init__(
        self,
        embed_dim: int,
        ffn_embed_dim: int,
        num_experts: int,
        capacity_factor: float,
        loss_weight: float,
        jitter: float,
        activation_fn: Callable[[Tensor], Tensor],
        dropout: nn.Module,
    ):
        """Make E experts and their router.

        Args:
            embed_dim: d, width of the model.
            ffn_embed_dim: f, width inside an expert.
            num_experts: E.
            capacity_factor: room for how many times an equal share of the tokens an expert has in training.
            loss_weight: weight of the balance loss.
            jitter: in training the router sees its input times uniform(1 - jitter, 1 + jitter).
            activation_fn: between an expert's two linear layers.
            dropout: after the activation.
        """
        super().__init__()
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.loss_weight = loss_weight
        self.jitter = jitter
        self.activation_fn = activation_fn
        self.dropout_module = dropout
        self.router = nn.Linear(embed_dim, num_experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(num_experts, embed_dim, ffn_embed_dim))
        self.b1 = nn.Parameter(torch.empty(num_experts, ffn_embed_dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, ffn_embed_dim, embed_dim))
        self.b2 = nn.Parameter(torch.empty(num_experts, embed_dim))
        self.reset_parameters()
        self.padding_mask: Tensor | None = None  # of the next forward only, see there
        self.records: list[RoutingRecord] | None = None  # a list while somebody records

    def reset_parameters(self) -> None:
        """Each expert as nn.Linear starts, which fairseq takes for the two layers of its dense feed-forward."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = 1 / math.sqrt(weight.size(1))
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def route(self, tokens: Tensor) -> Tensor:
        """Router probabilities (N, E) of tokens (N, d), at least in float32 whatever the model's precision.

        In half precision rounding would decide between near-equal experts, and the softmax would lose the small ones.
        """
        precision = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            x = tokens.to(precision)
            if self.training and self.jitter > 0:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            return F.linear(x, self.router.weight.to(precision)).softmax(-1)

    def run_experts(self, slots: Tensor) -> Tensor:
        """Each expert over its own slots: (E, C, d) -> (E, C, d)."""
        hidden = self.activation_fn(torch.baddbmm(self.b1.unsqueeze(1), slots, self.w1))  # E x C x f
        return torch.baddbmm(self.b2.unsqueeze(1), self.dropout_module(hidden), self.w2)

    def forward(self, x: Tensor) -> Tensor:
        """One token, one expert.

        `padding_mask` (B, T), True at padding, is set before the call, by a layer that can hand on the input alone, and
        forgotten by it; None means that there is no padding.

        Args:
            x: (T, B, d), as fairseq's layers have it.

        Returns:
            (T, B, d), in x's precision or, under autocast, in that of a matrix product.
        """
        tokens = x.reshape(-1, x.size(-1))  # N x d
        padding_mask, self.padding_mask = self.padding_mask, None
        if padding_mask is None:
            real = torch.ones(len(tokens), dtype=torch.bool, device=x.device)  # N
        else:
            real = ~padding_mask.t().reshape(-1)
        probs = self.route(tokens)  # N x E
        gate, expert = probs.max(-1)  # N each
        chosen = expert.unsqueeze(1) == torch.arange(self.num_experts, device=x.device)  # N x E
        chosen = chosen & real.unsqueeze(1)
        counts = chosen.sum(0)  # E, before any token is dropped
        if self.training:
            # As many slots as this many tokens can need, a number known without asking the device; of these the real
            # tokens may fill no more than their own count allows. (The same formula in float64, so never beyond.)
            capacity = min(len(tokens), expert_capacity(len(tokens), self.capacity_factor, self.num_experts))
            limit = (counts.sum().double() * self.capacity_factor / self.num_experts).ceil()
        else:
            capacity = limit = max(1, int(counts.max()))
        position = chosen.cumsum(0).gather(1, expert.unsqueeze(1)).squeeze(1) - 1  # N, place in the expert's queue
        kept = real & (position < limit)

        # The last row takes what has no room; nobody reads it.
        row = torch.where(kept, expert * capacity + position, self.num_experts * capacity)  # N
        slots = tokens.new_zeros(self.num_experts * capacity + 1, tokens.size(1)).index_copy(0, row, tokens)
        results = self.run_experts(slots[:-1].view(self.num_experts, capacity, -1)).flatten(0, 1)
        weight = (gate * kept).to(results.dtype)
        y = results.index_select(0, row * kept) * weight.unsqueeze(1)  # where nothing was kept: row 0, times 0

        if self.training:
            # Computed whether or not somebody records: a forward that is run again in backward, where nobody does, must
            # save the same tensors as the first time.
            record = self._record(probs, real, counts, kept)
            if self.records is not None and torch.is_grad_enabled():
                self.records.append(record)
        return y.view(x.shape)

    def _record(self, probs: Tensor, real: Tensor, counts: Tensor, kept: Tensor) -> RoutingRecord:
        num_real = counts.sum()
        fraction = counts / num_real.clamp(min=1)  # f, eq. 5
        probability = (probs * real.unsqueeze(1)).sum(0) / num_real.clamp(min=1)  # P, eq. 6
        balance_loss = self.loss_weight * self.num_experts * (fraction * probability).sum()
        return RoutingRecord(balance_loss, num_real, num_real - kept.sum())


def switch_layers(model: nn.Module) -> list[SwitchFeedForward]:
    """Every layer of experts of a model, also inside its data-parallel wrappers."""
    return [module for module in model.modules() if isinstance(module, SwitchFeedForward)]


@contextmanager
def recording(layers: Iterable[SwitchFeedForward]) -> Iterator[None]:
    """Within it, each training forward of each layer appends a RoutingRecord to the layer's `records`.

    The records are forgotten at its end. Forwards without gradients (of a teacher, say) are not recorded.
    """
    layers = list(layers)
    for layer in layers:
        layer.records = []
    try:
        yield
    finally:
        for layer in layers:
            layer.records = None
