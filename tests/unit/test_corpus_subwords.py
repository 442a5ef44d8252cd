from __future__ import annotations

import random

import pytest
from wit3_sample import sentence

from intra_distillation_fairseq.corpus import subwords
from intra_distillation_fairseq.errors import UserError


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text, with a comma")
    rng = random.Random(3)
    for lang in ("de", "en"):
        (folder / f"train.{lang}").write_text("".join(sentence(rng) + "\n" for _ in range(300)))
    return folder


@pytest.fixture(scope="module")
def model(text):
    subwords.train([text / "train.de", text / "train.en"], 120, text)
    return text


def test_same_bytes_in_any_folder(model, tmp_path):
    for lang in ("de", "en"):
        (tmp_path / f"other.{lang}").write_bytes((model / f"train.{lang}").read_bytes())
    subwords.train([tmp_path / "other.de", tmp_path / "other.en"], 120, tmp_path)
    assert (tmp_path / "spm.model").read_bytes() == (model / "spm.model").read_bytes()


def test_vocabulary_is_that_of_training_from_files(model, tmp_path, monkeypatch):
    import sentencepiece

    monkeypatch.chdir(model)
    sentencepiece.SentencePieceTrainer.train(
        input="train.de,train.en", model_prefix=str(tmp_path / "files"), vocab_size=120, minloglevel=2,
        character_coverage=0.99999995, input_sentence_size=1000000, num_threads=16,
    )  # fmt: skip
    assert (model / "spm.vocab").read_text() == (tmp_path / "files.vocab").read_text()


def test_dictionary_is_the_vocabulary_less_three(model, tmp_path):
    assert subwords.write_dictionary(model / "spm.vocab", tmp_path / "dict.txt") == 121
    lines = (tmp_path / "dict.txt").read_text().split("\n")[:-1]
    vocabulary = (model / "spm.vocab").read_text().split("\n")[:-1]
    assert lines == [line.split("\t")[0] + " 100" for line in vocabulary[3:]]
    assert len(lines) == 117


def test_too_large_a_vocabulary_names_the_largest(text, tmp_path):
    files = [text / "train.de", text / "train.en"]
    with pytest.raises(subwords.VocabularyTooLarge) as error:
        subwords.train(files, 9000, tmp_path)
    largest = error.value.largest
    assert str(error.value) == (
        f"--vocab-size '9000' is too large for this text, from which at most {largest} pieces can be learnt: give "
        f"--vocab-size {largest} or less"
    )
    subwords.train(files, largest, tmp_path)  # the number is right: this works, one more does not
    with pytest.raises(subwords.VocabularyTooLarge):
        subwords.train(files, largest + 1, tmp_path)


def test_too_small_a_vocabulary_names_the_smallest(text, tmp_path):
    files = [text / "train.de", text / "train.en"]
    with pytest.raises(UserError, match=r"--vocab-size '9' is too small .*: give --vocab-size (\d+) or more") as error:
        subwords.train(files, 9, tmp_path)
    smallest = int(str(error.value).split("--vocab-size ")[-1].split()[0])
    subwords.train(files, smallest, tmp_path)


def test_empty_sides(model):
    """U+200B alone encodes to nothing: such a pair goes from train and valid, and stays in test."""
    pairs = [("ba be", "bi"), ("\u200b", "bo"), ("bu", ""), ("du", "da")]
    kept = subwords.Encoder(model / "spm.model", drop_empty=True)(pairs)
    assert [target.replace(" ", "").replace("▁", "") for _, target in kept] == ["bi", "da"]
    every = subwords.Encoder(model / "spm.model", drop_empty=False)(pairs)
    assert len(every) == 4 and every[1][0] == "" and every[2][1] == ""


@pytest.mark.parametrize(("total", "wanted"), [(10, 3), (10, 9), (10, 10), (10, 11), (7, 1), (1000, 333), (0, 5)])
def test_evenly_spaced(total, wanted):
    got = list(subwords.evenly_spaced(range(total), total, wanted))
    assert len(got) == min(total, wanted) and got == sorted(got)
    gaps = {after - before for before, after in zip(got, got[1:])}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_learns_from_the_sample_only(text, tmp_path):
    """The model of a sample is that of a text of just these lines."""
    lines = [line for lang in ("de", "en") for line in (text / f"train.{lang}").read_text().split("\n")[:-1]]
    (tmp_path / "sample").write_text("".join(line + "\n" for line in subwords.evenly_spaced(lines, 600, 200)))
    for name, files, counts in (
        ("a", [text / "train.de", text / "train.en"], (600, 200)),
        ("b", [tmp_path / "sample"], (200, 200)),
    ):
        (tmp_path / name).mkdir()
        subwords.train(files, 100, tmp_path / name, *counts)
    assert (tmp_path / "a/spm.model").read_bytes() == (tmp_path / "b/spm.model").read_bytes()


def test_pieces_are_counted(model):
    """Exactly the ratio and exactly the most pieces stay; in test, everything does."""
    encoder = subwords.Encoder(model / "spm.model", drop_empty=False)
    line, longer = "ba ba", "ba ba ba"
    few, more = (len(encoder([(text, text)])[0][0].split()) for text in (line, longer))
    pairs = [(line, longer), (longer, line), (longer, longer), ("", line)]
    for ratio, most, kept in (
        (more / few, more, pairs[:3]),
        (more / few - 0.01, more, pairs[2:3]),
        (9, more, pairs[:3]),
        (9, more - 1, []),
    ):
        limited = subwords.Encoder(model / "spm.model", drop_empty=True, limits=(ratio, most))
        assert limited(pairs) == encoder(kept) if kept else limited(pairs) == []
        assert len(subwords.Encoder(model / "spm.model", drop_empty=False, limits=(ratio, most))(pairs)) == 4
