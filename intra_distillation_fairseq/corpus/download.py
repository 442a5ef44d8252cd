"""Fetches an archive: resumed, retried, checked against a published checksum, or else a recorded one."""

from __future__ import annotations

import gzip
import http.client
import os
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from intra_distillation_fairseq.corpus.archives import MAX_UNPACKED
from intra_distillation_fairseq.corpus.disk import is_full
from intra_distillation_fairseq.corpus.stages import FileDigests
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.files import file_sha256, read_json, write_json, write_text
from intra_distillation_fairseq.progress import Progress

# Copies of WIT3's 2014-01.tgz, tried in order: FBK's own, then that of the authors of the published script. The first
# address of each answers without the page that asks whether to go on although the file is too large for a virus scan.
_DRIVE_IDS = ("1GnBarJIbNgEIIDvUyKDtLmv35Qcxg6Ed", "12HrS9S2DEvw746SosPojfgY5I6HXFVEA")
IWSLT14_URLS = tuple(
    address.format(drive_id)
    for drive_id in _DRIVE_IDS
    for address in (
        "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t",
        "https://drive.google.com/uc?id={}&export=download&confirm=t",
    )
)

_MAGIC = {".tgz": ("gzip", b"\x1f\x8b"), ".zip": ("zip", b"PK\x03\x04")}
_ATTEMPTS = 5
_TIMEOUT_S = 60.0
_LEAST_BYTES_PER_S = 5000  # what an old modem gives: the largest archive of WMT'17 takes two days
_LONGEST_WAIT_S = 120.0  # of what a server may ask for
_BLOCK_BYTES = 1 << 16  # what is lost of a connection that breaks

# Ten times the largest archive of WMT'17; nobody has published how large IWSLT'14's is, whose German pair has 20 MB.
MAX_DOWNLOAD = 10 * 10**9


class _TryAgain(Exception):
    """The connection broke; what came so far is kept.

    Args:
        reason: for the message.
        after_s: seconds that the server asks to wait.
    """

    def __init__(self, reason: str, after_s: float = 0.0):
        super().__init__(" ".join(reason.split()))
        self.after_s = after_s


class _GiveUp(Exception):
    """This address has not got the file."""


@dataclass(frozen=True)
class _Limits:
    """As of `fetch`."""

    pause_s: float
    timeout_s: float
    max_bytes: int


@dataclass(frozen=True)
class Mirror:
    """One place where a published file can be had.

    Attributes:
        url: its address; the last part is the file's name.
        sha256: checksum published for the bytes at this address (a repacked copy has another).
    """

    url: str
    sha256: str

    @property
    def name(self) -> str:
        """The file's name, which ends in .tgz or .zip."""
        return PurePosixPath(urllib.parse.urlsplit(self.url).path).name


def fetch_published(
    mirrors: tuple[Mirror, ...],
    folder: Path,
    digests: FileDigests,
    say: Callable[[str], None],
    pause_s: float = 2.0,
    timeout_s: float = _TIMEOUT_S,
    max_bytes: int = MAX_DOWNLOAD,
) -> tuple[Path, str]:
    """Make sure that a file with a published checksum lies in `folder`.

    The bytes go to NAME.part, from where a later run goes on, and get their name once their checksum is right.

    Args:
        mirrors: where it can be had, tried in order.
        folder: where it goes.
        digests: remembers checksums of files that have not changed.
        say: prints one line.
        pause_s: seconds before the second attempt at an address; doubles with each.
        timeout_s: seconds without a byte, or with fewer than 5,000 for each, after which a connection counts as broken.
        max_bytes: a larger file is not taken.

    Returns:
        The file, under its name at the mirror that gave it, and its checksum.

    Raises:
        UserError: no mirror gave it, or what lies there has another checksum.
    """
    for mirror in mirrors:
        path = folder / mirror.name
        if path.exists():
            actual = digests.sha256(path)
            if actual != mirror.sha256:
                raise UserError(
                    f"'{path}' has the SHA-256 '{actual}', published is {mirror.sha256}: delete it to get it again"
                )
            return path, actual
    addresses = [(mirror.url, folder / mirror.name, partial(_check_sha256, mirror.sha256)) for mirror in mirrors]
    path = _fetch_any(addresses, say, _Limits(pause_s, timeout_s, max_bytes), "give --archives DIR")
    return path, next(mirror.sha256 for mirror in mirrors if mirror.name == path.name)


def fetch(
    urls: tuple[str, ...],
    path: Path,
    digests: FileDigests,
    say: Callable[[str], None],
    pause_s: float = 2.0,
    timeout_s: float = _TIMEOUT_S,
    max_bytes: int = MAX_DOWNLOAD,
    max_unpacked: int = MAX_UNPACKED,
) -> None:
    """Make sure that a gzip-compressed archive lies at `path`, whole and with the checksum of the first time.

    The bytes go to `path`.part, from where a later run goes on. Nobody has published a checksum of this archive, so the
    SHA-256 of the first whole download is written to `path`.sha256 and holds from then on.

    Args:
        urls: addresses (http, https, ftp or file), tried in order.
        path: where the archive goes.
        digests: remembers checksums of files that have not changed.
        say: prints one line.
        pause_s: seconds before the second attempt at an address; doubles with each.
        timeout_s: seconds without a byte, or with fewer than 5,000 for each, after which a connection counts as broken.
        max_bytes: a larger file is not taken.
        max_unpacked: nor one that unpacks to more bytes than this.

    Raises:
        UserError: no address gave the archive, or its checksum is not the recorded one.
    """
    record = path.with_name(path.name + ".sha256")
    if not path.exists():
        addresses = [(url, path, partial(_check_gzip, max_unpacked)) for url in urls]
        limits = _Limits(pause_s, timeout_s, max_bytes)
        _fetch_any(addresses, say, limits, "give --archive FILE, or give another --url")
    actual = digests.sha256(path)
    if record.exists():
        expected = (record.read_text(encoding="utf-8").split() or [""])[0]
        if actual != expected:
            raise UserError(
                f"'{path}' has the SHA-256 '{actual}', recorded is {expected}: delete the archive to get it again, or "
                f"'{record.name}' beside it to accept the new one"
            )
        return
    write_text(record, f"{actual}  {path.name}\n")
    say(f"SHA-256 of {path.name}, recorded in {record.name}: {actual}")


def _fetch_any(
    addresses: list[tuple[str, Path, Callable[[Path], None]]],
    say: Callable[[str], None],
    limits: _Limits,
    instead: str,
) -> Path:
    """Try (address, where the file goes, check of the whole file) in order; returns where it is."""
    reasons = []
    for url, path, check in addresses:
        part = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _fetch_one(url, part, check, say, limits)
        except _GiveUp as error:
            reasons.append(f"{url}: {error}")
            say(f"{url}: {error}")
            continue
        os.replace(part, path)
        for _, other, _ in addresses:  # also what another address gave before it broke off
            part = other.with_name(other.name + ".part")
            part.unlink(missing_ok=True)
            _source_file(part).unlink(missing_ok=True)
        return path
    raise UserError(
        f"could not download '{addresses[0][1].name}' ({'; '.join(reasons)}): get it with a browser and {instead}"
    )


def _fetch_one(
    url: str, part: Path, check: Callable[[Path], None], say: Callable[[str], None], limits: _Limits
) -> None:
    say(f"downloading {url}")
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _receive(url, part, limits)
            check(part)
            return
        except _TryAgain as error:
            if attempt == _ATTEMPTS:
                raise _GiveUp(f"{error}, {_ATTEMPTS} times") from None
            wait_s = max(limits.pause_s * 2 ** (attempt - 1), min(error.after_s, _LONGEST_WAIT_S))
            say(f"{error}; again in {wait_s:g} s (attempt {attempt + 1} of {_ATTEMPTS})")
            time.sleep(wait_s)


def _source_file(part: Path) -> Path:
    """Beside a .part: the address it came from and the server's mark of that version of the file."""
    return part.with_name(part.name + ".json")


def _receive(url: str, part: Path, limits: _Limits) -> None:
    """Append to `part` what is missing of it; starts anew where the rest of the same file cannot be had."""
    source = read_json(_source_file(part)) or {}
    have = part.stat().st_size if part.exists() and source.get("url") == url and source.get("mark") else 0
    request = _request(url)
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", source["mark"])
    try:
        with urllib.request.urlopen(request, timeout=limits.timeout_s) as answer:
            resumed = have and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            if answer.status == 206 and (not resumed or mark not in (None, source["mark"])):
                part.unlink(missing_ok=True)  # If-Range was of no account to the server: anew, without a range
                raise _TryAgain("the server sent a part of another file than before")
            have = have if resumed else 0
            length = answer.headers.get("Content-Length")
            # More digits are no length, and more than `int` takes.
            expected = have + int(length) if length and length.isdecimal() and len(length) < 19 else None
            if not resumed:
                part.unlink(missing_ok=True)
                # Only a strong mark vouches that the rest belongs to the same bytes.
                write_json(_source_file(part), {"url": url, "mark": None if (mark or "").startswith("W/") else mark})
            _copy(answer, part, have, expected, limits)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return  # nothing is missing: the last run was killed after the last byte
        if error.code == 416:  # the part is longer than the file: it was of another one
            part.unlink(missing_ok=True)
            raise _TryAgain("the server's file has changed") from None
        if error.code >= 500 or error.code == 429:
            after = error.headers.get("Retry-After") or ""  # a date is taken for nothing
            raise _TryAgain(f"the server answered {error.code}", float(after) if after.isdecimal() else 0.0) from None
        reason = " ".join(str(error.reason).split())  # urllib words a loop of redirections in three lines
        raise _GiveUp(f"the server answered {error.code} ({reason})") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, FileNotFoundError):
            raise _GiveUp("no such file") from None
        if isinstance(error.reason, socket.gaierror):
            raise _GiveUp(f"this host is not to be found from here ({error.reason.strerror})") from None
        raise _TryAgain(f"no connection ({error.reason})") from None
    except (OSError, http.client.HTTPException) as error:
        if is_full(error):
            raise
        raise _TryAgain(f"the connection broke ({error or type(error).__name__})") from None
    except ValueError as error:  # urllib checks no address before it takes it apart
        raise _GiveUp(f"the server names an address that is none ({error})") from None


def _request(url: str) -> urllib.request.Request:
    try:
        scheme = urllib.parse.urlsplit(url).scheme
    except ValueError:
        scheme = ""
    if scheme not in ("http", "https", "ftp", "file") or not url.isascii() or re.search(r"\s", url):
        raise UserError(f"--url '{url}' is not an address: needed is https://... or file:///..., without spaces")
    return urllib.request.Request(url, headers={"User-Agent": "intra-distillation"})


def _copy(answer: http.client.HTTPResponse, part: Path, have: int, expected: int | None, limits: _Limits) -> None:
    too_large = _GiveUp(f"it is larger than {limits.max_bytes / 1e9:g} GB, the most that is taken")
    if expected is not None and expected > limits.max_bytes:
        raise too_large
    most = limits.max_bytes + 1 if expected is None else expected
    with open(part, "ab") as out, Progress("download", (expected or 0) // 10**6, "MB") as progress:
        for block in _blocks(answer, most - have, limits.timeout_s):
            if not have:
                _check_magic(block, answer.headers.get("Content-Type", ""), part)
            out.write(block)
            out.flush()
            have += len(block)
            progress.show(have // 10**6)
    if have > limits.max_bytes:
        part.unlink()
        raise too_large
    if not have:  # an empty file would even pass for a gzip file
        raise _TryAgain("the server sent nothing")
    if expected is not None and have < expected:
        raise _TryAgain(f"the connection ended after {have:,} of {expected:,} bytes")


def _blocks(answer: http.client.HTTPResponse, most: int, timeout_s: float) -> Iterator[bytes]:
    """What comes, as far as `most` bytes, and no more slowly than `_LEAST_BYTES_PER_S` within any `timeout_s`."""
    block = bytearray()
    began, came = time.monotonic(), 0
    while most > 0 and (some := answer.read1(min(_BLOCK_BYTES - len(block), most))):  # what is there, not all of it
        block += some
        most -= len(some)
        came += len(some)
        if len(block) == _BLOCK_BYTES:
            yield bytes(block)
            block.clear()
        waited_s = time.monotonic() - began
        if waited_s >= timeout_s:
            if most and came < _LEAST_BYTES_PER_S * timeout_s:
                raise _TryAgain(f"only {came:,} bytes came within {waited_s:.0f} s")
            began, came = time.monotonic(), 0
    if block:
        yield bytes(block)


def _check_magic(block: bytes, content_type: str, part: Path) -> None:
    kind, magic = _MAGIC[Path(part.stem).suffix]
    if block.startswith(magic):
        return
    part.unlink(missing_ok=True)
    if b"<html" in block[:2000].lower() or b"<!doctype html" in block[:2000].lower():
        raise _GiveUp("a web page came instead of the archive (a download quota or a sign-in)")
    raise _GiveUp(f"what came is no {kind} file (it starts with {block[:4].hex(' ')}, type '{content_type}')")


def _check_sha256(published: str, part: Path) -> None:
    actual = file_sha256(part)
    if actual != published:
        part.unlink()
        raise _GiveUp(f"what came has the SHA-256 '{actual}', published is {published}")


def _check_gzip(max_unpacked: int, part: Path) -> None:
    """Read it through: gzip's own checksum finds a cut or a flaw, where the server gave no length."""
    unpacked = 0
    try:
        with gzip.open(part, "rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                unpacked += len(block)
                if unpacked > max_unpacked:
                    raise _GiveUp(
                        f"it unpacks to more than {max_unpacked / 1e9:g} GB: if that is right, give a higher "
                        "--max-unpacked-gb"
                    )
    except (OSError, EOFError, zlib.error) as error:
        part.unlink(missing_ok=True)
        raise _TryAgain(f"the archive came damaged ({error})") from None
