"""One-shot, global, unstructured pruning: which parameters may go, in which order, and setting them to zero.

Xu, Koehn, Murray, "The Importance of Being Parameters" (2022), figure 6: the least sensitive parameters of the whole
model are set to zero, without any training afterwards. The weights and biases of nn.Linear and nn.Embedding modules
compete, as in the same first author's later code; so do the experts of switch layers and their routers, which are
linear layers too. Layer norms are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor, nn

from intra_distillation_fairseq.models.switch_layer import SwitchFeedForward

_KINDS = (nn.Linear, nn.Embedding, SwitchFeedForward)


def prunable_parameters(model: nn.Module) -> dict[str, list[str]]:
    """The parameters that compete, in the order of the model.

    Args:
        model: any module.
    Returns:
        The name of each as in `model.named_parameters()`, and all names it has in the state: a parameter that several
        modules share (tied embeddings, the output projection) is there once.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    owned = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _KINDS)
        for parameter in module.parameters(recurse=False)
    }
    return {name: names[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in owned}


class Ranking:
    """All entries of some parameters, those to be pruned first at the front.

    Args:
        order: (N,) places in the parameters, flattened and joined.
        shapes: of each parameter, by name, in the order in which they are joined.
    """

    def __init__(self, order: Tensor, shapes: Mapping[str, torch.Size]):
        self._order = order
        self._shapes = dict(shapes)

    @classmethod
    def by_score(cls, scores: Mapping[str, Tensor]) -> Ranking:
        """Lowest score first, over all parameters together; of equal scores the one that stands first.

        Args:
            scores: of each entry of each parameter, none of them NaN.
        """
        joined = torch.cat([score.flatten().float() for score in scores.values()])
        return cls(torch.argsort(joined, stable=True), {name: score.shape for name, score in scores.items()})

    @classmethod
    def at_random(cls, shapes: Mapping[str, torch.Size], seed: int) -> Ranking:
        """Every order as likely as any other; the same seed gives the same one."""
        total = sum(shape.numel() for shape in shapes.values())
        return cls(torch.randperm(total, generator=torch.Generator().manual_seed(seed)), shapes)

    def __len__(self) -> int:
        return len(self._order)

    def count(self, ratio: float) -> int:
        """How many entries a ratio means: floor(ratio * N), the ratio taken as the decimal number it is written as."""
        return math.floor(Fraction(str(ratio)) * len(self))

    def masks(self, ratio: float) -> dict[str, Tensor]:
        """Where to prune, boolean and of each parameter's shape; what a ratio prunes every larger one prunes too."""
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[self._order[: self.count(ratio)]] = True
        parts = chosen.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts)}


def pruned(
    state: Mapping[str, Tensor], names: Mapping[str, list[str]], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A model's state with the masked entries set to zero; precision and everything else stay as they are.

    Args:
        state: the state, with each parameter under its first name; it is not changed.
        names: all names of each parameter, as `prunable_parameters` gives them.
        masks: of each parameter, as `Ranking.masks` gives them.
    """
    result = dict(state)
    for name, aliases in names.items():
        zeroed = state[name].masked_fill(masks[name], 0)  # one tensor for all names, which a file then holds once
        result.update({alias: zeroed for alias in aliases if alias in state})
    return result
