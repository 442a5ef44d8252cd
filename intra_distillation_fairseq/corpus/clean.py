"""Reading text so that a line stays a line, and the length filter of Moses' clean-corpus-n.perl."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from intra_distillation_fairseq.errors import UserError

# Characters that some reader down the line (str.splitlines, universal newlines, fairseq's split on \s+) takes for the
# end of a line or of a token. As spaces they can never shift one side of a pair against the other.
LINE_BREAKS = "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_LINE_BREAKS = re.compile(f"[{LINE_BREAKS}]")

# What perl's \s matches in Unicode text. Python's \s also has \x1c-\x1f, so it is spelt out.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_ODD_SPACES = re.compile(f"[{_SPACE}]{{2,}}|(?! )[{_SPACE}]")  # all but the single space, which stays
_NO_SPACE = re.compile(f"[^{_SPACE}]")
_MAX_WORD_CHARS = 1000
_LONG_WORD = re.compile(f"[^ ]{{{_MAX_WORD_CHARS + 1}}}")


def decode_lines(stream: BinaryIO, name: str, replace_invalid: bool = False) -> Iterator[str]:
    r"""Yield the lines of a binary stream, split at "\n" only, each free of other line-break characters.

    Args:
        stream: bytes of UTF-8 text; a byte order mark at the very start is dropped, "\r\n" counts as "\n".
        name: what to call the text in an error message.
        replace_invalid: put U+FFFD for bytes that are not UTF-8, instead of refusing the text.

    Raises:
        UserError: a line is not UTF-8.
    """
    for number, raw in enumerate(stream, start=1):
        if number == 1 and raw.startswith(codecs.BOM_UTF8):
            raw = raw[len(codecs.BOM_UTF8) :]
        raw = raw[:-1] if raw.endswith(b"\n") else raw
        raw = raw[:-1] if raw.endswith(b"\r") else raw
        try:
            line = raw.decode("utf-8", errors="replace" if replace_invalid else "strict")
        except UnicodeDecodeError as error:
            raise not_utf8(name, number, raw, error) from None
        yield _LINE_BREAKS.sub(" ", line)


def not_utf8(name: str, number: int, line: bytes, error: UnicodeDecodeError) -> UserError:
    """The message for a line that is not UTF-8."""
    return UserError(
        f"'{name}' line {number} is not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start}): "
        "convert the file to UTF-8, or give --replace-invalid-utf8"
    )


def read_lines(path: Path, replace_invalid: bool = False) -> Iterator[str]:
    """Yield the lines of a text file (gzip-compressed if its name ends in .gz); see `decode_lines`."""
    with open_text(path) as stream:
        yield from decode_lines(stream, str(path), replace_invalid)


def read_blocks(path: Path, lines: int, replace_invalid: bool = False) -> Iterator[bytes]:
    r"""Yield the text of a file in blocks, checked and not decoded; `split_lines` makes lines of a block.

    Args:
        path: a text file, gzip-compressed if its name ends in .gz.
        lines: of each block (the last one may have fewer), each closed by "\n".
        replace_invalid: see `decode_lines`.

    Raises:
        UserError: a line is not UTF-8, or the gzip file is damaged.
    """
    with open_text(path) as stream:
        first = 1
        while block := list(islice(stream, lines)):
            if first == 1:
                block[0] = block[0].removeprefix(codecs.BOM_UTF8)
            if not block[-1].endswith(b"\n"):
                block[-1] += b"\n"
            yield _as_utf8(block, str(path), first, replace_invalid)
            first += len(block)


def _as_utf8(block: list[bytes], name: str, first: int, replace_invalid: bool) -> bytes:
    text = b"".join(block)
    try:
        text.decode()
        return text
    except UnicodeDecodeError:
        if replace_invalid:
            return text.decode(errors="replace").encode()
    for number, line in enumerate(block, start=first):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(name, number, line, error) from None
    raise AssertionError("no character goes on after a line feed")


def split_lines(text: bytes) -> list[str]:
    """The lines of a block, cleaned as in `decode_lines`."""
    return _LINE_BREAKS.sub(" ", text.decode().replace("\r\n", "\n")).split("\n")[:-1]


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a text file as bytes, unpacked if its name ends in .gz.

    Raises:
        UserError: the gzip file is damaged; also while the body reads.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise not_gzip(path, error) from None


def single_spaces(line: str) -> str:
    """Single spaces between words and none outside, as clean-corpus-n.perl leaves a line.

    That script also deletes "|"; where it follows Moses' tokeniser, which escapes them, there is none.
    """
    return _ODD_SPACES.sub(" ", line).strip(" ")


def is_empty(line: str) -> bool:
    """Tell whether a line has nothing but spaces."""
    return _NO_SPACE.search(line) is None


def keep_pair(source: str, target: str, ratio: float | None, max_words: int | None) -> bool:
    """Tell whether clean-corpus-n.perl keeps a pair of lines with single spaces.

    Args:
        source: words separated by single spaces.
        target: likewise.
        ratio: longest side / shortest side may be at most this, in words; exactly this is kept. None: any.
        max_words: most words a side may have. None: any number.
    """
    if not source or not target:
        return False
    n_source, n_target = source.count(" ") + 1, target.count(" ") + 1
    if max_words is not None and max(n_source, n_target) > max_words:
        return False
    if ratio is not None and (n_source / n_target > ratio or n_target / n_source > ratio):
        return False
    return not any(len(side) > _MAX_WORD_CHARS and _LONG_WORD.search(side) for side in (source, target))


def unescape(line: str) -> str:
    """Undo IWSLT'14's XML escapes, which are only these three."""
    return line.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def count_lines(path: Path) -> int:
    """Number of lines of a text file (gzip-compressed if its name ends in .gz), an unfinished last one included."""
    lines, last = 0, b"\n"
    with open_text(path) as stream:
        while block := stream.read(1 << 20):
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n")


def not_gzip(path: Path, error: Exception) -> UserError:
    """The message for a damaged .gz file."""
    return UserError(f"'{path}' is not a whole gzip file ({error}): get it again")
