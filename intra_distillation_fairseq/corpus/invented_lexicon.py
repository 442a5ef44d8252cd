"""The invented language's words and their forms: stems drawn from a seed, endings from fixed tables.

Only `Random.random()` is used, and only on sequences: it is the one method of Python's generator whose values are
promised to stay the same in every version, and no set or hash decides an order. So a seed names one language for good.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import TypeVar

from intra_distillation_fairseq.corpus import invented_words as words

T = TypeVar("T")

GENDERS = ("m", "f", "n")
CASES = ("nom", "acc", "dat", "gen")
NOUN_ENDINGS = {
    ("m", "sg"): ("", "an", "um", "os"),
    ("m", "pl"): ("i", "in", "im", "is"),
    ("f", "sg"): ("a", "e", "eu", "es"),
    ("f", "pl"): ("ä", "än", "äm", "äs"),
    # Neuter nouns do not tell subject from object: there the verb's ending or the order has to.
    ("n", "sg"): ("o", "o", "u", "or"),
    ("n", "pl"): ("ö", "ö", "öm", "ös"),
}
AGREEMENT_VOWELS = {"m": "e", "f": "a", "n": "o"}
AGREEMENT_CONSONANTS = {"nom": "k", "acc": "t", "dat": "p", "gen": "s"}
PRESENT_ENDINGS = {
    (1, "sg"): "am",
    (2, "sg"): "es",
    (3, "sg"): "it",
    (1, "pl"): "omu",
    (2, "pl"): "etu",
    (3, "pl"): "ant",
}
PAST_PERSONS = {(1, "sg"): "em", (2, "sg"): "es", (3, "sg"): "", (1, "pl"): "emu", (2, "pl"): "etu", (3, "pl"): ""}
PAST_GENDERS = {"m": "", "f": "a", "n": "o"}
DETERMINER_STEMS = {"def": "h", "indef": "un", "this": "zir", "own": "soj", "relative": "k"}
PRONOUN_STEMS = {(1, "sg"): "mi", (2, "sg"): "ti", (1, "pl"): "nu", (2, "pl"): "vu", (3, "pl"): "ru"}
NAME_MARKERS = {"nom": "", "acc": "an", "dat": "um", "gen": "os"}
PREFIXES = ("ka", "pel", "ru")
FUTURE, BE, NOT, VERY, QUESTION, THAT = "veg", "b", "ni", "trü", "li", "daz"

_ONSETS = [
    "b",
    "d",
    "f",
    "g",
    "h",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "dr",
    "gr",
    "kl",
    "kr",
    "pl",
    "pr",
    "st",
    "tr",
    "schw",
]
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "ä", "ö", "ü", "ei", "au"]
_CODAS = ["l", "m", "n", "r", "s", "t", "k", "l", "n", "r", "nd", "rs", "st", "rk", "ß"]
_NAME_SYLLABLES = [
    "ka",
    "ri",
    "mo",
    "ven",
    "ta",
    "lis",
    "dor",
    "na",
    "el",
    "bra",
    "so",
    "min",
    "tu",
    "hal",
    "per",
    "vi",
    "lo",
    "ran",
    "ge",
    "fi",
    "zu",
    "mar",
    "ko",
    "ste",
]


def pick(rng: Random, items: Sequence[T]) -> T:
    """One of `items`, all equally likely."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """A copy of `items` in a random order (Random.shuffle may change between versions of Python)."""
    rest, order = list(items), []
    while rest:
        order.append(rest.pop(int(rng.random() * len(rest))))
    return order


class Ranked(Sequence[T]):
    """Items of falling frequency, the n-th about as likely as 1/(n+3), as words of real text are."""

    def __init__(self, items: Sequence[T]):
        self._items = tuple(items)
        self._cumulative = list(accumulate(10000 // (rank + 4) for rank in range(len(self._items))))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index):
        return self._items[index]

    def draw(self, rng: Random) -> T:
        return self._items[bisect(self._cumulative, int(rng.random() * self._cumulative[-1]))]


@dataclass(frozen=True)
class Noun:
    stem: str
    gender: str
    singular: str
    plural: str
    kind: str


@dataclass(frozen=True)
class Verb:
    """`senses`: the English (base, past, -ing) for each kind of object; ("", forms) where there is no object."""

    prefix: str
    stem: str
    senses: tuple[tuple[str, tuple[str, str, str]], ...]

    def english(self, kind: str = "") -> tuple[str, str, str]:
        return dict(self.senses)[kind]


@dataclass(frozen=True)
class Adjective:
    """`senses`: the English word for each kind of noun; "" stands for every kind."""

    stem: str
    senses: tuple[tuple[str, str], ...]

    def english(self, kind: str) -> str:
        senses = dict(self.senses)
        return senses.get(kind) or senses[""]


def decline(noun: Noun, number: str, case: str) -> str:
    """The noun in one case and number."""
    return noun.stem + NOUN_ENDINGS[noun.gender, number][CASES.index(case)]


def agree(stem: str, gender: str, number: str, case: str) -> str:
    """An adjective or determiner in the form that its noun asks for; neuter has one form for subject and object."""
    consonant = AGREEMENT_CONSONANTS["nom" if gender == "n" and case == "acc" else case]
    return stem + AGREEMENT_VOWELS[gender] + consonant + ("i" if number == "pl" else "")


def conjugate(stem: str, tense: str, person: int, number: str, gender: str) -> str:
    """The finite form: the present shows person and number, the past shows gender too, as it was once an adjective."""
    if tense == "present":
        return stem + PRESENT_ENDINGS[person, number]
    return stem + "il" + ("i" if number == "pl" else PAST_GENDERS[gender]) + PAST_PERSONS[person, number]


def pronoun(person: int, number: str, gender: str, case: str) -> str:
    stem = PRONOUN_STEMS.get((person, number)) or "l" + AGREEMENT_VOWELS[gender]
    return stem + AGREEMENT_CONSONANTS[case]


def english_plural(noun: str) -> str:
    """The regular plural."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def third_person(verb: str) -> str:
    """The regular third person singular: "goes", "cries", "sees"."""
    return verb + "es" if verb.endswith("o") else english_plural(verb)


def _verb_forms(text: str) -> tuple[str, str, str]:
    base, past, *ing = text.split()
    return base, past, ing[0] if ing else base + "ing"


class Lexicon:
    """All words of the language that a seed names, and who is called what in it."""

    def __init__(self, seed: int):
        self._rng = rng = Random(seed)
        self._stems: set[str] = set()
        self.nouns = self._nouns()
        by_word = {noun.singular: noun for kind in self.nouns.values() for noun in kind}
        self.modifiers = Ranked(shuffled(rng, [by_word[word] for word in words.COMPOUND_MODIFIERS]))
        self._verbs()
        self.adjectives = Ranked(shuffled(rng, self._adjectives()))
        self.manners = Ranked([(self._stem(1), word) for word in words.MANNERS])
        self.times = Ranked(shuffled(rng, [(self._stem(1), *row) for row in words.TIMES]))
        self.prepositions = Ranked([(self._stem(1), *row) for row in words.PREPOSITIONS])
        self.in_year = self._stem(1)
        self.conjunctions = Ranked([(self._stem(1), word) for word in words.CONJUNCTIONS])
        self.coordinators = Ranked([(self._stem(1), word) for word in words.COORDINATORS])
        self.question_words = Ranked([(self._stem(1), word) for word in words.QUESTION_WORDS])
        self._units = [self._stem(1) for _ in words.UNITS]
        self._tens = [self._stem(1) for _ in words.TENS]
        self._teens = [self._stem(1) for _ in words.TEENS]
        self.names = Ranked([self.new_name(rng) for _ in range(120)])

    def _stem(self, syllables: int = 0) -> str:
        """A new stem; of one or two syllables where nothing is asked."""
        rng = self._rng
        while True:
            count = syllables or (1 if rng.random() < 0.3 else 2)
            stem = "".join(pick(rng, _ONSETS) + pick(rng, _VOWELS) for _ in range(count)) + pick(rng, _CODAS)
            if stem not in self._stems:
                self._stems.add(stem)
                return stem

    def _nouns(self) -> dict[str, Ranked[Noun]]:
        shared = {second: first for first, second in words.SHARED_NOUN_STEMS}
        rows = []
        for kind, text in words.NOUNS.items():
            for entry in text.split():
                entry, _, gender = entry.partition(":")
                singular, _, plural = entry.partition("/")
                if not gender:
                    gender = pick(self._rng, ("m", "f") if kind == "person" else GENDERS)
                rows.append(Noun(self._stem(), gender, singular, plural or english_plural(singular), kind))
        stems = {noun.singular: (noun.stem, noun.gender) for noun in rows}
        nouns: dict[str, list[Noun]] = {kind: [] for kind in words.NOUNS}
        for noun in rows:
            stem, gender = stems[shared.get(noun.singular, noun.singular)]
            nouns[noun.kind].append(Noun(stem, gender, noun.singular, noun.plural, noun.kind))
            if noun.singular in words.DOUBLE_NOUNS:
                other = {"m": "f", "f": "m"}.get(gender, "n") if noun.kind == "person" else pick(self._rng, GENDERS)
                nouns[noun.kind].append(Noun(self._stem(), other, noun.singular, noun.plural, noun.kind))
        return {kind: Ranked(shuffled(self._rng, entries)) for kind, entries in nouns.items()}

    def _verbs(self) -> None:
        """Fills every list of verbs; two of five share the stem of an earlier verb and differ by a separable prefix."""
        roots: list[str] = []
        used: set[tuple[str, str]] = set()

        def make(senses: list[tuple[str, str]]) -> Verb:
            if roots and self._rng.random() < 0.4:
                form = pick(
                    self._rng, [(prefix, root) for prefix in PREFIXES for root in roots if (prefix, root) not in used]
                )
            else:
                form = ("", self._stem(1))
                roots.append(form[1])
            used.add(form)
            return Verb(
                *form, tuple((kind, _verb_forms(text)) for text, kinds in senses for kind in kinds.split() or [""])
            )

        def ranked(rows: Sequence[list[tuple[str, str]]]) -> Ranked[Verb]:
            return Ranked([make(row) for row in shuffled(self._rng, rows)])

        self.transitive = ranked([list(row) for row in words.TRANSITIVE])
        self.ditransitive = ranked([[(verb, words.DITRANSITIVE_KINDS)] for verb in words.DITRANSITIVE])
        self.intransitive, self.motion, self.locative, self.saying, self.quoting = (
            ranked([[(verb, "")] for verb in table])
            for table in (words.INTRANSITIVE, words.MOTION, words.LOCATIVE, words.SAYING, words.QUOTING)
        )

    def _adjectives(self) -> list[Adjective]:
        plain = [Adjective(self._stem(1), (("", word),)) for word in words.ADJECTIVES]
        for first, first_kinds, second, second_kinds in words.SHARED_ADJECTIVES:
            senses = [(kind, first) for kind in first_kinds.split()] + [(kind, second) for kind in second_kinds.split()]
            plain.append(Adjective(self._stem(1), tuple(senses)))
        return plain

    @staticmethod
    def new_name(rng: Random) -> tuple[str, str]:
        """A name and the gender of who bears it; women's names end in -a, as in many languages."""
        gender = pick(rng, ("m", "f"))
        syllables = [pick(rng, _NAME_SYLLABLES) for _ in range(2 if rng.random() < 0.6 else 3)]
        return "".join(syllables).capitalize() + ("ra" if gender == "f" else "n"), gender

    def number(self, value: int) -> tuple[str, str]:
        """A number from 1 to 12 or 20 to 99 in both languages; "three-and-twenty" in the invented one."""
        if value < 10:
            return self._units[value - 1], words.UNITS[value - 1]
        if value < 13:
            return self._teens[value - 10], words.TEENS[value - 10]
        ten, unit = divmod(value, 10)
        if unit == 0:
            return self._tens[ten - 2], words.TENS[ten - 2]
        return self._units[unit - 1] + "o" + self._tens[ten - 2], f"{words.TENS[ten - 2]}-{words.UNITS[unit - 1]}"
