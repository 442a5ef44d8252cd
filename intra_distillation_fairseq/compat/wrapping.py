"""Puts a function of ours around one of fairseq's, which has no extension point there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

# What has been wrapped: owner, name, mend.
_WRAPPED: list[tuple[object, str, tuple[str, str]]] = []


def wrap(owner: object, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace owner.name by wrapper(owner.name), once however often it is asked for. Others may have wrapped it before.

    Args:
        owner: a module or a class.
        name: of the function, or of the class's method.
        wrapper: takes the original, which stays reachable as `__wrapped__`.
    """
    original = getattr(owner, name)
    mends, mend = getattr(original, "mended_by", ()), (wrapper.__module__, wrapper.__qualname__)
    if mend in mends:
        return
    replacement = functools.wraps(original)(wrapper(original))
    replacement.mended_by = (*mends, mend)
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(replacement) if is_static else replacement)
    _WRAPPED.append((owner, name, mend))


def in_place() -> dict[str, bool]:
    """For the function of each mend that wraps: False where somebody has since replaced what it has wrapped."""
    found: dict[str, bool] = {}
    for owner, name, mend in _WRAPPED:
        function, stands = mend[1].partition(".")[0], mend in getattr(getattr(owner, name), "mended_by", ())
        found[function] = found.get(function, True) and stands
    return found
