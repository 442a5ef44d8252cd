from __future__ import annotations

import gzip
import re

import pytest

from intra_distillation_fairseq.corpus import pairs
from intra_distillation_fairseq.corpus.clean import read_lines, split_lines
from intra_distillation_fairseq.corpus.pairs import (
    Chunk,
    Treat,
    Treatment,
    hold_out,
    pack,
    process,
    read_chunks,
    write_splits,
)
from intra_distillation_fairseq.errors import UserError


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(pairs, "_CHUNK_PAIRS", 3)


def unpack(chunks):
    """(split, source, target) of every pair."""
    return [(c.split, *pair) for c in chunks for pair in zip(*map(split_lines, c.sides))]


def write(path, text):
    path.write_bytes(text)
    return path


ODD = b"\xef\xbb\xbfa\x0bb\r\n\r\nc \xc2\x85d\xe2\x80\xa8e\rf\n\xef\xbb\xbfg\n\n h\r\r\nlast\r"


@pytest.mark.parametrize("name", ["text", "text.gz"])
def test_chunks_have_the_lines_of_the_file(tmp_path, name):
    path = write(tmp_path / name, gzip.compress(ODD) if name.endswith("gz") else ODD)
    chunks = list(read_chunks("train", path, path))
    assert [chunk.pairs for chunk in chunks] == [3, 3, 1]
    lines = list(read_lines(path))
    assert unpack(chunks) == [("train", line, line) for line in lines]
    assert lines == ["a b", "", "c  d e f", "\ufeffg", "", " h ", "last"]


def test_pack_is_the_way_back():
    some = [(f"s{i}", f"ü{i}") for i in range(7)]
    chunks = list(pack("test", some))
    assert [chunk.pairs for chunk in chunks] == [3, 3, 1]
    assert unpack(chunks) == [("test", *pair) for pair in some]


def test_invalid_utf8_names_file_and_line(tmp_path):
    good, bad = write(tmp_path / "good", b"x\n" * 5), write(tmp_path / "bad", b"x\n" * 4 + b"M\xfcnchen\n")
    with pytest.raises(UserError) as error:
        list(read_chunks("train", good, bad))
    assert str(error.value) == (
        f"'{bad}' line 5 is not UTF-8 (byte 0xfc at position 1): convert the file to UTF-8, or give "
        "--replace-invalid-utf8"
    )
    assert unpack(read_chunks("train", good, bad, replace_invalid=True))[4] == ("train", "x", "M\ufffdnchen")


@pytest.mark.parametrize("lines", [(7, 6), (3, 6), (6, 0)])
def test_sides_of_different_length(tmp_path, lines):
    paths = [write(tmp_path / str(side), b"x\n" * n) for side, n in enumerate(lines)]
    message = (
        f"'{paths[0]}' has {lines[0]} lines and '{paths[1]}' has {lines[1]}: a parallel text needs the same number"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        list(read_chunks("train", *paths))


@pytest.mark.parametrize("every", [1, 2, 3, 4, 7, 100])
def test_every_nth_pair_is_held_out(every):
    some = [(f"s{i}", f"t{i}") for i in range(1, 21)]
    got = unpack(hold_out(pack("train", some), every))
    assert sorted(got, key=lambda one: int(one[1][1:])) == [
        ("train" if number % every else "valid", *pair) for number, pair in enumerate(some, start=1)
    ]
    for split in ("train", "valid"):
        numbers = [int(source[1:]) for name, source, _ in got if name == split]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize("jobs", [1, 3])
def test_held_out_before_the_filter(tmp_path, jobs):
    """A pair that the filter drops still counts."""
    some = [("wort", "word") if i % 5 else ("eins zwei drei", "one") for i in range(1, 41)]
    held = hold_out(pack("train", some), 4)
    treatment = Treatment(moses=True, drop_empty=True, ratio=1.5, max_words=256)
    write_splits(process(held, Treat, (treatment, ("de", "en")), jobs, "x"), tmp_path, ("de", "en"), ("train", "valid"))
    assert (tmp_path / "valid.de").read_text() == "wort\n" * 8  # of the 10 numbers 4, 8, ... all but 20 and 40
    assert (tmp_path / "train.en").read_text() == "word\n" * 24


def test_words_are_counted_after_normalising_and_splitting_hyphens():
    """x-y are three tokens of `tokenizer.perl -a`: exactly 1.5 is kept, and 256 is."""
    treatment = Treatment(normalise=True, moses=True, aggressive=True, drop_empty=True, ratio=1.5, max_words=256)
    treat = Treat(treatment, ("en", "de"))
    kept = [("x-y", "a b"), ("x y", "a-b"), ("“x”", "„a“"), (" ".join("w" * 256), " ".join("v" * 256))]
    dropped = [("x-y z", "a b"), ("x", "a-b"), ("\u200b", "a"), (" ".join("w" * 257), " ".join("v" * 256))]
    assert treat(kept) == [("x-y", "a b"), ("x y", "a-b"), ('"x"', '"a"'), kept[3]]
    assert treat(dropped) == []


def test_settings_of_older_stamps_have_not_changed():
    assert list(Treatment().settings()) == ["unescape", "moses", "drop_empty", "ratio", "max_words", "lowercase"]
    assert Treatment(normalise=True).settings()["normalise"] is True


def test_empty_splits_are_written(tmp_path):
    write_splits([Chunk("train", (b"a\n", b"b\n"))], tmp_path / "raw", ("de", "en"), ("train", "valid"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "raw").iterdir()} == {
        "train.de": b"a\n", "train.en": b"b\n", "valid.de": b"", "valid.en": b"",
    }  # fmt: skip
