"""Puts a function of ours around one of fairseq's, which has no extension point there."""

from __future__ import annotations

import functools
from collections.abc import Callable


def wrap(owner: object, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace owner.name by wrapper(owner.name), once however often it is asked for.

    Args:
        owner: a module or a class.
        name: of the function, or of the class's static method.
        wrapper: takes the original, which stays reachable as `__wrapped__`.
    """
    original = getattr(owner, name)
    if hasattr(original, "mended_by"):
        return
    replacement = functools.wraps(original)(wrapper(original))
    replacement.mended_by = __package__
    setattr(owner, name, staticmethod(replacement) if isinstance(owner, type) else replacement)
