"""Names of folders and files that fairseq would read as something else than a path."""

from __future__ import annotations

from pathlib import Path

from intra_distillation_fairseq.errors import UserError

# Spaces, quotes, other alphabets and the like are no trouble: nothing of a path goes through a shell.
_TROUBLE = {
    "\n": "a line break, which logs and records name files without",
    ":": "':', where fairseq would split it into several paths",
    "${": "'${', which fairseq would read as the name of a setting",
}


def check_for_fairseq(what: str, path: Path) -> None:
    """Refuse a path that fairseq cannot be given, before anything is written there.

    Args:
        what: a flag, or what the path is, for the message.
        path: relative ones are judged with the folder they are in, since fairseq gets absolute ones.

    Raises:
        UserError: it holds a line break, a colon or the beginning of an interpolation, or is not UTF-8.
    """
    whole = str(path.resolve())
    shown = whole.replace("\n", "\\n").encode(errors="backslashreplace").decode()
    why = next((why for text, why in _TROUBLE.items() if text in whole), "")
    if any("\ud800" <= character <= "\udfff" for character in whole):  # how Python holds what it cannot decode
        why = "bytes that are not UTF-8, which no record could hold"
    if why:
        raise UserError(f"{what} '{shown}' has {why}: give another one, or rename it")
