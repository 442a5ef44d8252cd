"""Expected values are what tokenizer.perl, detokenizer.perl and lowercase.perl of Moses print."""

from __future__ import annotations

import pytest

from intra_distillation_fairseq.corpus.moses import Moses, lowercase


@pytest.mark.parametrize(
    ("lang", "line", "expected"),
    [
        # the dot that ends the line is always a token of its own (Moses since November 2018)
        ("en", "He lives in the U.S.", "He lives in the U.S ."),
        ("en", "Dr. No met Mr.", "Dr. No met Mr ."),
        ("de", "Das war Nr. 3, z.B. bis 2.", "Das war Nr. 3 , z.B. bis 2 ."),
        ("en", "Wait...", "Wait ..."),
        ("en", ".", "."),
        # Han and Hangul characters are letters
        ("en", "The word 漢字 means", "The word 漢字 means"),
        ("de", "한국 liegt", "한국 liegt"),
        # marks that Unicode does not count among the letters are split off
        ("en", "क्ष", "क ् ष"),
        ("en", "It's 5,300 or 1990's \"so\"", "It &apos;s 5,300 or 1990 &apos;s &quot; so &quot;"),
        ("it", "l'amico", "l&apos; amico"),
        ("nl", "foto's", "foto &apos; s"),
        ("en", "R&amp;D [x] a|b", "R &amp; amp ; D &#91; x &#93; a &#124; b"),
        ("he", "שלום, עולם.", "שלום , עולם ."),
        ("en", "the end 3,", "the end 3 ,"),
    ],
)
def test_tokenise(lang, line, expected):
    assert Moses(lang).tokenise(line) == expected


@pytest.mark.parametrize(
    ("lang", "line", "expected", "detokenised"),
    [
        ("en", "a well-known U.S.-based 5-year-old", "a well @-@ known U.S.-based 5 @-@ year @-@ old", None),
        ("de", "E-Mail-Adresse - x-", "E @-@ Mail @-@ Adresse - x-", None),
        ("en", "a--b -c- é-ü 漢-字", "a--b -c- é @-@ ü 漢 @-@ 字", None),
        ("de", "Nord-/Süd", "Nord- / Süd", "Nord- / Süd"),
    ],
)
def test_aggressive(lang, line, expected, detokenised):
    """tokenizer.perl -a; the detokeniser joins the words again."""
    moses = Moses(lang, aggressive=True)
    assert moses.tokenise(line) == expected
    assert moses.detokenise(expected) == (detokenised or line)


@pytest.mark.parametrize(
    ("lang", "line", "expected"),
    [
        # between plain words nothing changes, beside others the rules of single words hold
        (
            "en",
            "the dogs &apos; bowls &quot; big small &quot; 漢字 is x &apos;s y",
            "the dogs' bowls \"big small\" 漢字 is x's y",
        ),
        ("de", "漢字 a b ( c d ) . „ e f “ g", "漢字 a b (c d). „e f“ g"),
        ("fr", "ーe j n&apos; t l&apos; ami", "ーe j n't l'ami"),
        ("it", "漢a n&apos; t", "漢a n't"),
        ("en", "it &apos;s r &amp; amp ; d , ok ?", "it's r & amp; d, ok?"),
        ("en", "&quot; so &quot; ( he said ) $ 5", '"so" (he said) $5'),
        ("it", "l&apos; amico", "l'amico"),
        ("de", "a &#124; b &lt; c &#91; d &#93;", "a | b < c [d]"),
        ("en", "漢字 漢字 a", "漢字漢字 a"),
        ("en", "₿ 5", "₿5"),
    ],
)
def test_detokenise(lang, line, expected):
    assert Moses(lang).detokenise(line) == expected


def test_lowercase_knows_no_final_sigma():
    assert lowercase("ΟΔΟΣ İÄẞ") == "οδοσ i̇äß"
