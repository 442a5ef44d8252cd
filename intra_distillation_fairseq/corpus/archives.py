"""Copies chosen files out of a .tgz or .zip archive, whatever else it holds."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from intra_distillation_fairseq.corpus.disk import is_full
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.files import replacing
from intra_distillation_fairseq.progress import Progress

# Far above any corpus here: the largest archive of WMT'17 unpacks to about 3 GB.
MAX_UNPACKED = 50 * 10**9

_BLOCK_BYTES = 1 << 20
# In a tar archive, a member's name and comments: four of the longest paths. What tarfile needs for them, both time and
# memory, grows with the square of their length: half a second and 64 MB here, half an hour for a megabyte.
_HEADER_BYTES = 1 << 14
_ALL_HEADERS_BYTES = 1 << 24  # that is, at most 32,768 members: minutes at worst
_ZIP_MAGIC = b"PK\x03\x04"
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of the others zipfile unpacks a whole block at once


def copy_members(archive: Path, wanted: dict[str, Path], max_bytes: int = MAX_UNPACKED) -> dict[str, int]:
    r"""Copy files out of an archive as streams.

    A file is looked for under its exact name and written, whole or not at all, to the path that the caller gives, so
    nothing in the archive decides where anything goes; a link or device under that name is refused.

    Args:
        archive: a gzip-compressed tar archive or a zip archive; its first bytes tell.
        wanted: name within the archive, such as "training/text.de" -> where to write it.
        max_bytes: how much it may unpack to.

    Returns:
        name within the archive -> its number of lines; text after the last "\n" counts as one.

    Raises:
        UserError: the archive is damaged or of another kind, unpacks to more than `max_bytes`, or a file is not in it
            or is no plain file.
    """
    lines: dict[str, int] = {}
    with explained(archive, "a whole .tgz or .zip archive"):
        with open(archive, "rb") as stream:
            is_zip = stream.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        left = max_bytes
        for name, is_plain, source in (_zip_files if is_zip else _tar_files)(archive, set(wanted), max_bytes):
            if not is_plain:
                raise UserError(f"'{name}' in '{archive}' is no plain file: get the archive again")
            if name not in lines:  # where a name comes twice, the first one counts
                lines[name], size = copy(source, wanted[name], left, f"'{archive}', at '{name}',")
                left -= size
            if len(lines) == len(wanted):
                break
    for name in wanted:
        if name not in lines:
            raise UserError(f"'{archive}' has no '{name}': it is another archive, or not whole; get it again")
    return lines


@contextmanager
def explained(archive: Path, kind: str) -> Iterator[None]:
    """Turn whatever a damaged archive makes tarfile, zipfile and zlib raise in the body into one line.

    Args:
        archive: the file, for the message.
        kind: what it should be.

    Raises:
        UserError: the body failed, but for want of space.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # besides their own errors they raise whatever they stumble over
        if is_full(error):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot read the archive '{archive}' ({error.strerror}): check the path") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"'{archive}' is not {kind} ({reason}): check the path, or get it again") from None


@contextmanager
def open_tgz(stream: IO[bytes], max_bytes: int, what: str) -> Iterator[tarfile.TarFile]:
    """Open a gzip-compressed tar archive, to be read from front to back.

    Args:
        stream: of its bytes.
        max_bytes: how much it may unpack to.
        what: the archive, for the message.

    Raises:
        UserError: in the body, once it unpacks to more.
    """
    with _Unpacked(stream, max_bytes, what) as unpacked, _Tar(fileobj=unpacked) as tar:
        yield tar


def copy(source: IO[bytes], path: Path, max_bytes: int, what: str) -> tuple[int, int]:
    """Write a stream to a file, whole or not at all; returns its numbers of lines and bytes.

    Raises:
        UserError: it has more than `max_bytes`.
    """
    lines, size, last = 0, 0, b"\n"
    with replacing(path) as temporary, open(temporary, "wb") as out:
        while block := source.read(_BLOCK_BYTES):
            size += len(block)
            if size > max_bytes:
                raise _too_much(what, max_bytes)
            out.write(block)
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n"), size


class _Unpacked(gzip.GzipFile):
    """The bytes of a gzip file, as far as `max_bytes`, and never many at once into memory."""

    def __init__(self, stream: IO[bytes], max_bytes: int, what: str):
        super().__init__(fileobj=stream, mode="rb")
        self._max_bytes, self._what = max_bytes, what
        self.header_left: int | None = None  # while the headers of a member are read: bytes that they may still have

    def read(self, size: int = -1) -> bytes:
        if self.header_left is not None:
            if not 0 <= size <= self.header_left:  # tarfile asks for as many as a header says
                raise tarfile.ReadError("a header larger than any name")
            self.header_left -= size
        data = super().read(size)
        if self.tell() > self._max_bytes:
            raise _too_much(self._what, self._max_bytes)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        if offset > self._max_bytes:  # as over a file that is not wanted
            raise _too_much(self._what, self._max_bytes)
        return super().seek(offset, whence)


class _Tar(tarfile.TarFile):
    """Only goes forward, and forgets every member when the next one is asked for."""

    fileobj: _Unpacked
    _headers_left = _ALL_HEADERS_BYTES

    def next(self) -> tarfile.TarInfo | None:
        self.fileobj.header_left = _HEADER_BYTES
        member = super().next()
        self._headers_left -= _HEADER_BYTES - self.fileobj.header_left
        self.fileobj.header_left = None
        self.members.clear()
        self.pax_headers.clear()  # those for all members that follow, which would add up: of no account here
        if self._headers_left < 0:
            raise tarfile.ReadError("more headers than any archive of texts")
        if member is not None and self.offset < member.offset_data:  # its size is negative: for ever, otherwise
            raise tarfile.ReadError("its members lie over each other")
        return member


def _too_much(what: str, max_bytes: int) -> UserError:
    return UserError(
        f"{what} unpacks to more than {max_bytes / 1e9:g} GB: if that is right, give a higher --max-unpacked-gb; else "
        "get it again"
    )


@contextmanager
def _watched(archive: Path) -> Iterator[IO[bytes]]:
    """An archive opened to be read, which shows how far it has been."""
    with (
        _Watched(archive) as raw,
        Progress(f"unpack {archive.name}", max(1, _megabytes(archive.stat().st_size)), "MB") as progress,
    ):
        raw.progress = progress
        yield io.BufferedReader(raw, _BLOCK_BYTES)


class _Watched(io.FileIO):
    progress: Progress

    def readinto(self, buffer: memoryview) -> int | None:
        count = super().readinto(buffer)
        self.progress.show(_megabytes(self.tell()))
        return count


def _megabytes(size: int) -> int:
    return -(-size // 10**6)  # rounded up: a small archive has one, not none


def _tar_files(archive: Path, wanted: set[str], max_bytes: int) -> Iterator[tuple[str, bool, IO[bytes] | None]]:
    with _watched(archive) as stream, open_tgz(stream, max_bytes, f"'{archive}'") as tar:
        for member in tar:
            name = str(PurePosixPath(member.name))  # "./training/text.de" is the same file
            if name in wanted:
                is_plain = is_plain_file(member)
                yield name, is_plain, tar.extractfile(member) if is_plain else None


def is_plain_file(member: tarfile.TarInfo) -> bool:
    """Whether a member has its own bytes in the archive: no link, no device, no holes of any size."""
    return member.isfile() and not member.issparse()


def _zip_files(archive: Path, wanted: set[str], max_bytes: int) -> Iterator[tuple[str, bool, IO[bytes]]]:
    with _watched(archive) as stream, zipfile.ZipFile(stream) as zipped:
        for member in zipped.infolist():
            name = str(PurePosixPath(member.orig_filename))  # `filename` ends at a NUL
            if name in wanted:
                if member.compress_type not in _ZIP_METHODS:
                    method = zipfile.compressor_names.get(member.compress_type, f"method {member.compress_type}")
                    raise UserError(
                        f"'{name}' in '{archive}' is packed with {method}: pack it again with deflate, or get "
                        "the archive elsewhere"
                    )
                kind = stat.S_IFMT(member.external_attr >> 16)
                with zipped.open(member) as source:
                    yield name, not member.is_dir() and kind in (0, stat.S_IFREG), source
