"""Number of passes and weight schedule of a run, read from its recorded settings. No torch."""

from __future__ import annotations

from typing import Any

from intra_distillation_fairseq.experiments.launch import last_value, max_update
from intra_distillation_fairseq.experiments.recipes import as_flags
from intra_distillation_fairseq.schedule import AlphaSchedule

CRITERION = "intra_distillation"
DEFAULT_PASSES = {CRITERION: 3, "self_distillation": 1}  # the criterions'; not imported, since they import torch


def words_of(settings: dict[str, Any]) -> list[str]:
    """The words of fairseq-train that settings of a run.json stand for; of an option given twice the last counts."""
    return [*as_flags(settings["options"]), *settings["flags"]]


def num_passes(settings: dict[str, Any]) -> int:
    """K; 1 for a run whose passes are not compared.

    Args:
        settings: `settings` of a run.json.
    """
    words = words_of(settings)
    default = DEFAULT_PASSES.get(last_value(words, "criterion") or "")
    return int(last_value(words, "id-num-passes") or default) if default else 1


def alpha_schedule(settings: dict[str, Any]) -> AlphaSchedule | None:
    """alpha' of a run; None for one whose passes are not compared.

    Args:
        settings: `settings` of a run.json.
    """
    if num_passes(settings) == 1:
        return None
    words = words_of(settings)
    numbers = {name: float(given) for name in ("alpha", "p", "q") if (given := last_value(words, f"id-{name}"))}
    kind = last_value(words, "id-alpha-schedule") or AlphaSchedule.kind
    return AlphaSchedule(**numbers, kind=kind, max_update=max_update(words))


def without_option(words: list[str], option: str) -> list[str]:
    """Words of a command without an option that takes a value, given as `--name value` or `--name=value`."""
    kept, skip = [], False
    for word in words:
        if not skip and word != f"--{option}" and not word.startswith(f"--{option}="):
            kept.append(word)
        skip = not skip and word == f"--{option}"
    return kept
