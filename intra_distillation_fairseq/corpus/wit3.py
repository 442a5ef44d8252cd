"""The IWSLT'14 archive (WIT3 release 2014-01): which members matter, and their text."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from intra_distillation_fairseq.corpus.archives import MAX_UNPACKED, copy, explained, is_plain_file, open_tgz
from intra_distillation_fairseq.corpus.oddities import Oddities
from intra_distillation_fairseq.corpus.pairs import Pair, join_sides
from intra_distillation_fairseq.corpus.segments import Segment, read_segments
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

_TAGS = ("<url>", "<talkid>", "<keywords>")
_TALK = re.compile("<talkid>([^<]*)")
_STRIPPED = re.compile("</?(?:title|description)>")

# sed's \s in a UTF-8 locale: no no-break spaces.
_SED_SPACE = "[\t-\r \u1680\u2000-\u2006\u2008-\u200a\u2028\u2029\u205f\u3000]"
_SEG_START = re.compile(f'<seg id="[0-9]*">{_SED_SPACE}*')
# Spaces are looked at once, from the first of them on: a line of a million would take hours otherwise.
_SEG_END = re.compile(f"(?:(?<!{_SED_SPACE}){_SED_SPACE}+)?</seg>{_SED_SPACE}*")


class Talks:
    """Reads one side of a train.tags file: transcript, titles and descriptions; what is about a talk is passed over.

    Args:
        lines: of the file.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = lines
        self._texts = 0
        self.places: dict[str, list[tuple[int, int]]] = {}  # id of a talk -> texts before it, number of its line

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield the number of a line and its text."""
        for number, line in enumerate(self._lines, start=1):
            if not line.lstrip().startswith(_TAGS):
                self._texts += 1
                yield number, line
            elif talk := _TALK.search(line):
                self.places.setdefault(talk[1].strip(), []).append((self._texts, number))


def train_pairs(
    lines: tuple[Iterable[str], Iterable[str]], names: tuple[str, str], found: tuple[Oddities, Oddities]
) -> Iterator[Pair]:
    """Pair the text of both train.tags files of a pair.

    Args:
        lines: of either file.
        names: of the files, for messages.
        found: takes note of what is odd in either.

    Raises:
        UserError: one side has more lines of text, or a talk begins or ends elsewhere; the message says where.
    """
    sides = Talks(lines[0]), Talks(lines[1])
    try:
        for pair in join_sides(*sides, names):
            # The published steps drop such a line on its side alone, which shifts all that follows.
            tagged = [any(tag in line for tag in _TAGS) for _, line in pair]
            for has_tag, (number, _), oddities in zip(tagged, pair, found):
                if has_tag:
                    oddities.note("tag_in_text", number)
            if not any(tagged):
                yield _STRIPPED.sub("", pair[0][1]), _STRIPPED.sub("", pair[1][1])
    except UserError:
        _compare_talks(sides, names)  # which says more than the number of lines, where it finds anything
        raise
    _compare_talks(sides, names)
    for one, other, oddities in zip(sides, sides[::-1], found):
        for talk, places in one.places.items():
            for _, number in places if talk not in other.places else ():
                oddities.note("talk_on_one_side", number)


def _compare_talks(sides: tuple[Talks, Talks], names: tuple[str, str]) -> None:
    for talk, places in sides[0].places.items():
        for (before, line), (other_before, other_line) in zip(places, sides[1].places.get(talk, ())):
            if before != other_before:
                raise UserError(
                    f"talk '{talk}' comes after {before} lines of text in '{names[0]}' (line {line}) and after "
                    f"{other_before} in '{names[1]}' (line {other_line}): the sides do not match, get the archive again"
                )


def test_segments(lines: Iterable[str], name: str, found: Oddities) -> list[Segment]:
    """The segments of an XML set, with the text as the published steps leave it (see `segment_text`)."""
    segments = read_segments(lines, name, found, lambda line: "<seg id" in line)
    return [replace(segment, text=segment_text(segment.text)) for segment in segments]


def segment_text(line: str) -> str:
    """What stands in a <seg> line, with a straight apostrophe for U+2019."""
    return _SEG_END.sub("", _SEG_START.sub("", line)).replace("\u2019", "'")


def extract_pair(archive: Path, lang: str, folder: Path, max_bytes: int = MAX_UNPACKED) -> list[str]:
    """Copy the training text and the XML sets of LANG-en out of the archive into `folder`.

    Members are read as streams and written under their bare, checked names, so nothing in the archive decides where a
    file goes: absolute names, "..", links and devices are never followed.

    Args:
        archive: 2014-01.tgz, or the archive of one pair (de-en.tgz) from elsewhere.
        lang: source language; the target is always English.
        folder: exists already and is empty.
        max_bytes: how much it, and the archive of the pair in it, may unpack to.

    Returns:
        The names written, sorted.

    Raises:
        UserError: not a whole gzip-compressed tar archive, one that unpacks to more, or the pair is not in it.
    """
    pair = f"{lang}-en"
    wanted = re.compile(
        rf"train\.tags\.{pair}\.(?:{lang}|en)|IWSLT14\.[A-Za-z0-9]+\.[A-Za-z0-9]+\.{pair}\.(?:{lang}|en)\.xml"
    )
    seen: set[str] = set()
    with (
        explained(archive, "a whole gzip-compressed tar archive"),
        open(archive, "rb") as stream,
        open_tgz(stream, max_bytes, f"'{archive}'") as outer,
    ):
        written = _extract(outer, pair, wanted, folder, seen, max_bytes, str(archive))
    missing = [f"train.tags.{pair}.{side}" for side in (lang, "en") if f"train.tags.{pair}.{side}" not in written]
    if missing:
        there = ", ".join(sorted(seen)) or "none"
        raise UserError(f"'{archive}' has no {missing[0]}; pairs in it: {there}: give --langs one of them")
    return sorted(written)


def _extract(
    tar: tarfile.TarFile,
    pair: str,
    wanted: re.Pattern[str],
    folder: Path,
    seen: set[str],
    max_bytes: int,
    place: str,
) -> set[str]:
    written: set[str] = set()
    for member in tar:
        parts = PurePosixPath(member.name).parts
        if not is_plain_file(member) or not parts:
            continue
        name = parts[-1]
        pair_archive = re.fullmatch(r"([a-z]{2,3}-en)\.tgz", name)
        pair_text = re.fullmatch(r"train\.tags\.([a-z]{2,3}-en)\.en", name)
        if pair_archive or pair_text:
            seen.add((pair_archive or pair_text).group(1))
        if name == f"{pair}.tgz" and place != name:  # not for ever
            with open_tgz(tar.extractfile(member), max_bytes, f"'{name}' in '{place}'") as inner:
                written |= _extract(inner, pair, wanted, folder, seen, max_bytes, name)
            break
        # The same file may come twice in an archive that was put together by hand: the first one counts.
        if wanted.fullmatch(name) and parts[-2:-1] == (pair,) and name not in written:
            copy(tar.extractfile(member), folder / name, max_bytes, f"'{name}' in '{place}'")
            written.add(name)
    return written


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
