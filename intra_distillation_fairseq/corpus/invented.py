"""Sentences of an invented language and their English: no network, no licence, but real difficulty.

What a model has to learn: four cases, three genders and their agreement; dropped pronouns that only the verb's ending
names; a finite verb that stands second in a main clause, first in a question and last in a subordinate one; separable
prefixes that change a verb from the other end of the clause; objects in front, told apart by case alone; words whose
English depends on the object, the noun or the case; two words with one English; compounds; names, years and firms that
are copied; and, as in any real text, English synonyms that nobody can foresee.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random
from typing import Union

from intra_distillation_fairseq.corpus import invented_words as words
from intra_distillation_fairseq.corpus.invented_lexicon import (
    BE,
    DETERMINER_STEMS,
    FUTURE,
    NAME_MARKERS,
    NOT,
    QUESTION,
    THAT,
    VERY,
    Adjective,
    Lexicon,
    Noun,
    Ranked,
    Verb,
    agree,
    conjugate,
    decline,
    pick,
    pronoun,
    third_person,
)

FRAMES = Ranked(("transitive", "copula", "motion", "ditransitive", "locative", "intransitive"))
SUBJECT_PRONOUNS = {(1, "sg"): "I", (2, "sg"): "you", (1, "pl"): "we", (2, "pl"): "you", (3, "pl"): "they"}
OBJECT_PRONOUNS = {(1, "sg"): "me", (2, "sg"): "you", (1, "pl"): "us", (2, "pl"): "you", (3, "pl"): "them"}
POSSESSIVES = {(1, "sg"): "my", (2, "sg"): "your", (1, "pl"): "our", (2, "pl"): "your", (3, "pl"): "their"}
THIRD_SINGULAR = {"m": ("he", "him", "his"), "f": ("she", "her", "her"), "n": ("it", "it", "its")}


@dataclass(frozen=True)
class Pronoun:
    person: int
    number: str
    gender: str


@dataclass(frozen=True)
class Name:
    text: str
    gender: str
    person: int = 3
    number: str = "sg"


@dataclass(frozen=True)
class NounPhrase:
    noun: Noun
    number: str = "sg"
    determiner: str = "def"  # def, indef, this, own, or numeral
    numeral: int = 1
    adjectives: tuple[tuple[Adjective, str], ...] = ()  # with the English word chosen
    modifier: Noun | None = None
    owner: Name | NounPhrase | None = None
    relative: tuple[str, Clause] | None = None  # the role that the noun has in the clause, and the clause
    person: int = 3

    @property
    def gender(self) -> str:
        return self.noun.gender


Nominal = Union[Pronoun, Name, NounPhrase]


@dataclass(frozen=True)
class Clause:
    """One clause before it is put into words; `verb` is None in "X is old"."""

    subject: Nominal
    tense: str
    verb: Verb | None = None
    sense: str = ""
    progressive: bool = False
    negative: bool = False
    object: Nominal | None = None
    recipient: Nominal | None = None
    place: tuple[tuple[str, str, str], Nominal, str] | None = None  # preposition, what, case
    time: tuple[str, str] | None = None
    manner: tuple[str, str] | None = None
    predicate: tuple[Adjective, str, bool] | None = None  # adjective, its English, very
    front: str = "subject"  # what stands before the verb of a main clause


@dataclass(frozen=True)
class Sentence:
    source: str
    target: str
    clauses: tuple[Clause, ...] = field(default=(), repr=False)


class Grammar:
    """Draws sentences of the language that `seed` names."""

    def __init__(self, seed: int):
        self.lexicon = Lexicon(seed)
        self._rng = Random(seed + 1_000_003)  # so that a change of the lexicon does not shift what is said

    # ---- what is said ------------------------------------------------------------------------------------------

    def _chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def sentence(self) -> Sentence:
        """One sentence, of the kinds that talk is made of."""
        roll = self._rng.random()
        if roll < 0.36:
            return self._finish([self._clause()], self._statement)
        if roll < 0.52:
            return self._finish([self._clause(), self._clause(short=True)], self._subordination)
        if roll < 0.64:
            tense = pick(self._rng, ("past", "past", "present"))
            return self._finish([self._saying(self.lexicon.saying, tense), self._clause(short=True)], self._report)
        if roll < 0.74:
            return self._finish([self._clause(short=True), self._saying(self.lexicon.quoting, "past")], self._quotation)
        if roll < 0.88:
            return self._finish([self._clause(short=True)], self._question)
        return self._finish([self._clause(), self._clause(short=True)], self._coordination)

    def heading(self) -> Sentence:
        """A title: a name or a noun phrase with an owner, no verb."""
        phrase = replace(self._phrase(["idea", "text", "place"]), determiner="def", relative=None)
        name = self._name()
        source = f"{name.text}: {_join(self._source(phrase, 'nom'))}"
        return Sentence(_capital(source), f"{name.text}: {_join(self._english(phrase, 'subject', None))}")

    def _name(self) -> Name:
        """A name; one in six was never heard before and will hardly be heard again."""
        name, gender = self.lexicon.new_name(self._rng) if self._chance(0.16) else self.lexicon.names.draw(self._rng)
        return Name("Dr. " + name if self._chance(0.06) else name, gender)

    def _where(self, depth: int) -> Nominal:
        """A place, or now and then a firm, whose "&" is what makes archives escape their text."""
        if self._chance(0.05):
            return Name(" & ".join(self.lexicon.names.draw(self._rng)[0] for _ in range(2)), "n")
        return self._phrase(["place"], depth)

    def _pronoun(self, persons: tuple[int, ...] = (1, 2, 3)) -> Pronoun:
        person, number = pick(self._rng, persons), pick(self._rng, ("sg", "sg", "pl"))
        return Pronoun(person, number, pick(self._rng, ("m", "f") if person < 3 else ("m", "f", "n")))

    def _noun(self, kinds: list[str]) -> Noun:
        return self.lexicon.nouns[pick(self._rng, kinds)].draw(self._rng)

    def _synonym(self, word: str) -> str:
        return words.SYNONYMS[word] if word in words.SYNONYMS and self._chance(0.25) else word

    def _adjective(self, kind: str) -> tuple[Adjective, str]:
        while True:
            adjective = self.lexicon.adjectives.draw(self._rng)
            if {kind, ""} & set(dict(adjective.senses)):
                return adjective, self._synonym(adjective.english(kind))

    def _phrase(self, kinds: list[str], depth: int = 0, own: bool = False) -> NounPhrase:
        """A noun phrase of one of `kinds`; depth 0 may hold a relative clause; `own` allows "his, her, its"."""
        noun = self._noun(kinds)
        number = "sg" if noun.kind == "drink" or self._chance(0.7) else "pl"
        roll = self._rng.random()
        determiner, numeral = ("def", 1) if roll < 0.5 else ("indef", 1) if roll < 0.75 else ("this", 1)
        if own and roll > 0.7:
            determiner = "own"
        elif roll > 0.92 and noun.kind != "drink":
            determiner, number = "numeral", "pl"
            numeral = 2 + int(self._rng.random() * 11) if self._chance(0.7) else 20 + int(self._rng.random() * 80)
        if noun.kind == "drink" and determiner == "indef":
            determiner = "def"
        adjectives = tuple(self._adjective(noun.kind) for _ in range(1 if self._chance(0.36) else 0))
        modifier = None
        if noun.kind in words.COMPOUND_HEADS and self._chance(0.14):
            modifier = self.lexicon.modifiers.draw(self._rng)
        owner: Name | NounPhrase | None = None
        relative = None
        if determiner == "def" and depth < 2 and noun.kind != "person" and self._chance(0.16):
            owner = self._name() if self._chance(0.5) else self._phrase(["person"], depth=2)
        phrase = NounPhrase(noun, number, determiner, numeral, adjectives, modifier, owner)
        if depth == 0 and owner is None and self._chance(0.12):
            relative = self._relative(phrase)
        return replace(phrase, relative=relative)

    def _relative(self, head: NounPhrase) -> tuple[str, Clause]:
        """A short clause about `head`, which is its subject where it can act, else its object."""
        bare = NounPhrase(head.noun, head.number)
        tense = pick(self._rng, ("past", "past", "present"))
        if head.noun.kind in ("person", "animal") and self._chance(0.6):
            return "subject", self._transitive(bare, tense, depth=2)
        verbs = [verb for verb in self.lexicon.transitive if head.noun.kind in dict(verb.senses)]
        return "object", Clause(self._subject(depth=2), tense, pick(self._rng, verbs), head.noun.kind, object=bare)

    def _subject(self, depth: int = 0, speaker: bool = False) -> Nominal:
        roll = self._rng.random()
        if roll < 0.3:
            return self._pronoun()
        if roll < 0.5:
            return self._name()
        return self._phrase(["person"] if speaker or self._chance(0.75) else ["animal"], depth)

    def _transitive(self, subject: Nominal, tense: str, depth: int) -> Clause:
        verb = self.lexicon.transitive.draw(self._rng)
        kind = pick(self._rng, [kind for kind, _ in verb.senses])
        target: Nominal
        if kind == "person" and self._chance(0.4):
            target = self._name() if self._chance(0.6) else self._pronoun((3,) if subject.person == 3 else (1, 2, 3))
            if isinstance(target, Pronoun) and (target.person == subject.person or target.gender == "n"):
                target = Pronoun(3, "pl", "m")
        else:
            target = self._phrase([kind], depth, own=True)
        return Clause(subject, tense, verb, kind, object=target)

    def _saying(self, verbs: Ranked[Verb], tense: str) -> Clause:
        """Who says something, in a clause of its own."""
        return Clause(self._subject(1, speaker=True), tense, verbs.draw(self._rng), negative=self._chance(0.12))

    def _clause(self, short: bool = False) -> Clause:
        """A clause; `short` ones hold no relative clause and no time."""
        rng, lexicon, depth = self._rng, self.lexicon, 1 if short else 0
        subject = self._subject(2 if short else 1)
        tense = pick(rng, ("past", "past", "present", "future"))
        time, progressive = None, False
        if not short and self._chance(0.42):
            if self._chance(0.12):
                year = str(1900 + int(rng.random() * 120))
                time, tense = (f"{lexicon.in_year} {year}", f"in {year}"), "past"
            else:
                stem, english, wanted, progressive = lexicon.times.draw(rng)
                time, tense = (stem, english), wanted or tense
        frame = FRAMES.draw(rng)
        if frame == "copula" and not progressive:
            kind = pick(rng, list(lexicon.nouns))
            subject = self._phrase([kind], depth) if self._chance(0.7) else subject
            noun_kind = subject.noun.kind if isinstance(subject, NounPhrase) else "person"
            clause = Clause(subject, tense, predicate=(*self._adjective(noun_kind), self._chance(0.25)))
        elif frame == "transitive" or frame == "copula":
            clause = self._transitive(subject, tense, depth)
        elif frame == "ditransitive":
            verb = lexicon.ditransitive.draw(rng)
            kind = pick(rng, [kind for kind, _ in verb.senses])
            recipient = self._name() if self._chance(0.3) else self._phrase(["person"], 2, own=True)
            clause = Clause(subject, tense, verb, kind, object=self._phrase([kind], 1), recipient=recipient)
        elif frame == "intransitive":
            manner = lexicon.manners.draw(rng) if self._chance(0.5) else None
            clause = Clause(
                subject,
                tense,
                lexicon.intransitive.draw(rng),
                manner=(manner[0], self._synonym(manner[1])) if manner else None,
            )
        else:
            case = "acc" if frame == "motion" else "dat"
            place = (lexicon.prepositions.draw(rng), self._where(depth), case)
            clause = Clause(
                subject, tense, (lexicon.motion if frame == "motion" else lexicon.locative).draw(rng), place=place
            )
        if clause.verb and frame in ("transitive", "intransitive") and not short and self._chance(0.18):
            clause = replace(clause, place=(lexicon.prepositions.draw(rng), self._where(2), "dat"))
        fronts = (
            ["subject", "subject"] + ["object"] * (clause.object is not None) + ["time", "time"] * (time is not None)
        )
        return replace(clause, time=time, progressive=progressive, negative=self._chance(0.15), front=pick(rng, fronts))

    # ---- how a sentence is built -------------------------------------------------------------------------------

    def _finish(self, clauses: list[Clause], build) -> Sentence:
        source, target = build(*clauses)
        return Sentence(_capital(_join(source)), _capital(_join(target)), tuple(clauses))

    def _statement(self, clause: Clause) -> tuple[list[str], list[str]]:
        end = "!" if self._chance(0.06) else "."
        return self.source_clause(clause, "main") + [end], self.english_clause(clause) + [end]

    def _subordination(self, main: Clause, other: Clause) -> tuple[list[str], list[str]]:
        stem, english = self.lexicon.conjunctions.draw(self._rng)
        other_source = [stem, *self.source_clause(other, "subordinate")]
        other_target = [english, *self.english_clause(other)]
        if self._chance(0.4):  # the main clause then starts with its verb
            return (
                [*other_source, ",", *self.source_clause(main, "verb first"), "."],
                [*other_target, ",", *self.english_clause(main), "."],
            )
        return (
            [*self.source_clause(main, "main"), ",", *other_source, "."],
            [*self.english_clause(main), *other_target, "."],
        )

    def _report(self, speaker: Clause, said: Clause) -> tuple[list[str], list[str]]:
        source = [*self.source_clause(speaker, "main"), ",", THAT, *self.source_clause(said, "subordinate"), "."]
        return source, [*self.english_clause(speaker), "that", *self.english_clause(said), "."]

    def _quotation(self, said: Clause, speaker: Clause) -> tuple[list[str], list[str]]:
        source, target = self.source_clause(said, "main"), self.english_clause(said, spoken=True)
        return (
            ['"', _capital(source[0]), *source[1:], '"', ",", *self.source_clause(speaker, "verb first"), "."],
            ['"', _capital(target[0]), *target[1:], ",", '"', *self.english_clause(speaker), "."],
        )

    def _question(self, clause: Clause) -> tuple[list[str], list[str]]:
        source, target = self.source_clause(clause, "verb first"), self.english_clause(clause, question=True)
        if self._chance(0.4):
            stem, english = self.lexicon.question_words.draw(self._rng)
            return [stem, *source, "?"], [english, *target, "?"]
        return [*source, QUESTION, "?"], [*target, "?"]

    def _coordination(self, first: Clause, second: Clause) -> tuple[list[str], list[str]]:
        stem, english = self.lexicon.coordinators.draw(self._rng)
        return (
            [*self.source_clause(first, "main"), ",", stem, *self.source_clause(second, "main"), "."],
            [*self.english_clause(first), ",", english, *self.english_clause(second), "."],
        )

    # ---- the invented language ---------------------------------------------------------------------------------

    def _source(self, what: Nominal, case: str) -> list[str]:
        """A nominal in one case: determiner, compound, adjectives, owner, relative clause."""
        if isinstance(what, Pronoun):
            return [pronoun(what.person, what.number, what.gender, case)]
        if isinstance(what, Name):
            return [marker for marker in (NAME_MARKERS[case],) if marker] + [what.text]
        features = (what.gender, what.number, case)
        result = []
        if what.determiner == "numeral":
            result.append(self.lexicon.number(what.numeral)[0])
        elif what.determiner != "indef" or what.number == "sg":
            result.append(agree(DETERMINER_STEMS[what.determiner], *features))
        noun = decline(what.noun, what.number, case)
        result.append(f"{what.modifier.stem}es{noun}" if what.modifier else noun)
        result += [agree(adjective.stem, *features) for adjective, _ in what.adjectives]
        if what.owner:
            result += self._source(what.owner, "gen")
        if what.relative:
            role, clause = what.relative
            mark = agree(DETERMINER_STEMS["relative"], what.gender, what.number, "nom" if role == "subject" else "acc")
            result += [",", mark, *self.source_clause(clause, "subordinate", without=role), ","]
        return result

    def source_clause(self, clause: Clause, order: str, without: str = "") -> list[str]:
        """The clause in words.

        Args:
            clause: what to say.
            order: "main", "verb first" (questions, and after a subordinate clause) or "subordinate".
            without: the role that a relative mark already stands for, or "".
        """
        subject, features = clause.subject, (clause.subject.person, clause.subject.number, clause.subject.gender)
        prefix, stem = (clause.verb.prefix, clause.verb.stem) if clause.verb else ("", BE)
        if clause.tense == "future":
            finite, rest = [conjugate(FUTURE, "present", *features)], [prefix + stem + "ir"]
        elif clause.verb is None and clause.tense == "present":
            finite, rest = [], []  # "the house old": no word for "is"
        else:
            finite, rest = [conjugate(stem, clause.tense, *features)], [prefix] if prefix else []
        negation = [NOT] if clause.negative else []
        fields = {
            # A pronoun is dropped: the verb says who it is. Where there is no verb it has to be there.
            "subject": self._source(subject, "nom") if not isinstance(subject, Pronoun) or not finite else [],
            "time": [clause.time[0]] if clause.time else [],
            "recipient": self._source(clause.recipient, "dat") if clause.recipient else [],
            "manner": [clause.manner[0]] if clause.manner else [],
            "object": self._source(clause.object, "acc") if clause.object else [],
            "place": [clause.place[0][0], *self._source(clause.place[1], clause.place[2])] if clause.place else [],
            "predicate": self._predicate(clause),
        }
        if without:
            fields[without] = []
        if order == "subordinate":
            if clause.tense != "future" and prefix:
                finite, rest = [prefix + finite[0]], []
            return [word for words_ in fields.values() for word in words_] + negation + rest + finite
        front = fields.pop(clause.front) if order == "main" else []
        return [*front, *finite, *negation, *(word for words_ in fields.values() for word in words_), *rest]

    def _predicate(self, clause: Clause) -> list[str]:
        if not clause.predicate:
            return []
        adjective, _, very = clause.predicate
        return [VERY] * very + [agree(adjective.stem, clause.subject.gender, clause.subject.number, "nom")]

    # ---- English -----------------------------------------------------------------------------------------------

    def _english(self, what: Nominal, role: str, subject: Nominal | None) -> list[str]:
        """A nominal in English; `subject` is whose "own" means."""
        if isinstance(what, Pronoun):
            table, index = (SUBJECT_PRONOUNS, 0) if role == "subject" else (OBJECT_PRONOUNS, 1)
            return [table.get((what.person, what.number)) or THIRD_SINGULAR[what.gender][index]]
        if isinstance(what, Name):
            return [what.text]
        noun = [what.modifier.singular] if what.modifier else []
        noun.append(what.noun.singular if what.number == "sg" else what.noun.plural)
        noun = [word for _, word in what.adjectives] + noun
        if isinstance(what.owner, Name):
            noun = [what.owner.text + "'s", *noun]
        else:
            noun = self._determiner(what, noun[0], subject) + noun
        if isinstance(what.owner, NounPhrase):
            noun += ["of", *self._english(what.owner, "object", subject)]
        if what.relative:
            gap, clause = what.relative
            noun += ["who" if what.noun.kind == "person" else "that", *self.english_clause(clause, without=gap)]
        return noun

    def _determiner(self, what: NounPhrase, following: str, subject: Nominal | None) -> list[str]:
        if what.determiner == "own" and subject is not None:
            table = POSSESSIVES.get((subject.person, subject.number))
            return [table or THIRD_SINGULAR[subject.gender][2]]
        if what.determiner == "numeral":
            return [self.lexicon.number(what.numeral)[1]]
        if what.determiner == "this":
            return ["this" if what.number == "sg" else "these"]
        if what.determiner == "indef":
            return [] if what.number == "pl" else ["an" if following[0] in "aeiou" else "a"]
        return ["the"]

    def english_clause(
        self, clause: Clause, question: bool = False, spoken: bool = False, without: str = ""
    ) -> list[str]:
        """The clause in English.

        Args:
            clause: what to say.
            question: the auxiliary comes first.
            spoken: contract "did not" to "didn't".
            without: the role that "who" or "that" already stands for, or "".
        """
        subject = clause.subject
        third = (subject.person, subject.number) == (3, "sg")
        first = (subject.person, subject.number) == (1, "sg")
        base, past, ing = clause.verb.english(clause.sense) if clause.verb else ("be", "", "")
        present_be = "am" if first else "is" if third else "are"
        past_be = "was" if first or third else "were"
        if clause.tense == "future":
            auxiliary, main = "will", [base]
        elif clause.verb is None or clause.progressive:
            auxiliary, main = (past_be if clause.tense == "past" else present_be), [ing] if clause.verb else []
        elif clause.negative or question:
            auxiliary, main = ("did" if clause.tense == "past" else "does" if third else "do"), [base]
        else:
            auxiliary, main = "", [past if clause.tense == "past" else third_person(base) if third else base]
        negation = ["not"] if clause.negative else []
        if clause.negative and spoken and auxiliary != "am":
            auxiliary, negation = {"will": "won't"}.get(auxiliary, auxiliary + "n't"), []
        who = [] if without == "subject" else self._english(subject, "subject", None)
        group = [auxiliary] if auxiliary else []
        result = [*group, *who, *negation, *main] if question else [*who, *group, *negation, *main]
        if clause.predicate:
            result += ["very"] * clause.predicate[2] + [clause.predicate[1]]
        if clause.object and without != "object":
            result += self._english(clause.object, "object", subject)
        if clause.recipient:
            result += ["to", *self._english(clause.recipient, "object", subject)]
        if clause.manner:
            result.append(clause.manner[1])
        if clause.place:
            preposition, place, case = clause.place
            result += [preposition[2] if case == "acc" else preposition[1], *self._english(place, "object", subject)]
        if clause.time:
            # What stands first in the source mostly stands first in English too.
            if clause.front == "time" and not question and self._chance(0.8):
                return [clause.time[1], ",", *result]
            result.append(clause.time[1])
        return result


def _capital(text: str) -> str:
    """The first letter as a capital, also behind a quotation mark."""
    start = 1 if text.startswith('"') else 0
    return text[:start] + text[start : start + 1].upper() + text[start + 1 :]


def _join(tokens: list[str]) -> str:
    """Words and marks as a line of text: no space before a mark nor inside quotation marks, no two commas in a row."""
    line, opened, glue = "", False, True
    for token in tokens:
        if token == '"':
            line += token if opened or not line else " " + token
            opened = glue = not opened
        elif token in (",", ".", "!", "?"):
            if line.endswith((",", ',"')):  # a relative clause has closed itself with a comma
                line = line[:-1] if token != "," and line.endswith(",") else line
                token = "" if token == "," else token
            line, glue = line + token, False
        else:
            line, glue = line + (token if glue else " " + token), False
    return line
