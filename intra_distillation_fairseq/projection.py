"""What may be done with a model's last layer, the projection from features to logits."""

from __future__ import annotations

import inspect

from fairseq.models.transformer.transformer_decoder import TransformerDecoderBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from intra_distillation_fairseq.passes import unwrapped


def why_not_plain(model: nn.Module) -> str | None:
    """What keeps the logits from being the product of a torch.nn.Linear that nobody else looks at, or None."""
    decoder = getattr(unwrapped(model), "decoder", None)
    projection = getattr(decoder, "output_projection", None)
    if type(projection) is not nn.Linear:
        return f"the decoder has no output_projection of type torch.nn.Linear: it is a {type(projection).__name__}"
    for method in ("forward", "output_layer"):
        if getattr(type(decoder), method, None) is not getattr(TransformerDecoderBase, method):
            return f"the decoder computes the logits in a way of its own ({type(decoder).__name__}.{method})"
    if projection._forward_hooks or projection._forward_pre_hooks:
        return "its output_projection has hooks"
    return None


def why_not_apart(model: nn.Module) -> str | None:
    """What forbids to take features from model(..., features_only=True) and to project them elsewhere, or None."""
    inner = unwrapped(model)
    if "features_only" not in inspect.signature(inner.forward).parameters:
        return f"{type(inner).__name__}.forward does not take features_only"
    # A wrapper that counts on seeing every parameter used within its forward:
    wrapper = model
    while wrapper is not inner:
        if isinstance(wrapper, DistributedDataParallel) and wrapper.find_unused_parameters:
            return "--find-unused-parameters takes an output projection that is used elsewhere for unused"
        if "FullyShardedDataParallel" in type(wrapper).__name__:
            return "fully sharded training holds the output projection only within the model's forward"
        wrapper = wrapper.module
    return why_not_plain(model)
