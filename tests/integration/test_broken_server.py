"""A server that breaks off, lies or stalls: every download ends in a whole, checked file or in one line."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.server
import random
import re
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from wit3_sample import pair_files, write_archive

from intra_distillation_fairseq.cli import main
from intra_distillation_fairseq.corpus import download
from intra_distillation_fairseq.corpus.download import Mirror, fetch, fetch_published
from intra_distillation_fairseq.corpus.stages import FileDigests
from intra_distillation_fairseq.errors import UserError

BODY = gzip.compress(random.Random(1).randbytes(2_500_000), mtime=0)
DIGEST = hashlib.sha256(BODY).hexdigest()
OTHER = gzip.compress(random.Random(2).randbytes(2_500_000), mtime=0)
MOST = 4_000_000  # what a download may have here
PAGE = b"<!DOCTYPE html><html>Sign in</html>"


class Answer(http.server.BaseHTTPRequestHandler):
    """One request, with the ways of a broken server.

    Attributes:
        start: first byte that was asked for.
    """

    def do_GET(self):
        server: Server = self.server.owner
        asked = self.headers.get("Range")
        self.start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        server.asked.append((self.path, asked))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has seen enough
            (server.ways.pop(0) if len(server.ways) > 1 else server.ways[0])(self)

    def log_message(self, *_):
        pass

    def give(self, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"ETag": '"1"', "Content-Type": "application/gzip", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


class Server:
    """A web server on this machine.

    Attributes:
        url: of the archive.
        ways: how it answers the requests, in order; the last one again and again.
        asked: path and Range header of each request.
        is_emptied: somebody took all of what should have no end.
    """

    def __init__(self, *ways: Callable[[Answer], None]):
        self.ways, self.asked, self.is_emptied = list(ways), [], False
        self.stalled = threading.Event()
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.http.owner = self
        self.url = f"http://127.0.0.1:{self.http.server_port}/2014-01.tgz"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.stalled.set()
        self.http.shutdown()
        self.http.server_close()


def good(answer: Answer, body: bytes = BODY, etag: str = '"1"') -> None:
    if answer.start and answer.headers.get("If-Range") == etag:
        where = f"bytes {answer.start}-{len(body) - 1}/{len(body)}"
        answer.give(body[answer.start :], 206, Content_Range=where, ETag=etag)
    else:
        answer.give(body, ETag=etag)


def no_ranges(answer: Answer) -> None:
    answer.give(BODY)


def changed(answer: Answer) -> None:
    good(answer, OTHER, '"2"')


def changed_without_a_mark(answer: Answer) -> None:
    """Another file under the old mark."""
    good(answer, OTHER)


def deaf_to_if_range(answer: Answer) -> None:
    """The rest of another file, which was not asked for."""
    if not answer.start:
        return good(answer)
    where = f"bytes {answer.start}-{len(OTHER) - 1}/{len(OTHER)}"
    return answer.give(OTHER[answer.start :], 206, Content_Range=where, ETag='"2"')


def another_part(answer: Answer) -> None:
    if not answer.start:
        return good(answer)
    return answer.give(BODY[5:], 206, Content_Range=f"bytes 5-{len(BODY) - 1}/{len(BODY)}")


def cut(answer: Answer) -> None:
    """Half of what is missing."""
    rest = BODY[answer.start :]
    where = {"Content_Range": f"bytes {answer.start}-{len(BODY) - 1}/{len(BODY)}"} if answer.start else {}
    answer.give(rest[: len(rest) // 2], 206 if answer.start else 200, len(rest), **where)


def reset(answer: Answer) -> None:
    """Half, and then a reset of the connection rather than its end."""
    cut(answer)
    answer.wfile.flush()
    answer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    answer.connection.close()


def reset_at_once(answer: Answer) -> None:
    answer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    answer.connection.close()


def stall(answer: Answer) -> None:
    cut(answer)
    answer.wfile.flush()
    answer.server.owner.stalled.wait(60)


def drip(answer: Answer) -> None:
    """Half, and then a byte now and then."""
    cut(answer)
    while not answer.server.owner.stalled.wait(0.05):
        answer.wfile.write(b"\0")


def drip_from_the_start(answer: Answer) -> None:
    answer.send_response(200)
    answer.end_headers()
    for byte in BODY:
        answer.wfile.write(bytes([byte]))
        if answer.server.owner.stalled.wait(0.05):
            break


def stall_at_once(answer: Answer) -> None:
    answer.server.owner.stalled.wait(60)


def longer(answer: Answer) -> None:
    answer.give(BODY, length=len(BODY) + 1000)


def shorter(answer: Answer) -> None:
    answer.give(BODY, length=len(BODY) - 1000)


def no_length(answer: Answer) -> None:
    """The end of the connection is the end of the file, or not."""
    answer.send_response(200)
    answer.send_header("ETag", '"1"')
    answer.end_headers()
    answer.wfile.write(BODY[: len(BODY) // 2])


def without_end(answer: Answer) -> None:
    answer.send_response(200)
    answer.end_headers()
    write_without_end(answer, BODY)


def chunks_without_end(answer: Answer) -> None:
    chunked(answer)
    write_without_end(answer, b"%x\r\n%b\r\n" % (len(BODY), BODY))


def more_than_its_length(answer: Answer) -> None:
    """In chunks, for which the length is of no account."""
    chunked(answer, len(BODY))
    write_without_end(answer, b"%x\r\n%b\r\n" % (len(BODY), BODY))


def too_long(answer: Answer) -> None:
    answer.give(BODY, length=MOST + 1)


def length_of_5000_digits(answer: Answer) -> None:
    """More than Python makes a number of; the end of the connection is the end of the file."""
    answer.send_response(200)
    answer.send_header("Content-Length", "9" * 5000)
    answer.end_headers()
    answer.wfile.write(BODY)


def nothing(answer: Answer) -> None:
    answer.give(b"")


def busy(answer: Answer) -> None:
    answer.give(b"", 503)


def busy_for_long(answer: Answer) -> None:
    answer.give(b"", 503, Retry_After="7")


def busy_for_ages(answer: Answer) -> None:
    answer.give(b"", 429, Retry_After="86400")


def busy_till_a_date(answer: Answer) -> None:
    answer.give(b"", 503, Retry_After="Fri, 31 Dec 2100 23:59:59 GMT")


def page(answer: Answer) -> None:
    answer.give(PAGE, Content_Type="text/html")


def page_as_archive(answer: Answer) -> None:
    answer.give(gzip.compress(PAGE))


def to_a_page(answer: Answer) -> None:
    page(answer) if answer.path == "/login" else answer.give(b"", 302, Location="/login")


def to_itself(answer: Answer) -> None:
    answer.give(b"", 302, Location=answer.path)


def to_a_file(answer: Answer) -> None:
    answer.give(b"", 302, Location="file:///etc/passwd")


def to_nowhere(answer: Answer) -> None:
    answer.give(b"", 302, Location="http://[")


def to_no_name(answer: Answer) -> None:
    answer.give(b"", 302, Location="http://" + "a" * 70 + "/")


def to_the_file(answer: Answer) -> None:
    good(answer) if answer.path == "/there" else answer.give(b"", 302, Location="/there")


def garbage(answer: Answer) -> None:
    answer.wfile.write(b"\0\1\2 no HTTP\n\n")


def chunked(answer: Answer, length: int | None = None) -> None:
    answer.protocol_version = "HTTP/1.1"
    answer.send_response(200)
    answer.send_header("Transfer-Encoding", "chunked")
    if length is not None:
        answer.send_header("Content-Length", str(length))
    answer.end_headers()


def write_without_end(answer: Answer, body: bytes) -> None:
    for _ in range(20):  # far beyond what is taken, but not the whole disk where nothing stops it
        answer.wfile.write(body)
    answer.server.owner.is_emptied = True


def chunks_that_end(answer: Answer) -> None:
    chunked(answer)
    answer.wfile.write(b"100000\r\n" + BODY[:5000])


def wrong(answer: Answer) -> None:
    good(answer, OTHER)


@pytest.fixture
def serve():
    """serve(way, ...) starts a server."""
    servers = []

    def start(*ways: Callable[[Answer], None]) -> Server:
        servers.append(Server(*ways))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The pauses between attempts, which are not made."""
    waited: list[float] = []
    monkeypatch.setattr(download.time, "sleep", waited.append)
    return waited


@pytest.fixture(params=["published checksum", "first time"])
def get(request, tmp_path, waits):
    """get(server) downloads with a checksum or without one; the lines said are in get.said."""

    def run(*servers: Server) -> bytes:
        digests, path = FileDigests(tmp_path / "known.json"), tmp_path / "2014-01.tgz"
        slow = (stall, stall_at_once, drip, drip_from_the_start)
        seconds = 0.5 if any(way in slow for server in servers for way in server.ways) else 30.0
        if request.param == "first time":
            fetch(
                tuple(server.url for server in servers),
                path,
                digests,
                run.said.append,
                timeout_s=seconds,
                max_bytes=MOST,
            )
        else:
            mirrors = tuple(Mirror(server.url, DIGEST) for server in servers)
            fetch_published(mirrors, tmp_path, digests, run.said.append, timeout_s=seconds, max_bytes=MOST)
        return path.read_bytes()

    run.said, run.has_checksum = [], request.param != "first time"
    return run


def refused(get, tmp_path: Path, *servers: Server) -> str:
    with pytest.raises(UserError) as error:
        get(*servers)
    assert not (tmp_path / "2014-01.tgz").exists()
    assert not (tmp_path / "2014-01.tgz.sha256").exists()
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("could not download '2014-01.tgz' (") and "get it with a browser and give" in message
    return message


RECOVERING = [
    (cut,), (reset,), (reset_at_once,), (stall_at_once,), (stall,), (busy,), (nothing,), (garbage,),
    (chunks_that_end,), (longer,), (cut, cut, cut), (cut, busy, reset, stall), (cut, no_ranges), (cut, another_part), (cut, deaf_to_if_range),
    (drip,), (drip_from_the_start,), (cut, length_of_5000_digits), (length_of_5000_digits,),
    (busy_till_a_date,), (to_the_file,), (reset, longer), (stall, busy, cut, reset_at_once),
]  # fmt: skip


def names(ways: tuple[Callable, ...]) -> str:
    return ", ".join(way.__name__ for way in ways)


@pytest.mark.parametrize("ways", RECOVERING, ids=names)
def test_a_server_that_recovers_gives_the_whole_file(serve, get, tmp_path, ways, record_property):
    assert get(serve(*ways, good)) == BODY
    assert not list(tmp_path.glob("*.part*"))
    record_property("downloads broken", 1)


REFUSED = [
    (cut, "the connection ended after"),
    (reset, "the connection broke|the connection ended after"),
    (reset_at_once, "the connection broke|no connection"),
    (stall, "the connection broke|the connection ended after"),
    (stall_at_once, "timed out"),
    (busy, "the server answered 503, 5 times"),
    (page, "a web page came instead of the archive"),
    (to_a_page, "a web page came instead of the archive"),
    (to_itself, r"the server answered 302 \(The HTTP server returned a redirect error"),
    (to_a_file, r"the server answered 302 .*not allowed"),
    (garbage, "the connection broke"),
    (longer, "the connection ended after|the server sent a part|answered 416"),
    (no_length, "what came has the SHA-256|the archive came damaged"),
    (nothing, "the server sent nothing, 5 times"),
    (shorter, "what came has the SHA-256|the archive came damaged"),
    (chunks_that_end, "the connection broke"),
    (drip_from_the_start, "only [0-9,]+ bytes came within 1 s, 5 times"),
    (without_end, "it is larger than 0.004 GB, the most that is taken"),
    (chunks_without_end, "it is larger than 0.004 GB, the most that is taken"),
    (too_long, "it is larger than 0.004 GB, the most that is taken"),
    (to_nowhere, r"the server names an address that is none \(Invalid IPv6 URL\)"),
    (to_no_name, r"the server names an address that is none \(.*label.* too long"),
]


@pytest.mark.parametrize(("way", "reason"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_server_that_stays_broken_ends_in_one_line(serve, get, tmp_path, way, reason, record_property):
    assert re.search(reason, refused(get, tmp_path, serve(way)))
    assert get(serve(good)) == BODY  # what it left does no harm
    record_property("downloads broken", 1)


def test_nobody_listens(get, tmp_path, serve):
    server = serve(good)
    server.close()
    assert "no connection ([Errno 111] Connection refused), 5 times" in refused(get, tmp_path, server)


def test_a_rest_is_asked_for(serve, get):
    server = serve(cut, good)
    get(server)
    assert [asked for _, asked in server.asked] == [None, f"bytes={len(BODY) // 2}-"]


def test_a_rest_of_another_file_is_never_taken(serve, get, tmp_path):
    """Changed between two attempts: with another mark it starts anew; under the old one, a checksum finds it."""
    changed_file = serve(cut, changed)
    if get.has_checksum:
        assert "what came has the SHA-256" in refused(get, tmp_path, changed_file)
    else:
        assert get(changed_file) == OTHER
    (tmp_path / "2014-01.tgz").unlink(missing_ok=True)
    (tmp_path / "2014-01.tgz.sha256").unlink(missing_ok=True)
    mixed = serve(cut, changed_without_a_mark)
    if get.has_checksum:
        assert "what came has the SHA-256" in refused(get, tmp_path, mixed)
    else:
        assert get(mixed) == OTHER
        assert any("the archive came damaged" in line for line in get.said)


def test_the_next_server_is_asked(serve, get):
    assert get(serve(page), serve(cut, reset, stall, busy), serve(good)) == BODY


@pytest.mark.parametrize(
    ("way", "seconds"), [(busy, 2.0), (busy_for_long, 7.0), (busy_for_ages, 120.0), (busy_till_a_date, 2.0)]
)
def test_a_busy_server_says_when_to_come_again(serve, get, waits, way, seconds):
    get(serve(way, good))
    assert waits == [seconds]
    assert f"; again in {seconds:g} s (attempt 2 of 5)" in get.said[1]


def test_pauses_grow(serve, get, tmp_path, waits):
    refused(get, tmp_path, serve(busy))
    assert waits == [2.0, 4.0, 8.0, 16.0]


def test_nothing_is_taken_beyond_the_length(serve, get):
    server = serve(more_than_its_length)
    assert get(server) == BODY and len(server.asked) == 1 and not server.is_emptied


@pytest.mark.parametrize("way", [without_end, chunks_without_end, too_long])
def test_nothing_is_left_of_what_is_too_large(serve, get, tmp_path, way):
    server = serve(way)
    refused(get, tmp_path, server)
    assert len(server.asked) == 1 and not server.is_emptied and not list(tmp_path.glob("*.part"))


def test_what_unpacks_to_too_much_is_not_taken(serve, tmp_path):
    """And read no further than that; with a higher limit, it does not come twice."""
    server = serve(lambda answer: good(answer, gzip.compress(bytes(9_000_000))))
    digests, path = FileDigests(tmp_path / "known.json"), tmp_path / "2014-01.tgz"
    with pytest.raises(UserError) as error:
        fetch((server.url,), path, digests, lambda line: None, max_unpacked=5_000_000)
    assert str(error.value) == (
        f"could not download '2014-01.tgz' ({server.url}: it unpacks to more than 0.005 GB: if that is right, give a "
        "higher --max-unpacked-gb): get it with a browser and give --archive FILE, or give another --url"
    )
    assert not path.exists()
    fetch((server.url,), path, digests, lambda line: None, max_unpacked=10_000_000)
    assert path.exists() and len(server.asked) == 2 and server.asked[1][1] == f"bytes={path.stat().st_size}-"


# -- through the command


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> bytes:
    path = write_archive(tmp_path_factory.mktemp("archive") / "a.tgz", {"de": pair_files("de")})
    return path.read_bytes()


def prepare(server: Server, out: Path, capfd, *flags: str) -> tuple[int, str]:
    words = ["prepare-iwslt14", "--langs", "de", "--url", server.url, "--out", str(out), "--vocab-size", "60"]
    status = main.main([*words, "--jobs", "1", *flags])
    return status, capfd.readouterr().err


def test_prepare_goes_on_after_a_broken_download(serve, tmp_path, waits, archive, capfd):
    def half(answer: Answer) -> None:
        answer.give(archive[: len(archive) // 2], length=len(archive))

    server = serve(busy, half, lambda answer: good(answer, archive))
    status, said = prepare(server, tmp_path / "data é", capfd)
    assert status == 0, said
    assert (tmp_path / "data é" / "download" / "2014-01.tgz").read_bytes() == archive
    assert server.asked[-1] == ("/2014-01.tgz", f"bytes={len(archive) // 2}-")
    assert (tmp_path / "data é" / "de-en" / "manifest.json").is_file()


@pytest.mark.parametrize("way", [page, to_itself, page_as_archive, reset_at_once, shorter])
def test_prepare_says_in_one_line_what_is_wrong(serve, tmp_path, waits, capfd, way):
    status, said = prepare(serve(way), tmp_path / "data", capfd)
    assert status == 2
    last = said.rstrip("\n").split("\n")[-1]
    assert last.startswith("intra-distillation prepare-iwslt14: error: ") and "Traceback" not in said
    assert "could not download '2014-01.tgz'" in last or "is not a whole gzip-compressed tar archive" in last
    assert not list((tmp_path / "data").rglob("manifest.json"))


def test_prepare_takes_the_limit_for_the_download_too(serve, tmp_path, archive, capfd):
    status, said = prepare(
        serve(lambda answer: good(answer, archive)), tmp_path / "data", capfd, "--max-unpacked-gb", "1e-6"
    )
    assert status == 2
    assert "/2014-01.tgz: it unpacks to more than 1e-06 GB: if that is right, give a higher --max-unpacked-gb)" in said
