r"""Moses' normalize-punctuation.perl and remove-non-printing-char.perl in Python, byte for byte.

sacremoses has the rules; they are run here on the line with its line feed, as in perl (so that a closing '."' becomes
'".'), with \d and \s of ASCII only, since that script reads bytes, and only where the text they need is in the line.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_GROUP = re.compile(r"(?<!\\)\(.*?(?<!\\)\)")
_SPACE_RUN = " +"
_CARRIAGE_RETURN = r"\r"  # a line that was read has none (clean.py)


class Normaliser:
    """Quotation marks, dashes and spaces as the scripts leave them; characters of Unicode's class C become a space.

    Args:
        lang: two-letter code.
    """

    def __init__(self, lang: str) -> None:
        import regex  # imported here, as sacremoses, because a run with nothing to do does not need them
        from sacremoses import MosesPunctNormalizer

        rules = MosesPunctNormalizer(lang, perl_parity=True).substitutions
        self._rules = [_prepare(*rule) for rule in rules if rule[0] != _CARRIAGE_RETURN]
        self._without_shape = regex.compile(r"\p{C}")

    def __call__(self, line: str) -> str:
        """Equal to `normalize-punctuation.perl LANG | remove-non-printing-char.perl` (both of version 34452895f)."""
        line += "\n"
        for needs, apply, what, replacement in self._rules:
            if needs in line:
                line = apply(line, what, replacement)
        line = line[:-1]
        return line if line.isprintable() else self._without_shape.sub(" ", line)


def _prepare(pattern: str, replacement: str) -> tuple[str, Callable[[str, object, str], str], object, str]:
    """What a line needs for a rule to do anything, and how to apply the rule."""
    fixed = _GROUP.sub("", pattern)
    needs = "  " if pattern == _SPACE_RUN else re.sub(r"\\(.)", r"\1", fixed)
    if fixed == pattern != _SPACE_RUN:
        return needs, str.replace, needs, replacement
    return needs, _substitute, re.compile(pattern, re.ASCII), replacement


def _substitute(line: str, pattern: re.Pattern[str], replacement: str) -> str:
    return pattern.sub(replacement, line)
