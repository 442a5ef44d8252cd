"""The IWSLT'14 archive (WIT3 release 2014-01): which members matter, and their text."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from intra_distillation_fairseq.corpus.disk import is_full
from intra_distillation_fairseq.errors import UserError

LANGUAGES = ("ar", "de", "es", "fa", "he", "it", "nl", "pl")

# The published test set is these, in this order, as far as a pair has them.
TEST_SETS = (
    "IWSLT14.TED.dev2010",
    "IWSLT14.TEDX.dev2012",
    "IWSLT14.TED.tst2010",
    "IWSLT14.TED.tst2011",
    "IWSLT14.TED.tst2012",
)

# train, valid, test lines of the real archive, where they are known.
PUBLISHED_COUNTS = {"de": (160239, 7283, 6750)}

_DROPPED = ("<url>", "<talkid>", "<keywords>")
_STRIPPED = re.compile("</?(?:title|description)>")

# sed's \s in a UTF-8 locale: no no-break spaces.
_SED_SPACE = "[\t-\r \u1680\u2000-\u2006\u2008-\u200a\u2028\u2029\u205f\u3000]"
_SEG_START = re.compile(f'<seg id="[0-9]*">{_SED_SPACE}*')
_SEG_END = re.compile(f"{_SED_SPACE}*</seg>{_SED_SPACE}*")


def train_lines(lines: Iterator[str]) -> Iterator[str]:
    """Text of a train.tags file: transcript, titles and descriptions; addresses, ids and keywords are left out."""
    for line in lines:
        if not any(tag in line for tag in _DROPPED):
            yield _STRIPPED.sub("", line)


def test_lines(lines: Iterator[str]) -> Iterator[str]:
    """Text of an XML set: what stands in its <seg> lines, with a straight apostrophe for U+2019."""
    for line in lines:
        if "<seg id" in line:
            yield _SEG_END.sub("", _SEG_START.sub("", line)).replace("\u2019", "'")


def unescape(line: str) -> str:
    """Undo the archive's XML escapes, which are only these three."""
    return line.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def extract_pair(archive: Path, lang: str, folder: Path) -> list[str]:
    """Copy the training text and the XML sets of LANG-en out of the archive into `folder`.

    Members are read as streams and written under their bare, checked names, so nothing in the archive decides where a
    file goes: absolute names, "..", links and devices are never followed.

    Args:
        archive: 2014-01.tgz, or the archive of one pair (de-en.tgz) from elsewhere.
        lang: source language; the target is always English.
        folder: exists already and is empty.

    Returns:
        The names written, sorted.

    Raises:
        UserError: not a whole gzip-compressed tar archive, or the pair is not in it.
    """
    pair = f"{lang}-en"
    wanted = re.compile(
        rf"train\.tags\.{pair}\.(?:{lang}|en)|IWSLT14\.[A-Za-z0-9]+\.[A-Za-z0-9]+\.{pair}\.(?:{lang}|en)\.xml"
    )
    seen: set[str] = set()
    try:
        with open(archive, "rb") as stream, tarfile.open(fileobj=stream, mode="r|gz") as outer:
            written = _extract(outer, pair, wanted, folder, seen)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        if is_full(error):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot read the archive '{archive}' ({error.strerror}): check the path") from None
        raise UserError(
            f"'{archive}' is not a whole gzip-compressed tar archive ({error}): check the path, or get it again"
        ) from None
    missing = [f"train.tags.{pair}.{side}" for side in (lang, "en") if f"train.tags.{pair}.{side}" not in written]
    if missing:
        there = ", ".join(sorted(seen)) or "none"
        raise UserError(f"'{archive}' has no {missing[0]}; pairs in it: {there}: give --langs one of them")
    return sorted(written)


def _extract(tar: tarfile.TarFile, pair: str, wanted: re.Pattern[str], folder: Path, seen: set[str]) -> set[str]:
    written: set[str] = set()
    for member in tar:
        parts = PurePosixPath(member.name).parts
        if not member.isfile() or not parts:
            continue
        name = parts[-1]
        pair_archive = re.fullmatch(r"([a-z]{2,3}-en)\.tgz", name)
        pair_text = re.fullmatch(r"train\.tags\.([a-z]{2,3}-en)\.en", name)
        if pair_archive or pair_text:
            seen.add((pair_archive or pair_text).group(1))
        if name == f"{pair}.tgz":
            with tarfile.open(fileobj=tar.extractfile(member), mode="r|gz") as inner:
                written |= _extract(inner, pair, wanted, folder, seen)
            break
        # The same file may come twice in an archive that was put together by hand: the first one counts.
        if wanted.fullmatch(name) and parts[-2:-1] == (pair,) and name not in written:
            _copy(tar.extractfile(member), folder / name)
            written.add(name)
    return written


def _copy(source: IO[bytes], path: Path) -> None:
    with open(path, "wb") as out:
        while block := source.read(1 << 20):
            out.write(block)


def choose_test_sets(names: list[str], lang: str) -> tuple[list[str], list[str], list[str]]:
    """Choose by rule which XML sets make up the test set.

    Args:
        names: the file names of the pair's archive.
        lang: source language.

    Returns:
        Sets to concatenate, in order; sets of the rule that the pair does not have; sets it has beyond the rule.

    Raises:
        UserError: a set has only one side, or the required ones are missing.
    """
    pair = f"{lang}-en"
    sides = {
        side: {n[: -len(f".{pair}.{side}.xml")] for n in names if n.endswith(f".{pair}.{side}.xml")}
        for side in (lang, "en")
    }
    for one_sided in sorted(sides[lang] ^ sides["en"]):
        there, absent = (lang, "en") if one_sided in sides[lang] else ("en", lang)
        raise UserError(
            f"test set '{one_sided}' of {pair} has a file for '{there}' but none for '{absent}': the archive is not "
            "whole, get it again"
        )
    chosen = [name for name in TEST_SETS if name in sides[lang]]
    if TEST_SETS[0] not in chosen or not any(".tst" in name for name in chosen):
        raise UserError(
            f"{pair} has the test sets '{' '.join(sorted(sides[lang]))}'; needed are {TEST_SETS[0]} and at least one "
            "of IWSLT14.TED.tst2010, tst2011, tst2012: the archive is not whole, get it again"
        )
    absent = [name for name in TEST_SETS if name not in chosen]
    return chosen, absent, sorted(sides[lang] - set(TEST_SETS))
