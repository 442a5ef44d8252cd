from __future__ import annotations

import gzip
import io

import pytest

from intra_distillation_fairseq.corpus.clean import (
    count_lines,
    decode_lines,
    is_empty,
    keep_pair,
    read_lines,
    single_spaces,
    unescape,
)
from intra_distillation_fairseq.errors import UserError


def lines_of(data: bytes, **options) -> list[str]:
    return list(decode_lines(io.BytesIO(data), "text.de", **options))


@pytest.mark.parametrize("mark", ["\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_only_newline_ends_a_line(mark):
    lines = lines_of(f"a{mark}b\nc\n".encode())
    assert lines == ["a b", "c"]
    assert [len(line.splitlines()) for line in lines] == [1, 1]


def test_windows_line_ends_and_byte_order_mark():
    assert lines_of(b"\xef\xbb\xbfa\r\nb\r\n\r\nc") == ["a", "b", "", "c"]


def test_byte_order_mark_is_kept_within_the_text():
    assert lines_of("a\n\ufeffb\n".encode()) == ["a", "\ufeffb"]


def test_invalid_utf8_names_file_and_line():
    with pytest.raises(UserError) as error:
        lines_of(b"gut\nM\xfcnchen\n")
    assert str(error.value) == (
        "'text.de' line 2 is not UTF-8 (byte 0xfc at position 1): convert the file to UTF-8, or give "
        "--replace-invalid-utf8"
    )


def test_invalid_utf8_can_be_replaced():
    assert lines_of(b"M\xfcnchen\n", replace_invalid=True) == ["M\ufffdnchen"]


def test_gzip_and_plain_read_and_count_alike(tmp_path):
    data = "eins\nzwei ü\ndrei".encode()
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "a.gz").write_bytes(gzip.compress(data))
    for path in (tmp_path / "a", tmp_path / "a.gz"):
        assert list(read_lines(path)) == ["eins", "zwei ü", "drei"]
        assert count_lines(path) == 3
    (tmp_path / "empty").write_bytes(b"")
    assert count_lines(tmp_path / "empty") == 0


@pytest.mark.parametrize("read", [count_lines, lambda path: list(read_lines(path))])
def test_cut_gzip_is_named(tmp_path, read):
    path = tmp_path / "cut.de.gz"
    path.write_bytes(gzip.compress(b"line\n" * 5000)[:-20])
    with pytest.raises(UserError, match=r"cut\.de\.gz' is not a whole gzip file .*: get it again"):
        read(path)


def test_single_spaces():
    assert single_spaces("\u00a0 a \t b\u2003c\u3000") == "a b c"
    assert is_empty(" \u00a0\t\u3000") and not is_empty(" x ")


def words(n: int) -> str:
    return " ".join(["w"] * n)


@pytest.mark.parametrize(
    ("source", "target", "kept"),
    [
        (words(3), words(2), True),  # exactly 1.5
        (words(2), words(3), True),
        (words(4), words(2), False),
        (words(2), words(4), False),
        (words(175), words(175), True),
        (words(176), words(175), False),
        (words(175), words(176), False),
        ("", words(1), False),
        (words(1), "", False),
        ("x" * 1000, "y", True),
        ("x" * 1001, "y", False),
        ("y", "x" * 1001, False),
    ],
)
def test_filter_of_clean_corpus_n(source, target, kept):
    assert keep_pair(source, target, ratio=1.5, max_words=175) is kept


def test_filter_without_limits():
    assert keep_pair(words(1), words(500), ratio=None, max_words=None)


def test_unescape_undoes_one_level():
    assert unescape("a &lt;b&gt; &amp;amp;") == "a <b> &amp;"
