"""Expected values are what normalize-punctuation.perl | remove-non-printing-char.perl of Moses print."""

from __future__ import annotations

import pytest

from intra_distillation_fairseq.corpus.punctuation import Normaliser

NBSP = "\u00a0"


@pytest.mark.parametrize(
    ("lang", "line", "expected"),
    [
        # quotation marks: curly, low, guillemets with and without no-break spaces, two apostrophes
        ("de", "„Ja“, sagte sie.", '"Ja", sagte sie.'),
        ("en", "“Yes,” she said.", '"Yes," she said.'),
        ("de", f"«{NBSP}Bonjour{NBSP}» und »so« und {NBSP}«{NBSP}x", '"Bonjour" und "so" und "x'),
        ("en", "``quoted'' and ''this'' `a´ ´´b´´ ‚c‘", ' " quoted " and " this " \'a\' "b" \'c\''),
        ("en", "the 1990’s ‘new’ rock’n’roll", 'the 1990"s \'new" rock\'n"roll'),
        # punctuation beside a closing quotation mark; at the end of the line only because of the line feed
        ("de", "Er sagte: „Das ist gut.“", 'Er sagte: "Das ist gut".'),
        ("de", 'Er rief: "Komm." Dann ging er.', 'Er rief: "Komm". Dann ging er.'),
        ("de", 'Er rief "komm,"', 'Er rief "komm",'),
        ("de", '...." x .."<b> ."', '".... x .."<b> ".'),
        ("en", 'She said "no", then "yes".', 'She said "no," then "yes."'),
        # numbers and no-break spaces; digits of ASCII only, as the script reads bytes
        ("de", f"1.000 und 1{NBSP}000 Euro", "1.000 und 1,000 Euro"),
        ("en", f"1,000 and 1{NBSP}000 euros", "1,000 and 1.000 euros"),
        ("de", f"5 % und 5{NBSP}% und ٣ %", "5% und 5% und ٣ %"),
        ("en", f"no{NBSP}break and  two  spaces", f"no{NBSP}break and two spaces"),
        (
            "de",
            f"Wie{NBSP}? So{NBSP}! Nr.{NBSP}5,{NBSP}10{NBSP}cm 20{NBSP}ºC nº{NBSP}3{NBSP}: x{NBSP}; y",
            f"Wie? So! Nr.{NBSP}5, 10 cm 20 ºC nº 3: x; y",
        ),
        # dashes, dots, brackets, spaces before punctuation
        ("de", "Berlin–Hamburg — hin und zurück…", "Berlin-Hamburg - hin und zurück..."),
        ("en", "a ( b ) c (d), e(f)g ( h ) .", "a (b) c (d), e (f) g (h)."),
        ("en", "wait : what ; now !", "wait: what; now !"),
        # characters without a shape: soft hyphen, zero-width space, byte order mark, control, private use, tab
        ("de", "Haus\u00adtür \u200bmit\ufeff\x07 Zeichen\ue000\t.", "Haus tür  mit   Zeichen  ."),
        ("en", " lead and trail  ", " lead and trail "),
        ("en", "漢字「x」", "漢字「x」"),
        ("en", "", ""),
    ],
)
def test_as_moses(lang, line, expected):
    assert Normaliser(lang)(line) == expected


def test_no_rule_is_lost_to_its_shortcut():
    """Every rule applied to every line, as sacremoses does, gives the same."""
    import re

    from sacremoses import MosesPunctNormalizer

    text = "((a )b) . : ; % `x` '' „“”–—´´ a‘b a’b ‘‚’… « » 3 % 4\u00a0% nº\u00a0\u00a0:\u00a0ºC\u00a0cm\u00a0?\u00a0!\u00a0;,\u00a0"
    pieces = [text[i:j] for i in range(0, len(text), 2) for j in (i + 1, i + 3, i + 7, i + 20)] + [text]
    for lang in ("de", "en"):
        rules = MosesPunctNormalizer(lang, perl_parity=True).substitutions
        for piece in pieces:
            expected = piece + '."\n'
            for pattern, replacement in rules:
                expected = re.sub(pattern, replacement, expected, flags=re.ASCII)
            assert Normaliser(lang)(piece + '."') + "\n" == expected
