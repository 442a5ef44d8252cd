r"""Moses' tokenizer.perl, detokenizer.perl and lowercase.perl in Python, byte for byte.

sacremoses does the work; two of its traits are replaced here, because they differ from Moses at its last version:

- Its lists of letters and digits lack whatever Unicode's tables give as ranges (every Han and Hangul character, so that
  it splits Chinese words) and have some marks too many. Perl's classes are used instead.
- Since November 2018 tokenizer.perl makes a token of the dot at the end of every line; sacremoses still keeps it on an
  abbreviation ("in the U.S.").
"""

from __future__ import annotations

import re
from functools import lru_cache

# What perl's \p{IsAlpha}, \p{IsAlnum}, \p{IsN} and \p{IsLower} match.
_ALPHA = r"\p{Alphabetic}"
_ALNUM = _ALPHA + r"\p{Nd}"
_NUMBER = r"\p{N}"
_LOWER = r"\p{Lowercase}"

_FINAL_DOT = re.compile(r"([^ .])\.$")


class Moses:
    """Tokenises and detokenises one language as the Moses scripts do (non-aggressive, with XML escapes).

    Args:
        lang: two-letter code; a language without a list of abbreviations takes the English one, as in Moses.
    """

    def __init__(self, lang: str) -> None:
        tokenizer, detokenizer = _classes()
        self._tokenizer = tokenizer(lang=lang)
        self._detokenizer = detokenizer(lang=lang)

    def tokenise(self, line: str) -> str:
        """Equal to `tokenizer.perl -l LANG` of Moses at its last version (34452895f)."""
        return _FINAL_DOT.sub(r"\1 .", self._tokenizer.tokenize(line, return_str=True))

    def detokenise(self, line: str) -> str:
        """Equal to `detokenizer.perl -l LANG`."""
        return self._detokenizer.detokenize(line.split(" "))


@lru_cache(maxsize=1)
def _classes() -> tuple[type, type]:
    """sacremoses' tokeniser and detokeniser with Perl's character classes."""
    # Imported here: they take a while to load and a run with nothing to do does not need them.
    import regex  # which sacremoses requires
    from sacremoses import MosesDetokenizer, MosesTokenizer

    any_alpha, all_lower = regex.compile(f"[{_ALPHA}]"), regex.compile(f"[{_LOWER}]*")

    def rule(pattern: str, replacement: str) -> tuple[regex.Pattern, str]:
        return regex.compile(pattern), replacement

    class Tokenizer(MosesTokenizer):
        PAD_NOT_ISALNUM = rule(rf"([^{_ALNUM}\s\.'\`\,\-])", r" \1 ")
        COMMA_SEPARATE_1 = rule(f"([^{_NUMBER}])[,]", r"\1 , ")
        COMMA_SEPARATE_2 = rule(f"[,]([^{_NUMBER}])", r" , \1")
        COMMA_SEPARATE_3 = rule(f"([{_NUMBER}])[,]$", r"\1 , ")
        ENGLISH_SPECIFIC_APOSTROPHE = [
            rule(f"([^{_ALPHA}])[']([^{_ALPHA}])", r"\1 ' \2"),
            rule(f"([^{_ALPHA}{_NUMBER}])[']([{_ALPHA}])", r"\1 ' \2"),
            rule(f"([{_ALPHA}])[']([^{_ALPHA}])", r"\1 ' \2"),
            rule(f"([{_ALPHA}])[']([{_ALPHA}])", r"\1 '\2"),
            rule(f"([{_NUMBER}])[']([s])", r"\1 '\2"),
        ]
        FR_IT_SPECIFIC_APOSTROPHE = [
            rule(f"([^{_ALPHA}])[']([^{_ALPHA}])", r"\1 ' \2"),
            rule(f"([^{_ALPHA}])[']([{_ALPHA}])", r"\1 ' \2"),
            rule(f"([{_ALPHA}])[']([^{_ALPHA}])", r"\1 ' \2"),
            rule(f"([{_ALPHA}])[']([{_ALPHA}])", r"\1' \2"),
        ]

        def isanyalpha(self, text: str) -> bool:
            return any_alpha.search(text) is not None

        def islower(self, text: str) -> bool:
            return all_lower.fullmatch(text) is not None

    class Detokenizer(MosesDetokenizer):
        IS_CURRENCY_SYMBOL = regex.compile(r"^[\p{Sc}\(\[\{\¿\¡]+$")
        IS_ENGLISH_CONTRACTION = regex.compile(f"^['][{_ALPHA}]")
        IS_FRENCH_CONRTACTION = regex.compile(f"[{_ALPHA}][']$")
        STARTS_WITH_ALPHA = regex.compile(f"^[{_ALPHA}]")

    return Tokenizer, Detokenizer


def lowercase(line: str) -> str:
    """Equal to lowercase.perl, which knows no final sigma."""
    return line.replace("\u03a3", "\u03c3").lower()
