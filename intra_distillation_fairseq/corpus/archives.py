"""Copies chosen files out of a .tgz or .zip archive."""

from __future__ import annotations

import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from intra_distillation_fairseq.errors import UserError

_BLOCK_BYTES = 1 << 20
_ZIP_MAGIC = b"PK\x03\x04"


def copy_members(archive: Path, wanted: dict[str, Path]) -> dict[str, int]:
    r"""Copy files out of an archive as streams.

    A file is looked for under its exact name and written to the path that the caller gives, so nothing in the archive
    decides where anything goes; a link or device under that name is refused.

    Args:
        archive: a gzip-compressed tar archive or a zip archive; its first bytes tell.
        wanted: name within the archive, such as "training/text.de" -> where to write it.

    Returns:
        name within the archive -> its number of lines; text after the last "\n" counts as one.

    Raises:
        UserError: the archive is damaged or of another kind, or a file is not in it or is no plain file.
    """
    lines: dict[str, int] = {}
    with _explained(archive):
        with open(archive, "rb") as stream:
            is_zip = stream.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        for name, is_plain, source in (_zip_files if is_zip else _tar_files)(archive, set(wanted)):
            if not is_plain:
                raise UserError(f"'{name}' in '{archive}' is no plain file: get the archive again")
            if name not in lines:  # where a name comes twice, the first one counts
                lines[name] = _copy(source, wanted[name])
            if len(lines) == len(wanted):
                break
    for name in wanted:
        if name not in lines:
            raise UserError(f"'{archive}' has no '{name}': it is another archive, or not whole; get it again")
    return lines


@contextmanager
def _explained(archive: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot read the archive '{archive}' ({error.strerror}): check the path") from None
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError) as error:
        raise UserError(
            f"'{archive}' is not a whole .tgz or .zip archive ({error}): check the path, or get it again"
        ) from None


def _tar_files(archive: Path, wanted: set[str]) -> Iterator[tuple[str, bool, IO[bytes] | None]]:
    with open(archive, "rb") as stream, tarfile.open(fileobj=stream, mode="r|gz", bufsize=_BLOCK_BYTES) as tar:
        for member in tar:
            name = str(PurePosixPath(member.name))  # "./training/text.de" is the same file
            if name in wanted:
                yield name, member.isfile(), tar.extractfile(member) if member.isfile() else None


def _zip_files(archive: Path, wanted: set[str]) -> Iterator[tuple[str, bool, IO[bytes]]]:
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.infolist():
            name = str(PurePosixPath(member.filename))
            if name in wanted:
                kind = stat.S_IFMT(member.external_attr >> 16)
                with zipped.open(member) as source:
                    yield name, not member.is_dir() and kind in (0, stat.S_IFREG), source


def _copy(source: IO[bytes], path: Path) -> int:
    lines, last = 0, b"\n"
    with open(path, "wb") as out:
        while block := source.read(_BLOCK_BYTES):
            out.write(block)
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n")
