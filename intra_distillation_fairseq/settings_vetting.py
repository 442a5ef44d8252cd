"""Tells whether the settings in a checkpoint are only settings: fairseq evaluates some of them as Python.

Which ones it does depends on the model, the task and the criterion, which the file names too. So none may be code.
"""

from __future__ import annotations

import argparse
import ast
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import omegaconf
import torch

from intra_distillation_fairseq.pickle_tree import Unwanted

# To another setting, as fairseq 1.0.0a wrote some. A whole text alone: joined ones would make a text that nobody saw.
_REFERENCE = re.compile(r"\$\{[.\w]*\}")

# Settings that are names of files and folders or texts, which fairseq does not evaluate.
_TEXTS = frozenset(
    "data save_dir restore_file finetune_from_model continue_once path results_path tensorboard_logdir log_file "
    "wandb_project aim_repo user_dir input teacher".split()
)
_PLAIN = (type(None), bool, int, float, complex, str, torch.Size, torch.device, torch.dtype, np.generic)
_OPERATIONS = (
    *(ast.Call, ast.Lambda, ast.NamedExpr, ast.JoinedStr, ast.comprehension, ast.Await, ast.Yield, ast.YieldFrom),
    *(ast.Pow, ast.LShift, ast.Mod, ast.MatMult),  # large numbers and texts
)
_LONGEST = 10_000  # characters; to parse more takes hundreds of times their memory
_MOST_CHARACTERS = 1_000_000  # that a product of lists may stand for


def check_references(text: str) -> None:
    """Refuse a text of a checkpoint that omegaconf would take for more than the name of another setting.

    Raises:
        Unwanted: it calls a resolver, as ${oc.env:HOME} does, or joins texts.
    """
    # hydra, by which fairseq reads old configurations, takes backslashes away
    if "${" in text.replace("\\", "") and not _REFERENCE.fullmatch(text):
        raise Unwanted(f"it holds {_short(text)}, which is more than the name of a setting to omegaconf")


def check(state: dict[Any, Any]) -> None:
    """Check the configuration of a checkpoint.

    Args:
        state: as loaded, of types that are allowed.
    Raises:
        Unwanted: a setting is code, or neither a plain value nor a container of them.
    """
    settings = [pair for part in ("cfg", "args") for pair in _settings(part, state.get(part))]
    # By a reference, a text under one name becomes the value of any other.
    referring = any(isinstance(value, str) and "${" in value for _, value in settings)
    for name, value in settings:
        if not isinstance(value, _PLAIN):
            raise Unwanted(f"its setting {_short(name)} is of the type {type(value).__name__}")
        if isinstance(value, str) and (referring or name not in _TEXTS) and is_code(value):
            raise Unwanted(f"its setting {_short(name)} is code: {_short(value)}")


def _settings(name: str, value: Any, holder: Any = None) -> Iterator[tuple[str, Any]]:
    """Every value, each with the name it is under. `holder`: the node of omegaconf that it is in."""
    if isinstance(value, omegaconf.Node):
        if vars(value).get("_parent") is not holder:  # a reference would be looked up there
            raise Unwanted(f"its setting {_short(name)} belongs to another configuration")
        if isinstance(value, omegaconf.nodes.AnyNode):
            yield from _settings(name, value._val)
        elif isinstance(value._content, dict):
            for key, held in value._content.items():
                yield from _settings_under(key, held, value)
        elif isinstance(value._content, list):
            for held in value._content:
                yield from _settings(name, held, value)
        else:  # a reference
            yield from _settings(name, value._content)
    elif isinstance(value, (list, tuple, set)) and not isinstance(value, torch.Size):
        for held in value:
            yield from _settings(name, held)
    elif isinstance(value, (dict, argparse.Namespace)):
        # A dict may have attributes too, and fairseq takes some settings by vars().
        for pairs in (value if isinstance(value, dict) else {}, getattr(value, "__dict__", {})):
            for key, held in pairs.items():
                yield from _settings_under(key, held)
    else:
        yield name, value


def _settings_under(key: Any, value: Any, holder: Any = None) -> Iterator[tuple[str, Any]]:
    if key == "_target_":
        raise Unwanted(f"its configuration asks to build {_short(str(value))}")
    yield from _settings(str(key), value, holder)


@functools.lru_cache(maxsize=1000)  # a list may hold one text very often
def is_code(text: str) -> bool:
    """Whether a text does anything if Python evaluates it, or takes memory: numbers, tuples and sums do not.

    Of products those are let through that repeat a list a few times, as "[(512, 3)] * 20".
    """
    if len(text) > _LONGEST:
        return True
    if text.isidentifier():
        return False
    try:
        nodes = list(ast.walk(ast.parse(text.lstrip(" \t"), mode="eval")))
    except (SyntaxError, ValueError):
        return False  # nor could fairseq evaluate it
    except (RecursionError, MemoryError):
        return True
    sums = [node for node in nodes if isinstance(node, ast.BinOp)]
    factors = [_factor(node) for node in sums if isinstance(node.op, ast.Mult)]
    return (
        any(isinstance(node, _OPERATIONS) for node in nodes)
        or any(isinstance(_constant(side), (str, bytes)) for node in sums for side in (node.left, node.right))
        or len(text) * math.prod(factors) > _MOST_CHARACTERS
    )


def _factor(product: ast.BinOp) -> float:
    """How often it repeats what it multiplies, at most: a constant beside the sign; without one nobody knows."""
    sides = [_constant(product.left), _constant(product.right)]
    numbers = [min(max(abs(side), 1), _MOST_CHARACTERS) for side in sides if isinstance(side, (int, float))]
    return max(numbers, default=math.inf)


def _constant(node: ast.expr) -> Any:
    return node.value if isinstance(node, ast.Constant) else None


def _short(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
