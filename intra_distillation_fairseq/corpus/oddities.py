"""What is odd in the lines of a text: counted by kind and file, for a report beside the data."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.corpus.clean import LINE_BREAKS, is_empty, not_utf8, open_text
from intra_distillation_fairseq.corpus.workers import map_in_order
from intra_distillation_fairseq.files import write_json

REPORT = "oddities.json"

# Kind -> what it is, and what becomes of the line (docs/data.md has the table).
KINDS = {
    "invalid_utf8": "not UTF-8: U+FFFD put for the bytes (--replace-invalid-utf8)",
    "byte_order_mark": "byte order mark at the start of the file: dropped",
    "byte_order_mark_within": "byte order mark within the text: kept",
    "crlf": r"line ends with \r\n: counts as \n",
    "carriage_return": r"\r within the line: a space put for it",
    "line_separator": "VT, FF, FS, GS, RS, U+0085, U+2028 or U+2029 within the line: a space put for it",
    "nul": "NUL: kept",
    "control": "other control characters: kept",
    "tab": "tab: kept",
    "bidi_mark": "marks for the direction of writing: kept",
    "zero_width": "characters without width: kept",
    "long_line": "more than 10,000 characters: kept, unless a length filter leaves the pair out",
    "empty": "empty: pair left out of train and valid, kept in test",
    "only_spaces": "nothing but spaces: pair left out of train and valid, kept in test",
    "no_final_newline": "no newline after the last line: it counts as a line",
    "tag_in_text": "<url>, <talkid> or <keywords> within a line of text: pair left out",
    "talk_on_one_side": "talk id that the other side does not have: passed over",
    "document_names_differ": "document with another id on the other side: kept",
    "duplicate_segment": "second segment of this id in its document, on both sides: kept",
    "open_segment": "segment that does not end on its line: what stands on the line is kept",
    "xml_declaration": "DOCTYPE or ENTITY: passed over, no entity is ever replaced",
}
_LONG = 10_000
_FIRST_LINES = 5
_BLOCK_BYTES = 1 << 20

_CHARACTERS = {
    "carriage_return": "\r",
    "line_separator": "".join(set(LINE_BREAKS) - {"\r"}),
    "nul": "\0",
    "tab": "\t",
    "byte_order_mark_within": "\ufeff",
    "bidi_mark": "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
    "zero_width": "\u00ad\u180e\u200b\u200c\u200d\u2060",
}
_KIND_OF = {character: kind for kind, characters in _CHARACTERS.items() for character in characters}
_CONTROLS = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))} - {"\n"}
_KIND_OF |= dict.fromkeys(_CONTROLS - _KIND_OF.keys(), "control")
_ODD = re.compile(f"[{re.escape(''.join(sorted(_KIND_OF)))}]")


@dataclass
class Oddities:
    """What was found in one file.

    Attributes:
        lines: of the file.
        kinds: kind (a key of KINDS) -> number of lines, and the numbers of the first of them.
    """

    lines: int = 0
    kinds: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    def note(self, kind: str, line: int) -> None:
        """Count a line, numbered from 1."""
        count, first = self.kinds.get(kind, (0, []))
        self.kinds[kind] = (count + 1, [*first, line] if count < _FIRST_LINES else first)

    def as_json(self) -> dict[str, Any]:
        """`lines`, and each kind that occurs with its number of `lines` and the `first` of them."""
        found = {kind: self.kinds[kind] for kind in KINDS if kind in self.kinds}
        return {"lines": self.lines} | {kind: {"lines": n, "first": first} for kind, (n, first) in found.items()}


def scan(path: Path, replace_invalid: bool = False) -> Oddities:
    r"""Look at every line of a text file (gzip-compressed if its name ends in .gz), split at "\n" only.

    Raises:
        UserError: a line is not UTF-8 and `replace_invalid` is not set, or the gzip file is damaged.
    """
    found, raw = Oddities(), b"\n"
    with open_text(path) as stream:
        while block := stream.readlines(_BLOCK_BYTES):
            if not found.lines and block[0].startswith(codecs.BOM_UTF8):
                found.note("byte_order_mark", 1)
                block[0] = block[0][len(codecs.BOM_UTF8) :]
            raw = block[-1]
            if not _is_plain(block):
                for number, line in enumerate(block, start=found.lines + 1):
                    _look(line, number, found, str(path), replace_invalid)
            found.lines += len(block)
    if not raw.endswith(b"\n"):
        found.note("no_final_newline", found.lines)
    return found


def _is_plain(block: list[bytes]) -> bool:
    """Tell quickly that no line of a block is odd, which holds for most blocks of most texts."""
    try:
        text = b"".join(block).decode()
    except UnicodeDecodeError:
        return False
    lines = text.removesuffix("\n").split("\n")
    return not (_ODD.search(text) or max(map(len, lines)) > _LONG or any(map(is_empty, lines)))


def _look(raw: bytes, number: int, found: Oddities, name: str, replace_invalid: bool) -> None:
    raw = raw.removesuffix(b"\n")
    if raw.endswith(b"\r"):
        found.note("crlf", number)
        raw = raw[:-1]
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        if not replace_invalid:
            raise not_utf8(name, number, raw, error) from None
        found.note("invalid_utf8", number)
        line = raw.decode(errors="replace")
    for kind in sorted({_KIND_OF[character] for character in set(_ODD.findall(line))}):
        found.note(kind, number)
    if not line:
        found.note("empty", number)
    elif is_empty(line):
        found.note("only_spaces", number)
    if len(line) > _LONG:
        found.note("long_line", number)


def scan_all(files: Mapping[str, Path], jobs: int, replace_invalid: bool = False) -> dict[str, Oddities]:
    """Scan files in parallel; see `scan`.

    Args:
        files: name for the report -> path.
        jobs: most processes.
        replace_invalid: see `scan`.
    """
    function = partial(scan, replace_invalid=replace_invalid)
    return dict(zip(files, map_in_order(function, files.values(), max(1, min(jobs, len(files))))))


def write_report(folder: Path, files: Mapping[str, dict[str, Any]], left_out: dict[str, int]) -> dict[str, int]:
    """Write oddities.json, which depends on the text alone.

    Args:
        folder: where.
        files: name -> `Oddities.as_json` of each file that was read.
        left_out: split -> pairs that cleaning left out.

    Returns:
        kind -> lines of all files, for a stamp and `summary`.
    """
    totals = {kind: sum(file[kind]["lines"] for file in files.values() if kind in file) for kind in KINDS}
    totals = {kind: lines for kind, lines in totals.items() if lines}
    meaning = {kind: KINDS[kind] for kind in totals}
    write_json(folder / REPORT, {"kinds": meaning, "pairs_left_out": left_out, "lines": totals, "files": dict(files)})
    return totals


def summary(totals: Mapping[str, int], folder: Path) -> str:
    """One line that tells what was found; `totals` as `write_report` returns them."""
    kinds = ", ".join(f"{kind} {lines:,}" for kind, lines in totals.items())
    return f"  odd lines: {kinds}; which ones, and what became of them: {folder / REPORT}"
