r"""Moses' tokenizer.perl, detokenizer.perl and lowercase.perl in Python, byte for byte.

sacremoses does the work; two of its traits are replaced here, because they differ from Moses at its last version:

- Its lists of letters and digits lack whatever Unicode's tables give as ranges (every Han and Hangul character, so that
  it splits Chinese words) and have some marks too many. Perl's classes are used instead.
- Since November 2018 tokenizer.perl makes a token of the dot at the end of every line; sacremoses still keeps it on an
  abbreviation ("in the U.S.").

Most of its rules concern few lines and few words. They are tried only where the text they need is there, which leaves
the output as it is and takes half of the time.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

# What perl's \p{IsAlpha}, \p{IsAlnum}, \p{IsN} and \p{IsLower} match.
_ALPHA = r"\p{Alphabetic}"
_ALNUM = _ALPHA + r"\p{Nd}"
_NUMBER = r"\p{N}"
_LOWER = r"\p{Lowercase}"

_FINAL_DOT = re.compile(r"([^ .])\.$")
# In the order of the perl script: the & comes first.
_ESCAPES = {
    "&": "&amp;",
    "|": "&#124;",
    "<": "&lt;",
    ">": "&gt;",
    "'": "&apos;",
    '"': "&quot;",
    "[": "&#91;",
    "]": "&#93;",
}

# A space that the detokeniser leaves in any case, and what stands for it meanwhile: the tokeniser drops this character.
_SPACE_BETWEEN_WORDS = re.compile("(?<=[A-Za-z\u00c0-\u024f]) (?=[A-Za-z\u00c0-\u024f])")
_JOINED = "\0"
_LOOK_AT_SINGLE_WORDS = ("cs", "fi", "fr", "ga", "it")  # languages with rules about words beside ":", "-" or "'"


class Moses:
    """Tokenises and detokenises one language as the Moses scripts do (with XML escapes).

    Args:
        lang: two-letter code; a language without a list of abbreviations takes the English one, as in Moses.
        aggressive: split every hyphen between letters ("well @-@ known"), as `tokenizer.perl -a`; the detokeniser joins
            it again.
    """

    def __init__(self, lang: str, aggressive: bool = False) -> None:
        tokenizer, detokenizer = _classes()
        self._tokenizer = tokenizer(lang=lang)
        self._detokenizer = detokenizer(lang=lang)
        self._aggressive = aggressive
        self._join_words = lang not in _LOOK_AT_SINGLE_WORDS

    def tokenise(self, line: str) -> str:
        """Equal to `tokenizer.perl -l LANG` of Moses at its last version (34452895f)."""
        tokens = self._tokenizer.tokenize(line, aggressive_dash_splits=self._aggressive, return_str=True)
        return _FINAL_DOT.sub(r"\1 .", tokens)

    def detokenise(self, line: str) -> str:
        """Equal to `detokenizer.perl -l LANG`."""
        if self._join_words and _JOINED not in line:  # few long words instead of many short ones
            line = _SPACE_BETWEEN_WORDS.sub(_JOINED, line)
            return self._detokenizer.detokenize(line.split(" ")).replace(_JOINED, " ")
        return self._detokenizer.detokenize(line.split(" "))


class _Rule:
    """A substitution that is tried only on lines that have the text it needs."""

    def __init__(self, pattern: Any, needs: str) -> None:
        self._sub, self._needs = pattern.sub, needs

    def sub(self, replacement: str, line: str) -> str:
        return self._sub(replacement, line) if self._needs in line else line


class _SingleSpaces:
    r"""As `\s+` -> " " on a line whose ends are stripped afterwards."""

    def sub(self, replacement: str, line: str) -> str:
        return replacement.join(line.split())


@lru_cache(maxsize=1)
def _classes() -> tuple[type, type]:
    """sacremoses' tokeniser and detokeniser with Perl's character classes."""
    # Imported here: they take a while to load and a run with nothing to do does not need them.
    import regex  # which sacremoses requires
    from sacremoses import MosesDetokenizer, MosesTokenizer

    any_alpha, all_lower = regex.compile(f"[{_ALPHA}]"), regex.compile(f"[{_LOWER}]*")

    def rule(pattern: str, replacement: str, needs: str) -> tuple[_Rule, str]:
        return _Rule(regex.compile(pattern), needs), replacement

    class Tokenizer(MosesTokenizer):
        DEDUPLICATE_SPACE = _SingleSpaces(), " "
        # sacremoses' own takes hours on a line of a million "DOT": it looks for the end of the run from every one.
        MULTIDOT_MARKER = re.compile("(?<!DOT)(?:DOT)+MULTI")
        PAD_NOT_ISALNUM = regex.compile(rf"([^{_ALNUM}\s\.'\`\,\-])"), r" \1 "
        AGGRESSIVE_HYPHEN_SPLIT = rule(rf"([{_ALNUM}])\-(?=[{_ALNUM}])", r"\1 @-@ ", "-")
        COMMA_SEPARATE_1 = rule(f"([^{_NUMBER}])[,]", r"\1 , ", ",")
        COMMA_SEPARATE_2 = rule(f"[,]([^{_NUMBER}])", r" , \1", ",")
        COMMA_SEPARATE_3 = rule(f"([{_NUMBER}])[,]$", r"\1 , ", ",")
        ENGLISH_SPECIFIC_APOSTROPHE = [
            rule(f"([^{_ALPHA}])[']([^{_ALPHA}])", r"\1 ' \2", "'"),
            rule(f"([^{_ALPHA}{_NUMBER}])[']([{_ALPHA}])", r"\1 ' \2", "'"),
            rule(f"([{_ALPHA}])[']([^{_ALPHA}])", r"\1 ' \2", "'"),
            rule(f"([{_ALPHA}])[']([{_ALPHA}])", r"\1 '\2", "'"),
            rule(f"([{_NUMBER}])[']([s])", r"\1 '\2", "'"),
        ]
        FR_IT_SPECIFIC_APOSTROPHE = [
            rule(f"([^{_ALPHA}])[']([^{_ALPHA}])", r"\1 ' \2", "'"),
            rule(f"([^{_ALPHA}])[']([{_ALPHA}])", r"\1 ' \2", "'"),
            rule(f"([{_ALPHA}])[']([^{_ALPHA}])", r"\1 ' \2", "'"),
            rule(f"([{_ALPHA}])[']([{_ALPHA}])", r"\1' \2", "'"),
        ]

        def handles_nonbreaking_prefixes(self, text: str) -> str:
            # The list of abbreviations matters within a line only; the dot at its end is split by _FINAL_DOT.
            return super().handles_nonbreaking_prefixes(text) if ". " in text else text

        def escape_xml(self, text: str) -> str:
            for character, escape in _ESCAPES.items():
                text = text.replace(character, escape)
            return text

        def isanyalpha(self, text: str) -> bool:
            return any_alpha.search(text) is not None

        def islower(self, text: str) -> bool:
            return all_lower.fullmatch(text) is not None

    class Detokenizer(MosesDetokenizer):
        IS_CURRENCY_SYMBOL = regex.compile(r"^[\p{Sc}\(\[\{\¿\¡]+$")
        IS_ENGLISH_CONTRACTION = regex.compile(f"^['][{_ALPHA}]")
        IS_FRENCH_CONRTACTION = regex.compile(f"[{_ALPHA}][']$")
        STARTS_WITH_ALPHA = regex.compile(f"^[{_ALPHA}]")

        def unescape_xml(self, text: str) -> str:
            return super().unescape_xml(text) if "&" in text else text

    return Tokenizer, Detokenizer


def lowercase(line: str) -> str:
    """Equal to lowercase.perl, which knows no final sigma."""
    return line.replace("\u03a3", "\u03c3").lower()
