"""K stochastic passes of one model over one batch. Knows torch only.

The passes differ in their dropout masks and in nothing else. Three ways to run them give the same distribution of
results and differ in cost:

stacked     the batch repeated K times, one forward; K times the activations at once
sequential  K forwards in order: draws the masks that K plain forwards would draw; K times the activations
recompute   K forwards, each run again during backward: one pass's activations, 4/3 of the computation
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def is_stochastic(model: nn.Module) -> bool:
    """Whether there is a dropout to make passes differ: a module with an attribute p above 0, as all of them have."""
    return any(isinstance(getattr(m, "p", None), (int, float)) and m.p > 0 for m in model.modules())


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside its data-parallel wrappers (torch's DDP, fairseq's proxies), or itself."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def stacked(model: nn.Module, net_input: Mapping[str, Any], num_passes: int) -> Tensor:
    """One forward over the batch repeated K times; each tensor of the input has the batch (B) as first dimension.

    The result is one tensor (K, B, T, V): taking it apart would cost a copy of it in backward.
    """
    repeated = {
        name: value.repeat(num_passes, *[1] * (value.dim() - 1)) if torch.is_tensor(value) else value  # K*B x ...
        for name, value in net_input.items()
    }
    logits = model(**repeated)[0]  # K*B x T x V
    return logits.view(num_passes, -1, *logits.shape[1:])


def sequential(model: nn.Module, net_input: Mapping[str, Any], num_passes: int) -> list[Tensor]:
    """K forwards in order."""
    return [model(**net_input)[0] for _ in range(num_passes)]


def recompute(model: nn.Module, net_input: Mapping[str, Any], num_passes: int) -> list[Tensor]:
    """K forwards whose activations are computed again, under the same random state, when backward needs them."""
    names = list(net_input)

    def one_pass() -> Tensor:
        # Backward's second run must not go through a data-parallel wrapper: its forward re-arms the gradient reducer,
        # which by then is in the middle of reducing. The graph, and with it the gradient hooks, is the first run's.
        callee: nn.Module = model

        def forward(*values: Any) -> Tensor:
            nonlocal callee
            run, callee = callee, unwrapped(model)
            return run(**dict(zip(names, values)))[0]  # what else the model returns would stay alive

        # Positional arguments: checkpoint looks at these, not at keyword arguments, for the devices whose random state
        # it has to save; with keyword arguments a GPU would draw other dropout masks the second time.
        return checkpoint(forward, *net_input.values(), use_reentrant=False, preserve_rng_state=True)

    return [one_pass() for _ in range(num_passes)]


PASS_MODES: dict[str, Callable[[nn.Module, Mapping[str, Any], int], Tensor | list[Tensor]]] = {
    "stacked": stacked,
    "sequential": sequential,
    "recompute": recompute,
}


def run(model: nn.Module, net_input: Mapping[str, Any], num_passes: int, mode: str) -> Tensor | list[Tensor]:
    """Logits of K passes through model(**net_input), never through its parts, so that any data-parallel wrapper works.

    Args:
        model: returns (logits, extra) with logits (B, T, V), as fairseq's encoder-decoder models do.
        net_input: fairseq's net_input: src_tokens (B, S), src_lengths (B,), prev_output_tokens (B, T).
        num_passes: K.
        mode: a key of PASS_MODES.

    Returns:
        One tensor (K, B, T, V), or K tensors (B, T, V) in the order of the passes.
    """
    return PASS_MODES[mode](model, net_input, num_passes)


def flatten_tokens(logits: Tensor | list[Tensor], skip: int = 0) -> Tensor | list[Tensor]:
    """(K, B, T, V) -> (K, N, V), or K times (B, T, V) -> (N, V), without the first `skip` of the T positions."""
    if torch.is_tensor(logits):
        return logits[:, :, skip:].reshape(logits.size(0), -1, logits.size(-1))
    return [z[:, skip:].reshape(-1, z.size(-1)) for z in logits]
