"""The lines under a table: what keeps its numbers from being compared as they stand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from intra_distillation_fairseq.experiments.cells import Cell, Failure, Outcome, failure_lines
from intra_distillation_fairseq.experiments.published import Published
from intra_distillation_fairseq.experiments.recipes import Recipe, evaluation_as_dict

PUBLISHED_PRECISION = "fp16"
# Options that decide storage, speed or memory, and no number.
_WITHOUT_EFFECT = re.compile(
    r"keep-.*|no-(epoch|last|best)-checkpoints|log-.*|no-progress-bar|num-workers|cpu|ddp-backend|distributed-.*"
    r"|device-id|id-pass-mode|id-loss-backend|id-loss-input|.*-logdir|wandb-project"
    r"|batch_size"  # of the evaluation; the training's is batch-size
)
_COMMIT = re.compile(r"\b([0-9a-f]{9})[0-9a-f]{31}\b")
_SHOWN_DIGEST = 12


def of_cells(outcomes: dict[Cell, Outcome]) -> list[str]:
    """What is not done, and why: one line for each failure of a pair, one for each other state."""
    failed, others = [], {}
    for cell, result in outcomes.items():
        if result.state == "failed":
            failed.append(Failure(cell, result.step, result.reason, result.log))
        elif result.state != "done":
            others.setdefault(result.state, []).append(cell)
    lines = failure_lines(failed)
    for state, cells in others.items():
        names = ", ".join(f"{cell.name}{_update(outcomes[cell])}" for cell in cells[:6])
        more = f" and {len(cells) - 6} more" if len(cells) > 6 else ""
        lines.append(f"{state}: {names}{more}")
    return lines


def _update(result: Outcome) -> str:
    parts = [f"update {result.update:,}"] if result.state in ("running", "stopped") and result.update else []
    parts += [f"on {result.host}, if its lock file is right"] if result.host else []
    return f" ({', '.join(parts)})" if parts else ""


def of_corpora(corpora: dict[str, dict[str, Any]], published: Published) -> list[str]:
    """Which columns have no published numbers beside them."""
    others = []
    for pair, one in corpora.items():
        if not one["of_paper"]:
            sizes = " and ".join(f"{lines:,}" for lines in one["train_lines"]) or "unknown number of"
            others.append(
                f"{pair} ({' and '.join(name or 'unknown corpus' for name in one['names'])}, {sizes} training pairs)"
            )
    if not others:
        return []
    return [f"without published numbers, as this is not the text of table {published.number}: {', '.join(others)}"]


def of_recipe(outcomes: dict[Cell, Outcome], recipe: Recipe, published: Published) -> list[str]:
    """In what the runs' settings differ from the published ones, in one line.

    Args:
        outcomes: the cells that have published numbers beside them.
        recipe: the published settings.
        published: the table of the paper.
    """
    by_method: dict[str, list[str]] = {}
    for cell, result in outcomes.items():
        if result.record:
            known = by_method.setdefault(cell.method, [])
            known += [text for text in _recipe_differences(cell.method, result, recipe) if text not in known]
    common = [text for text in next(iter(by_method.values()), []) if all(text in one for one in by_method.values())]
    parts = ["; ".join([", ".join(common)] if common else [])]
    parts += [
        f"{method}: {', '.join(own)}"
        for method, texts in by_method.items()
        if (own := [text for text in texts if text not in common])
    ]
    text = "; ".join(part for part in parts if part)
    return [f"not the published recipe ({published.recipe}): {text}"] if text else []


def _recipe_differences(method: str, result: Outcome, recipe: Recipe) -> list[str]:
    if method not in recipe.methods:
        return ["a method that it does not have"]
    settings = result.record["settings"]
    ours = _options(result)
    theirs = recipe.options(method)
    ours["precision"], theirs["precision"] = settings["precision"], PUBLISHED_PRECISION
    texts = _batch_differences(result, ours, theirs) + _differences(ours, theirs)
    if result.score:
        texts += _differences(result.score["inputs"]["evaluation"], evaluation_as_dict(recipe.evaluation))
    return texts


def _options(result: Outcome) -> dict[str, Any]:
    """Options of fairseq-train in force, as far as they are settings of the run."""
    settings = result.record["settings"]
    return {**settings["options"], **_flags(settings["flags"])}


def _batch_differences(result: Outcome, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """How the batch of several processes differs: by its size, whatever options make it. Takes these options out."""
    several = any(processes > 1 for processes, _ in result.batches)
    if not several or not _batch_sizes(result) or "max-tokens" not in theirs:
        return []
    wanted = 1, theirs.get("update-freq", 1), theirs["max-tokens"]
    batches = [(processes, frequency, ours["max-tokens"]) for processes, frequency in result.batches]
    for options in (ours, theirs):
        options.pop("max-tokens", None)
        options.pop("update-freq", None)
    if _batch_sizes(result) == [math.prod(map(int, wanted))]:
        return []
    shown = " then ".join(" x ".join(map(str, one)) for one in batches)
    return [f"batch {shown} tokens instead of {' x '.join(map(str, wanted))}"]


def _batch_sizes(result: Outcome) -> list[int]:
    """Tokens that one update may take in, of each launch; empty where that is unknown."""
    tokens = str(_options(result).get("max-tokens", ""))
    if not all(text.isdigit() for text in (tokens, *(str(frequency) for _, frequency in result.batches))):
        return []
    return list(dict.fromkeys(processes * int(frequency) * int(tokens) for processes, frequency in result.batches))


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    texts = []
    for key in {**theirs, **ours}:
        own, other = ours.get(key, False), theirs.get(key, False)
        if not _WITHOUT_EFFECT.fullmatch(key) and not _equal(own, other):
            texts.append(
                f"{key} {_shown(own)} " + ("(not set there)" if other is False else f"instead of {_shown(other)}")
            )
    return texts


def _flags(words: list[str]) -> dict[str, Any]:
    """Flags after `--` as options; the last value counts."""
    options: dict[str, Any] = {}
    for index, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            follows = words[index + 1] if index + 1 < len(words) else "--"
            options[name] = value if equals else True if follows.startswith("--") else follows
    return options


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    try:
        return float(one) == float(other)
    except ValueError:
        return str(one) == str(other)


def _shown(value: Any) -> str:
    return {True: "set", False: "not set"}[value] if isinstance(value, bool) else str(value)


# What should be the same in all runs of a column: name in the note, and how to read it from a cell that is done; None
# where a version did not note it.
_ALIKE: tuple[tuple[str, Callable[[Outcome], Any]], ...] = (
    ("SacreBLEU signature", lambda result: result.score["bleu_signature"]),
    ("evaluation", lambda result: json.dumps(result.score["inputs"]["evaluation"])),
    ("checkpoint", lambda result: result.score["checkpoint"]),
    ("number of updates", lambda result: f"{result.finished['updates']:,}"),
    ("data digest", lambda result: result.record["settings"]["data_digest"][:_SHOWN_DIGEST]),
    ("precision", lambda result: result.record["settings"]["precision"]),
    ("batch", lambda result: " then ".join(f"{size:,} tokens" for size in _batch_sizes(result)) or None),
    ("commit", lambda result: _COMMIT.sub(r"\1", " then ".join(result.versions.get("git_commit", [])))),
    ("torch", lambda result: " then ".join(result.versions.get("torch", []))),
    ("device", lambda result: " then ".join(result.versions.get("devices", [])).replace("[]", "CPU")),
)


def of_columns(outcomes: dict[Cell, Outcome]) -> list[str]:
    """What differs between the runs of one column, which should differ in their method and seed alone."""
    lines: dict[str, list[str]] = {}  # what differs -> pairs
    for pair in dict.fromkeys(cell.pair for cell in outcomes):
        done = {cell: result for cell, result in outcomes.items() if cell.pair == pair and result.state == "done"}
        for name, read in _ALIKE:
            values: dict[str, list[Cell]] = {}
            for cell, result in done.items():
                if (value := read(result)) is not None:
                    values.setdefault(value, []).append(cell)
            if len(values) > 1:
                texts = [f"{value or 'unknown'} ({_cells(cells, list(done))})" for value, cells in values.items()]
                lines.setdefault(f"the {name} differs: {'; '.join(texts)}", []).append(pair)
    return [f"{', '.join(pairs)}: {text}" for text, pairs in lines.items()]


def _cells(cells: list[Cell], done: list[Cell]) -> str:
    """Names of cells of one pair: a method where it is all of its seeds."""
    names = []
    for method in dict.fromkeys(cell.method for cell in cells):
        own = [cell for cell in cells if cell.method == method]
        every = sum(cell.method == method for cell in done) == len(own)
        names += [method] if every else [f"{method} seed {cell.seed}" for cell in own]
    return ", ".join(names)
