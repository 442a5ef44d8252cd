"""The first n layers of a model: as a view that shares its parameters, and as a checkpoint of its own."""

from __future__ import annotations

import argparse
import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, open_dict
from torch import nn

from intra_distillation_fairseq.errors import UserError

SIDES = ("encoder", "decoder")

_LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.")


def depth(model: nn.Module) -> tuple[int, int]:
    """How many layers the encoder and the decoder of a model have.

    Raises:
        UserError: it has no `encoder.layers` and `decoder.layers`.
    """
    layers = [getattr(getattr(model, side, None), "layers", None) for side in SIDES]
    if not all(isinstance(found, nn.ModuleList) for found in layers):
        raise UserError(
            f"a {type(model).__name__} cannot be cut to its first layers: it has no encoder.layers and decoder.layers, "
            "as fairseq's encoder-decoder transformers do"
        )
    return len(layers[0]), len(layers[1])


def first_layers(model: nn.Module, n: int) -> nn.Module:
    """The model of the first n encoder and n decoder layers; nothing is copied, a change of either changes both.

    What follows the layers stays: the output projection, and the final layer norms of a model with
    `--encoder-normalize-before` or `--decoder-normalize-before`, which here see the state after layer n.

    Args:
        model: a transformer of fairseq or of this plugin, without data-parallel wrappers.
        n: layers to keep on each side, from 1 to the smaller of the two numbers there are.
    Returns:
        A module of the model's class. It trains or evaluates as the model does at this moment.
    Raises:
        UserError: n is out of bounds, or the model has no such layers.
    """
    _check(n, *depth(model))
    return _replacing(model, **{side: _first_of_stack(getattr(model, side), n) for side in SIDES})


@contextlib.contextmanager
def cut_in_place(model: nn.Module, n: int) -> Iterator[None]:
    """Let the model itself be its first n layers while the body runs: its data-parallel wrappers then see no others.

    Raises:
        UserError: as `first_layers`.
    """
    whole = model._modules
    model.__dict__["_modules"] = first_layers(model, n)._modules
    try:
        yield
    finally:
        model.__dict__["_modules"] = whole


def truncate_state(state: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The checkpoint of the first n layers, as an ordinary checkpoint of fairseq.

    Without the optimiser's state, which is of the whole model.

    Args:
        state: content of a checkpoint; it is not changed, its tensors are shared.
        n: layers to keep on each side.
    Raises:
        UserError: n is out of bounds, or the model is not an encoder-decoder transformer without other layers between.
    """
    model = state["model"]
    found = {side: [int(m[2]) for m in map(_LAYER.match, model) if m and m[1] == side] for side in SIDES}
    if not all(f"{side}.layers.0.self_attn.out_proj.weight" in model for side in SIDES):
        raise UserError(
            "the checkpoint is not of an encoder-decoder transformer: it has no self-attention under encoder.layers "
            "and decoder.layers, so it cannot be cut to its first layers"
        )
    _check(n, *(max(numbers) + 1 for numbers in found.values()))
    new = {key: value for key, value in state.items() if key != "last_optimizer_state"}
    new["model"] = _cut_parameters(model, n)
    if state.get("cfg") is not None:
        new["cfg"] = copy.copy(state["cfg"])
        _put(new["cfg"], "model", _cut_settings(state["cfg"]["model"], n))
    if state.get("args") is not None:
        new["args"] = _cut_settings(state["args"], n)
    averages = {key: value for key, value in (state.get("extra_state") or {}).items() if key.startswith("ema")}
    if averages:  # of --store-ema: further sets of the same parameters
        cut = {key: _cut_parameters(value, n) for key, value in averages.items() if isinstance(value, Mapping)}
        new["extra_state"] = {**state["extra_state"], **cut}
    return new


def _check(n: int, encoder: int, decoder: int) -> None:
    if not 1 <= n <= min(encoder, decoder):
        raise UserError(
            f"{n} layers were asked for: the model has {encoder} encoder and {decoder} decoder layers, allowed is "
            f"1 to {min(encoder, decoder)}"
        )


def _replacing(module: nn.Module, **children: nn.Module) -> nn.Module:
    """A shallow copy of a module with other children."""
    view = copy.copy(module)
    view.__dict__["_modules"] = {**module._modules, **children}
    return view


def _first_of_stack(stack: nn.Module, n: int) -> nn.Module:
    layers = copy.copy(stack.layers)  # a slice of fairseq's list for LayerDrop would be a broken one
    layers.__dict__["_modules"] = dict(list(stack.layers._modules.items())[:n])
    view = _replacing(stack, layers=layers)
    view.num_layers = n
    return view


def _cut_parameters(parameters: Mapping[str, Any], n: int) -> dict[str, Any]:
    return {
        name: value
        for name, value in parameters.items()
        if not (match := _LAYER.match(name)) or int(match[2]) < n
    }  # fmt: skip


def _cut_settings(settings: Any, n: int) -> Any:
    """A model's settings, flat as from fairseq-train or nested as from fairseq-hydra-train, with n layers a side."""
    new = copy.deepcopy(settings)
    if _get(new, "base_layers"):
        raise UserError("the checkpoint has --base-layers, which stand between the others: it cannot be cut")
    for side in SIDES:
        nested = _get(new, side)
        if isinstance(nested, (Mapping, DictConfig)):
            _put(nested, "layers", n)
            _put(nested, "layers_to_keep", None)
        else:
            _put(new, f"{side}_layers", n)
            _put(new, f"{side}_layers_to_keep", None)  # fairseq would pick among the layers once more
    return new


def _get(settings: Any, key: str) -> Any:
    return getattr(settings, key, None) if isinstance(settings, argparse.Namespace) else settings.get(key)


def _put(settings: Any, key: str, value: Any) -> None:
    if isinstance(settings, argparse.Namespace):
        setattr(settings, key, value)
    elif isinstance(settings, DictConfig):
        with open_dict(settings):
            settings[key] = value
    else:
        settings[key] = value
