"""The loss of K passes under one signature, and which implementation of it is used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, Union

import torch
from torch import Tensor
from torch.nn.functional import linear

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.losses.chunked import chunked
from intra_distillation_fairseq.losses.closed_form import CLOSED_FORMS
from intra_distillation_fairseq.losses.divergence import DIVERGENCES, log_probabilities
from intra_distillation_fairseq.losses.objective import ConsistencyLoss, Objective, weighted
from intra_distillation_fairseq.losses.projected import projected

logger = logging.getLogger(__name__)

# K tensors (N, .), or one tensor (K, N, .).
Passes = Union[Sequence[Tensor], Tensor]


class Backend(NamedTuple):
    """An implementation of the loss. Both functions compute in float32, in float64 if given that.

    Attributes:
        from_logits: (logits, target, objective, overwrite_logits=False) -> ConsistencyLoss. Logits: K tensors (N, V) of
            any floating type, or one (K, N, V). Target: (N,) token ids. With overwrite_logits backward may put the
            gradient into the memory of the logits, which is then lost to everybody else.
        from_features: (features, weight, bias, target, objective) -> ConsistencyLoss of features @ weight.T + bias.
            Features: K tensors (N, H), or one (K, N, H). Weight: (V, H). Bias: (V,) or None.
    """

    from_logits: Callable[..., ConsistencyLoss]
    from_features: Callable[..., ConsistencyLoss]


def reference(logits: Passes, target: Tensor, objective: Objective, overwrite_logits: bool = False) -> ConsistencyLoss:
    """The definition in plain PyTorch; every other back end is held against it. It never overwrites the logits."""
    lprobs = [log_probabilities(z) for z in logits]
    k, vocabulary = len(lprobs), lprobs[0].size(-1)
    padding = target.eq(objective.ignore_index)  # N
    index = target.unsqueeze(-1)  # N x 1

    def over_tokens(per_token: Tensor) -> Tensor:
        return per_token.masked_fill(padding, 0.0).sum()

    nll_sum = sum(over_tokens(-lp.gather(-1, index).squeeze(-1)) for lp in lprobs) / k
    smooth_sum = sum(over_tokens(-lp.sum(-1)) for lp in lprobs) / k
    divergence_sum = over_tokens(DIVERGENCES[objective.divergence](lprobs))
    return weighted(objective, vocabulary, nll_sum, smooth_sum, divergence_sum)


def reference_from_features(
    features: Passes, weight: Tensor, bias: Tensor | None, target: Tensor, objective: Objective
) -> ConsistencyLoss:
    """The definition over logits that exist as a whole."""
    return reference([linear(f, weight, bias) for f in features], target, objective)


def triton(*args, **kwargs) -> ConsistencyLoss:
    """Kernels for CUDA (triton_kernels.py). The package is imported when it is first needed."""
    from intra_distillation_fairseq.losses import triton_kernels

    return triton_kernels.triton_loss(*args, **kwargs)


def triton_from_features(*args) -> ConsistencyLoss:
    """Chunk by chunk as chunked, with the kernels for the loss and gradient of a chunk's logits."""
    from intra_distillation_fairseq.losses import triton_kernels

    return projected(*args, loss_and_gradient=triton_kernels.loss_and_gradient_)


BACKENDS: dict[str, Backend] = {
    "reference": Backend(reference, reference_from_features),
    "chunked": Backend(chunked, projected),
    "triton": Backend(triton, triton_from_features),
}


def why_no_triton(device: torch.device, num_passes: int) -> str | None:
    """What the triton back end lacks for this device and number of passes, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA GPU and the model is on the device '{device.type}'"
    try:
        from intra_distillation_fairseq.losses import triton_kernels
    except ImportError as error:
        return f"the package triton cannot be imported ({error})"
    if num_passes > triton_kernels.MAX_PASSES:
        return f"it takes at most {triton_kernels.MAX_PASSES} passes and --id-num-passes is {num_passes}"
    try:
        triton_kernels.try_out(device)
    except Exception as error:  # whatever a compiler, a driver or a GPU that it does not support makes of it
        reason = str(error).strip().partition("\n")[0]
        return f"its kernels do not run on this machine ({type(error).__name__}: {reason})"
    return None


def choose(name: str, device: torch.device, num_passes: int, divergence: str = "x") -> str:
    """The key of BACKENDS to use; "auto" takes triton where it works, else chunked. Logs the choice.

    A divergence without a closed form is for reference, which auto then takes.

    Raises:
        UserError: no such back end, or it lacks something here.
    """
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"--id-loss-backend is '{name}': allowed are auto, {', '.join(BACKENDS)}")
    if divergence not in CLOSED_FORMS:
        if name not in ("auto", "reference"):
            raise UserError(
                f"--id-loss-backend is '{name}', but of --id-divergence '{divergence}' there is only the definition: "
                "use auto or reference"
            )
        logger.info("loss back end: reference (the divergence %s has no closed form)", divergence)
        return "reference"
    lacking = why_no_triton(device, num_passes) if name in ("auto", "triton") else None
    if name == "triton" and lacking:
        raise UserError(f"--id-loss-backend is 'triton', but {lacking}: use auto or chunked")
    chosen = name if name != "auto" else "chunked" if lacking else "triton"
    reason = f"; triton: {lacking}" if lacking and device.type == "cuda" else ""
    logger.info("loss back end: %s%s", chosen, f" (chosen automatically{reason})" if name == "auto" else "")
    return chosen
