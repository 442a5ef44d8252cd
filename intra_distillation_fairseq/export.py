"""Makes a checkpoint independent of this plugin, for use with fairseq alone."""

from __future__ import annotations

import argparse
from typing import Any


def for_plain_fairseq(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state in such a way that fairseq loads it without the plugin, where its model is one of fairseq's.

    Two things keep fairseq from it. It does not know our names for its transformer, whose every size is written out
    beside the name: so the model gets fairseq's name. And from PyTorch 2.6 on, torch's safe loader, which fairseq takes
    without knowing, refuses argparse.Namespace: so the model's settings become a mapping, which fairseq reads as well.
    A switch transformer needs the plugin anyhow and stays as it is.

    Args:
        state: as `checkpoints.load` gives it; it is not changed.
    """
    from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_NAME_REGISTRY, ARCH_MODEL_REGISTRY

    model = (state.get("cfg") or {}).get("model")
    arch = getattr(model, "arch", None)
    if not isinstance(model, argparse.Namespace) or not _is_of("fairseq", ARCH_MODEL_REGISTRY.get(arch)):
        return state
    if not _is_of("fairseq", ARCH_CONFIG_REGISTRY.get(arch)):
        arch = ARCH_MODEL_NAME_REGISTRY[arch]
    return {**state, "cfg": {**state["cfg"], "model": {**vars(model), "arch": arch, "_name": arch}}}


def _is_of(package: str, thing: Any) -> bool:
    return getattr(thing, "__module__", "").split(".")[0] == package
