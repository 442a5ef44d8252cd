"""What an ablation trains: a list of runs that differ in one setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.launch import last_value
from intra_distillation_fairseq.experiments.method_settings import CRITERION, alpha_schedule, num_passes
from intra_distillation_fairseq.experiments.recipes import Recipe
from intra_distillation_fairseq.experiments.results_table import BASELINE
from intra_distillation_fairseq.schedule import SCHEDULES

PASSES = (2, 3, 4, 5, 6)  # those of the paper, Fig. 8


@dataclass(frozen=True)
class Variant:
    """One line of an ablation.

    Attributes:
        name: its folder in the results folder.
        method: a method of the config.
        flags: what it adds to the flags of fairseq-train.
        value: of the setting that the ablation is about, for the reader.
    """

    name: str
    method: str
    flags: tuple[str, ...] = ()
    value: str = "-"


@dataclass(frozen=True)
class Ablation:
    """Runs that differ in one setting.

    Attributes:
        kind: passes or alpha.
        title: what the runs differ in.
        column: heading of `Variant.value`.
        variants: the baseline first, where there is one.
    """

    kind: str
    title: str
    column: str
    variants: tuple[Variant, ...]


def passes_ablation(
    recipe: Recipe, method: str, passes: Sequence[int], flags: Sequence[str], *, baseline: bool
) -> Ablation:
    """The number of passes K (paper, Fig. 8). The method's own K is the plain run of the method.

    Args:
        recipe: the config.
        method: a method of it, with the criterion intra_distillation.
        passes: the values of K, each at least 2.
        flags: of fairseq-train, for all runs.
        baseline: begin with the run without intra-distillation.
    Raises:
        UserError: the config lacks a method, the method has no passes, or the flags give their number.
    """
    own = num_passes(_settings(recipe, method, flags, "id-num-passes"))
    variants = [
        Variant(method, method, value=str(number))
        if number == own
        else Variant(f"{method}_k{number}", method, ("--id-num-passes", str(number)), str(number))
        for number in dict.fromkeys(passes)
    ]
    return Ablation("passes", "Number of passes", "K", (*_baseline(recipe, baseline, "1"), *variants))


def alpha_ablation(recipe: Recipe, method: str, flags: Sequence[str], *, baseline: bool) -> Ablation:
    """A weight of the divergence that grows, against one that is constant (paper, Fig. 7).

    Args:
        recipe, method, flags, baseline: as of `passes_ablation`.
    Raises:
        UserError: as of `passes_ablation`, or alpha is so small that both are the same.
    """
    schedule = alpha_schedule(_settings(recipe, method, flags, "id-alpha-schedule"))
    if schedule.alpha <= 1:
        raise UserError(
            f"alpha of method '{method}' is {schedule.alpha:g}: the adaptive weight is constant too up to 1, so there "
            "is nothing to compare; give a larger one, as in  -- --id-alpha 5"
        )
    variants = [Variant(method, method, value=schedule.kind)]
    for kind in SCHEDULES:
        if kind != schedule.kind:
            variants.append(Variant(f"{method}_{kind}", method, ("--id-alpha-schedule", kind), kind))
    return Ablation("alpha", "Weight of the divergence", "alpha'", (*_baseline(recipe, baseline, "-"), *variants))


def _settings(recipe: Recipe, method: str, flags: Sequence[str], varied: str) -> dict:
    settings = {"options": recipe.options(method), "flags": list(flags)}
    if settings["options"]["criterion"] != CRITERION:
        raise UserError(
            f"method '{method}' of {recipe.path} has the criterion '{settings['options']['criterion']}', which neither "
            f"has passes nor alpha: give one with the criterion {CRITERION}, as --method id_x"
        )
    if last_value(settings["flags"], varied) is not None:
        raise UserError(f"'--{varied}' cannot be given after --: it is what the runs of this ablation differ in")
    return settings


def _baseline(recipe: Recipe, wanted: bool, value: str) -> list[Variant]:
    if not wanted:
        return []
    recipe.options(BASELINE)  # refuses a config without it
    return [Variant(BASELINE, BASELINE, value=value)]
