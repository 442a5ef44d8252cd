"""The <seg> lines of XML and SGML sets, and a check that both sides have the same ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from intra_distillation_fairseq.corpus.oddities import Oddities
from intra_distillation_fairseq.corpus.pairs import Pair, unequal
from intra_distillation_fairseq.errors import UserError

_SEGMENT = re.compile("<seg", re.IGNORECASE)
_ID = re.compile(r"<seg\b[^<>]*\bid=\"([0-9]+)\"")
_DOCUMENT = re.compile(r"<doc\b[^<>]*\bdocid=\"([^\"]*)\"", re.IGNORECASE)
_DECLARATION = re.compile("<!(?:DOCTYPE|ENTITY)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Segment:
    """One <seg> line.

    Attributes:
        line: its number in the file, from 1.
        document: number of its document in the file, from 1, and the id of that document.
        id: of the segment.
        text: the line as it is in the file.
    """

    line: int
    document: tuple[int, str]
    id: str
    text: str


def read_segments(lines: Iterable[str], name: str, found: Oddities, taken: Callable[[str], bool]) -> Iterator[Segment]:
    """Yield the <seg> lines of a set. It is read line by line and never parsed, as in the published steps.

    Args:
        lines: all lines of the file.
        name: of the file, for messages.
        found: takes note of what is odd.
        taken: tells whether the published steps take a line for a segment.

    Raises:
        UserError: a line has a segment that those steps would pass over or join to another: a line would be lost.
    """
    document, seen = (0, ""), set()
    for number, line in enumerate(lines, start=1):
        if match := _DOCUMENT.search(line):
            document, seen = (document[0] + 1, match[1]), set()
        if _DECLARATION.search(line):
            found.note("xml_declaration", number)
        segments = len(_SEGMENT.findall(line))
        if not segments:
            continue
        match = _ID.search(line)
        if segments > 1 or not match or not taken(line):
            raise UserError(
                f"'{name}' line {number} has not exactly one '<seg id=\"N\">': the file is not whole, get it again"
            )
        if match[1] in seen:
            found.note("duplicate_segment", number)
        seen.add(match[1])
        if "</seg>" not in line:
            found.note("open_segment", number)
        yield Segment(number, document, match[1], line)


def join_segments(
    sides: tuple[list[Segment], list[Segment]], names: tuple[str, str], found: tuple[Oddities, Oddities]
) -> list[Pair]:
    """Pair the segments of two sets, whose ids must be the same in the same order.

    Raises:
        UserError: they are not; the message has the lines.
    """
    known = [{segment.document[1] for segment in side} for side in sides]
    renamed = set()
    for pair in zip(*sides):
        (number, name), (other_number, other_name) = (segment.document for segment in pair)
        alike = pair[0].id == pair[1].id
        if alike and name != other_name:
            # Another name for the same document shifts nothing. The name of another document of the set does.
            alike = number == other_number and name not in known[1] and other_name not in known[0]
            if alike and number not in renamed:
                renamed.add(number)
                for segment, oddities in zip(pair, found):
                    oddities.note("document_names_differ", segment.line)
        if not alike:
            where = [
                f"'{file}' line {one.line} has segment '{one.id}' of document '{one.document[1]}'"
                for file, one in zip(names, pair)
            ]
            raise UserError(f"{' where '.join(where)}: the sides do not match, get the archive again")
    if len(sides[0]) != len(sides[1]):
        raise unequal(names, [len(side) for side in sides])
    return [(source.text, target.text) for source, target in zip(*sides)]
