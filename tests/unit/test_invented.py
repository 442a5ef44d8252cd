"""The invented language: one seed gives one text, forms agree, both sides fit, the archive has the real layout."""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from intra_distillation_fairseq.cli.main import main
from intra_distillation_fairseq.corpus import invented, invented_lexicon
from intra_distillation_fairseq.corpus.invented import Clause, Grammar, Name, NounPhrase, Pronoun
from intra_distillation_fairseq.corpus.invented_archive import archive_bytes
from intra_distillation_fairseq.corpus.invented_lexicon import (
    Adjective,
    Noun,
    Verb,
    agree,
    conjugate,
    decline,
    english_plural,
    third_person,
)

SENTENCES = 1500


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar(1)


@pytest.fixture(scope="module")
def sentences():
    grammar = Grammar(1)
    return [grammar.sentence() for _ in range(SENTENCES)]


@pytest.fixture(scope="module")
def members() -> dict[str, tuple[tarfile.TarInfo, bytes]]:
    """The inner archive's members in their order, and the outer one's under "outer"."""
    with tarfile.open(fileobj=io.BytesIO(archive_bytes(1, train=170, test=90))) as outer:
        (only,) = outer.getmembers()
        content = outer.extractfile(only).read()
    with tarfile.open(fileobj=io.BytesIO(content)) as inner:
        found = {member.name: (member, inner.extractfile(member).read()) for member in inner.getmembers()}
    return {"outer": (only, content), **found}


# ---- one seed, one text


def test_the_same_seed_gives_the_same_bytes_whatever_the_hash_seed():
    code = (
        "import hashlib, sys; sys.argv = ['intra-distillation']\n"
        "from intra_distillation_fairseq.corpus.invented_archive import archive_bytes\n"
        "print(hashlib.sha256(archive_bytes(7, 200, 8)).hexdigest())"
    )
    here = hashlib.sha256(archive_bytes(7, 200, 8)).hexdigest()
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == here, done.stderr


def test_another_seed_gives_another_language():
    first, second = Grammar(1), Grammar(2)
    stems = [{noun.stem for kind in grammar.lexicon.nouns.values() for noun in kind} for grammar in (first, second)]
    assert len(stems[0] & stems[1]) < 20
    assert [first.sentence().target for _ in range(20)] != [second.sentence().target for _ in range(20)]


def test_only_the_method_of_random_that_is_the_same_in_every_python_is_used():
    for module in (invented, invented_lexicon):
        used = set()
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and getattr(node.value, "attr", getattr(node.value, "id", "")) in (
                "rng",
                "_rng",
            ):
                used.add(node.attr)
        assert used == {"random"}, module.__name__


# ---- forms


@pytest.mark.parametrize(
    ("gender", "number", "case", "noun", "adjective"),
    [
        ("m", "sg", "nom", "dom", "vulek"),
        ("m", "sg", "acc", "doman", "vulet"),
        ("m", "pl", "dat", "domim", "vulepi"),
        ("f", "sg", "nom", "doma", "vulak"),
        ("f", "sg", "gen", "domes", "vulas"),
        ("f", "pl", "acc", "domän", "vulati"),
        ("n", "sg", "nom", "domo", "vulok"),
        ("n", "sg", "acc", "domo", "vulok"),  # neuter: subject and object look alike
        ("n", "pl", "gen", "domös", "vulosi"),
    ],
)
def test_nouns_and_adjectives_are_declined(gender, number, case, noun, adjective):
    assert decline(Noun("dom", gender, "house", "houses", "place"), number, case) == noun
    assert agree("vul", gender, number, case) == adjective


@pytest.mark.parametrize(
    ("tense", "person", "number", "gender", "form"),
    [
        ("present", 1, "sg", "m", "laram"),
        ("present", 3, "sg", "f", "larit"),
        ("present", 3, "pl", "n", "larant"),
        ("past", 3, "sg", "m", "laril"),
        ("past", 3, "sg", "f", "larila"),
        ("past", 3, "sg", "n", "larilo"),
        ("past", 3, "pl", "f", "larili"),
        ("past", 1, "sg", "f", "larilaem"),
        ("past", 2, "pl", "m", "larilietu"),
    ],
)
def test_verbs_are_conjugated(tense, person, number, gender, form):
    assert conjugate("lar", tense, person, number, gender) == form


def test_english_forms():
    assert [english_plural(word) for word in ("cat", "box", "church", "story", "key")] == [
        "cats",
        "boxes",
        "churches",
        "stories",
        "keys",
    ]
    assert [third_person(word) for word in ("see", "go", "cry", "play", "teach")] == [
        "sees",
        "goes",
        "cries",
        "plays",
        "teaches",
    ]


def test_numbers(grammar):
    word = grammar.lexicon.number
    assert [word(value)[1] for value in (2, 12, 20, 23, 99)] == [
        "two",
        "twelve",
        "twenty",
        "twenty-three",
        "ninety-nine",
    ]
    assert word(23)[0] == f"{word(3)[0]}o{word(20)[0]}"
    assert len({word(value) for value in [*range(1, 13), *range(20, 100)]}) == 92


# ---- clauses

DOG = Noun("hund", "m", "dog", "dogs", "animal")
WOMAN = Noun("mul", "f", "woman", "women", "person")
SEE = Verb("ka", "vid", (("person", ("see", "saw", "seeing")), ("animal", ("watch", "watched", "watching"))))


def both(grammar: Grammar, clause: Clause, order: str = "main", **english) -> tuple[str, str]:
    return " ".join(grammar.source_clause(clause, order)), " ".join(grammar.english_clause(clause, **english))


@pytest.mark.parametrize(
    ("order", "english", "source", "target"),
    [
        ("main", {}, "hak mula vidila het hundan ka", "the woman watched the dog"),
        ("verb first", {"question": True}, "vidila hak mula het hundan ka", "did the woman watch the dog"),
        ("subordinate", {}, "hak mula het hundan kavidila", "the woman watched the dog"),
    ],
)
def test_the_verb_moves_and_its_prefix_separates(grammar, order, english, source, target):
    clause = Clause(NounPhrase(WOMAN), "past", SEE, "animal", object=NounPhrase(DOG))
    assert both(grammar, clause, order, **english) == (source, target)


def test_an_object_in_front_stays_an_object_in_english(grammar):
    clause = Clause(NounPhrase(WOMAN), "future", SEE, "animal", object=NounPhrase(DOG), front="object")
    assert both(grammar, clause) == ("het hundan vegit hak mula kavidir", "the woman will watch the dog")


def test_a_dropped_pronoun_is_named_by_the_verb_alone(grammar):
    clauses = [Clause(Pronoun(3, "sg", gender), "past", SEE, "person", object=NounPhrase(WOMAN)) for gender in "mfn"]
    assert [both(grammar, clause) for clause in clauses] == [
        ("vidil hat mule ka", "he saw the woman"),
        ("vidila hat mule ka", "she saw the woman"),
        ("vidilo hat mule ka", "it saw the woman"),
    ]


def test_the_owner_of_own_is_the_subject(grammar):
    own = NounPhrase(DOG, "pl", "own")
    subjects = (Pronoun(1, "sg", "f"), Pronoun(2, "pl", "m"), NounPhrase(WOMAN), NounPhrase(WOMAN, "pl"))
    for subject, possessive in zip(subjects, ("my", "your", "her", "their")):
        source, target = both(grammar, Clause(subject, "past", SEE, "animal", object=own))
        assert "sojeti hundin" in source
        assert target.endswith(f"{possessive} dogs")


def test_the_kind_of_object_decides_what_a_verb_means(grammar):
    person = Clause(Name("Tarun", "m"), "present", SEE, "person", object=NounPhrase(WOMAN), negative=True)
    assert both(grammar, person) == ("Tarun vidit ni hat mule ka", "Tarun does not see the woman")
    assert both(grammar, person, spoken=True)[1] == "Tarun doesn't see the woman"


def test_case_decides_between_place_and_direction(grammar):
    house = NounPhrase(Noun("dom", "m", "house", "houses", "place"))
    run = Verb("", "kur", (("", ("run", "ran", "running")),))
    where = [
        Clause(Name("Tarun", "m"), "past", run, place=(("in", "in", "into"), house, case)) for case in ("dat", "acc")
    ]
    assert [both(grammar, clause) for clause in where] == [
        ("Tarun kuril in hep domum", "Tarun ran in the house"),
        ("Tarun kuril in het doman", "Tarun ran into the house"),
    ]


def test_a_relative_clause_marks_the_role_of_its_noun(grammar):
    seeing = Clause(NounPhrase(DOG), "past", SEE, "person", object=NounPhrase(WOMAN))
    phrase = NounPhrase(DOG, relative=("subject", seeing))
    assert both(grammar, Clause(phrase, "present", predicate=(Adjective("vul", (("", "big"),)), "big", True))) == (
        "hek hund , kek hat mule kavidil , trü vulek",
        "the dog that saw the woman is very big",
    )
    seen = Clause(Pronoun(1, "pl", "m"), "past", SEE, "animal", object=NounPhrase(DOG))
    phrase = NounPhrase(DOG, determiner="indef", relative=("object", seen))
    assert both(grammar, Clause(phrase, "present", SEE, "person", object=Pronoun(3, "pl", "m"))) == (
        "unek hund , ket kavidiliemu , vidit rut ka",
        "a dog that we watched sees them",
    )


def phrases(clause: Clause):
    """Every noun phrase of a clause with the case it stands in, those of relative clauses left out."""
    for what, case in ((clause.subject, "nom"), (clause.object, "acc"), (clause.recipient, "dat")):
        if isinstance(what, NounPhrase):
            yield what, case
    if clause.place and isinstance(clause.place[1], NounPhrase):
        yield clause.place[1], clause.place[2]


def test_all_words_of_a_phrase_agree_in_drawn_sentences(sentences):
    vowels, consonants = {"m": "e", "f": "a", "n": "o"}, {"nom": "k", "acc": "t", "dat": "p"}
    checked = 0
    for sentence in sentences:
        for phrase, case in (pair for clause in sentence.clauses for pair in phrases(clause)):
            case = "nom" if phrase.gender == "n" and case == "acc" else case
            ending = vowels[phrase.gender] + consonants[case] + ("i" if phrase.number == "pl" else "")
            words = ["h" + ending] if phrase.determiner == "def" else []
            words.append(rf"\w*{phrase.noun.stem}\w{{0,2}}")
            words += [adjective.stem + ending for adjective, _ in phrase.adjectives]
            assert re.search(rf"\b{' '.join(words)}\b", sentence.source.lower()), (sentence.source, words)
            checked += 1
    assert checked > 2000


def test_verbs_agree_with_their_subject_in_drawn_sentences(sentences):
    endings = {(1, "sg"): "am", (2, "sg"): "es", (3, "sg"): "it", (1, "pl"): "omu", (2, "pl"): "etu", (3, "pl"): "ant"}
    checked = 0
    for sentence in sentences:
        for clause in sentence.clauses:
            if clause.verb is not None and clause.tense == "present":
                ending = endings[clause.subject.person, clause.subject.number]
                assert re.search(rf"\b\w*{clause.verb.stem}{ending}\b", sentence.source.lower()), sentence
                checked += 1
    assert checked > 300


# ---- both sides


def test_sentences_have_two_sides_that_end_alike(sentences):
    for sentence in sentences:
        for text in (sentence.source, sentence.target):
            assert text == " ".join(text.split())
            assert not re.search(r" [,.!?]|,[,.!?]|,\"[,.]|\"\"|[,.]\w", text), text
            assert text.lstrip('"')[0].isupper() or not text.lstrip('"')[0].isalpha()
            assert text.count('"') in (0, 2)
        assert sentence.source[-1] == sentence.target[-1]
        assert sentence.source[-1] in ".!?"
        assert 1 / 3 < len(sentence.source.split()) / len(sentence.target.split()) < 3, sentence


def test_names_years_and_firms_are_copied(sentences):
    names = years = firms = 0
    for sentence in sentences:
        assert sorted(re.findall(r"\d+", sentence.source)) == sorted(re.findall(r"\d+", sentence.target))
        assert sentence.source.count("&") == sentence.target.count("&")
        for clause in sentence.clauses:
            if isinstance(clause.object, Name):
                names += 1
                assert clause.object.text in sentence.source
                assert clause.object.text in sentence.target
        years += bool(re.search(r"\d", sentence.source))
        firms += "&" in sentence.source
    assert names > 10 and years > 10 and firms > 5


def test_the_text_is_neither_trivial_nor_all_alike(sentences):
    assert len({sentence.source for sentence in sentences}) > 0.99 * SENTENCES
    words = [word for sentence in sentences for word in sentence.target.lower().split()]
    assert len(set(words)) > 800
    assert 7 < len(words) / SENTENCES < 13
    for mark in ('"', "?", "!", "'s ", "n't ", " who ", "twenty-", "because"):
        assert any(mark in sentence.target for sentence in sentences), mark
    shared = {
        noun.stem for kind in Grammar(1).lexicon.nouns.values() for noun in kind if noun.singular in ("key", "answer")
    }
    assert len(shared) == 1  # one stem, two English words


# ---- the archive


def test_the_archive_has_the_layout_of_iwslt14(members):
    names = [
        f"de-en/IWSLT14.TED.{name}.de-en.{lang}.xml"
        for name in ("dev2010", "tst2010", "tst2011", "tst2012")
        for lang in ("de", "en")
    ]
    assert members["outer"][0].name == "2014-01/texts/de/en/de-en.tgz"
    assert list(members)[1:] == [*names, "de-en/train.tags.de-en.de", "de-en/train.tags.de-en.en", "de-en/README"]
    assert b"neither German nor text of IWSLT" in members["de-en/README"][1]


def test_the_archive_tells_nothing_of_when_and_where_it_was_made(members):
    assert members["outer"][1][4:8] == bytes(4)  # gzip's time
    for member, _ in members.values():
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (1_390_000_000, 0, 0, "", "")
    assert gzip.decompress(archive_bytes(1, 100, 4)) == gzip.decompress(archive_bytes(1, 100, 4))


def test_training_talks_are_blocks_of_url_text_and_description(members):
    shapes = []
    for lang in ("de", "en"):
        lines = members[f"de-en/train.tags.de-en.{lang}"][1].decode().split("\n")
        assert lines.pop() == ""
        shapes.append([re.match(r"<(\w+)>", line)[1] if line.startswith("<") else "text" for line in lines])
        assert all(re.sub(r"<[^>]*>", "", line).strip() for line in lines)
        assert not any(re.search(r"&(?!amp;)", line) for line in lines)
    assert shapes[0] == shapes[1]
    block = ["talkid", "title", "description", "keywords"]
    assert shapes[0] == ["url", *["text"] * 80, *block, "url", *["text"] * 80, *block, "url", *["text"] * 10, *block]


def test_test_sets_are_well_formed_and_fit(members):
    seen = []
    for name, size in (("dev2010", 23), ("tst2010", 23), ("tst2011", 22), ("tst2012", 22)):
        sides = []
        for lang, kind in (("de", "srcset"), ("en", "refset")):
            root = ElementTree.fromstring(
                members[f"de-en/IWSLT14.TED.{name}.de-en.{lang}.xml"][1].decode().split("\n", 1)[1]
            )
            (documents,) = root.iter(kind)
            segments = list(documents.iter("seg"))
            assert [segment.get("id") for segment in segments] == [str(i) for i in range(1, size + 1)]
            assert all(segment.text[0] == segment.text[-1] == " " and segment.text.strip() for segment in segments)
            sides.append([segment.text.strip() for segment in segments])
        seen += sides[0]
        assert [text[-1] for text in sides[0]] == [text[-1] for text in sides[1]]
    train = set(members["de-en/train.tags.de-en.de"][1].decode().split("\n"))
    assert len(set(seen)) == 90
    assert not set(seen) & train


# ---- the command


def test_demo_archive_writes_once_and_never_over_another(tmp_path, capsys):
    out = tmp_path / "a folder" / "archive é.tgz"
    arguments = ["demo-archive", "--out", str(out), "--train", "100", "--test", "4"]
    assert main([*arguments, "--seed", "3"]) == 0
    assert out.read_bytes() == archive_bytes(3, 100, 4)
    capsys.readouterr()
    assert main([*arguments, "--seed", "3"]) == 0
    assert "already there, nothing to do" in capsys.readouterr().err
    assert main([*arguments, "--seed", "4"]) == 2
    message = f"--out '{out}' exists and is not the archive of seed 4 with 100 + 4 sentences: choose another file, or "
    assert message + "remove it" in capsys.readouterr().err
    assert out.read_bytes() == archive_bytes(3, 100, 4)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "-1"], "--seed '-1': must be at least 0"),
        (["--train", "99"], "--train '99': must be at least 100"),
        (["--test", "3"], "--test '3': must be at least 4"),
    ],
)
def test_demo_archive_refuses_bad_numbers(tmp_path, capsys, flags, message):
    assert main(["demo-archive", "--out", str(tmp_path / "x.tgz"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_demo_archive_refuses_a_folder(tmp_path, capsys):
    assert main(["demo-archive", "--out", str(tmp_path)]) == 2
    assert f"--out '{tmp_path}' is a folder: give the name of a file" in capsys.readouterr().err
