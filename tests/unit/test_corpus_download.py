from __future__ import annotations

import gzip
import hashlib
import http.server
import random
import threading

import pytest

from intra_distillation_fairseq.corpus.download import IWSLT14_URLS, Mirror, fetch, fetch_published
from intra_distillation_fairseq.corpus.stages import FileDigests
from intra_distillation_fairseq.corpus.wmt17_archives import ARCHIVES, check_local, find_local
from intra_distillation_fairseq.errors import UserError

ARCHIVE = gzip.compress(random.Random(1).randbytes(3_000_000), mtime=0)
DIGEST = hashlib.sha256(ARCHIVE).hexdigest()


class Server:
    """A web server on this machine.

    Attributes:
        url: of the archive.
        cut: number of answers that still break off half way.
        errors: statuses to answer with, first.
        ranges: whether it can send the rest of a file.
        etag: its mark of the file's version; None for none.
        body: the file.
        kind: its type.
        seen: Range header of each request.
    """

    def __init__(self):
        self.cut, self.errors, self.ranges, self.etag, self.body = 0, [], True, '"1"', ARCHIVE
        self.kind, self.seen, self.length = "application/gzip", [], True
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/2014-01.tgz"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, request):
        self.seen.append(request.headers.get("Range"))
        if self.errors:
            request.send_error(self.errors.pop(0))
            return
        start = 0
        wanted = request.headers.get("Range")
        if wanted == f"bytes={len(self.body)}-" and self.ranges:
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(self.body)}")
            request.end_headers()
            return
        if wanted and self.ranges and request.headers.get("If-Range") == self.etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}")
        request.send_header("Content-Type", self.kind)
        if self.etag:
            request.send_header("ETag", self.etag)
        body = self.body[start:]
        if self.length:
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if self.cut:
            self.cut -= 1
            body = body[: len(body) // 2]
        request.wfile.write(body)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def get(tmp_path):
    """get(url, ...) fetches into tmp_path/a.tgz; said lines are in get.said."""

    def run(*urls):
        fetch(urls, tmp_path / "a.tgz", FileDigests(tmp_path / "known.json"), run.said.append, pause_s=0)
        return (tmp_path / "a.tgz").read_bytes()

    run.said = []
    return run


def files(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != "known.json")


def test_whole(server, get, tmp_path):
    assert get(server.url) == ARCHIVE
    assert (tmp_path / "a.tgz.sha256").read_text() == f"{DIGEST}  a.tgz\n"
    assert files(tmp_path) == ["a.tgz", "a.tgz.sha256"]
    get(server.url)
    assert len(server.seen) == 1  # not fetched twice


def test_file_url(get, tmp_path):
    source = tmp_path / "elsewhere ü.tgz"
    source.write_bytes(ARCHIVE)
    assert get(source.as_uri()) == ARCHIVE


def test_goes_on_where_it_broke_off(server, get):
    server.cut = 2
    assert get(server.url) == ARCHIVE
    half = len(ARCHIVE) // 2
    assert server.seen == [None, f"bytes={half}-", f"bytes={half + (len(ARCHIVE) - half) // 2}-"]
    assert any("the connection ended after" in line or "the connection broke" in line for line in get.said)


def test_a_later_run_goes_on(server, get, tmp_path):
    server.cut = 5
    with pytest.raises(UserError):
        get(server.url)
    part = (tmp_path / "a.tgz.part").stat().st_size
    assert part > 0 and not (tmp_path / "a.tgz").exists()
    assert get(server.url) == ARCHIVE
    assert server.seen[-1] == f"bytes={part}-"


def test_starts_anew_where_the_file_has_changed(server, get, tmp_path):
    server.cut = 5
    with pytest.raises(UserError):
        get(server.url)
    server.body, server.etag = gzip.compress(b"another file"), '"2"'
    assert get(server.url) == server.body


@pytest.mark.parametrize("lacking", ["ranges", "etag"])
def test_starts_anew_where_the_server_cannot_go_on(server, get, lacking):
    setattr(server, lacking, None)
    server.cut = 1
    assert get(server.url) == ARCHIVE


def test_busy_server_is_asked_again(server, get):
    server.errors = [503, 429]
    assert get(server.url) == ARCHIVE
    assert "the server answered 503; again in 0 s (attempt 2 of 5)" in get.said


def test_web_page_is_not_taken_for_the_archive(server, get, tmp_path):
    server.body, server.kind = b"<!DOCTYPE html><html>Quota exceeded</html>", "text/html"
    with pytest.raises(UserError) as error:
        get(server.url)
    assert str(error.value) == (
        f"could not download 'a.tgz' ({server.url}: a web page came instead of the archive (a download quota or a "
        "sign-in)): get it with a browser and give --archive FILE, or give another --url"
    )
    assert len(server.seen) == 1
    assert files(tmp_path) == ["a.tgz.part.json"]


def test_other_bytes_are_not_taken_for_the_archive(server, get):
    server.body, server.kind = b"PK\x03\x04 a zip file", "application/zip"
    with pytest.raises(
        UserError, match=r"what came is no gzip file \(it starts with 50 4b 03 04, type 'application/zip'\)"
    ):
        get(server.url)


def test_cut_archive_is_found_without_a_length(server, get):
    server.length, server.cut = False, 1
    assert get(server.url) == ARCHIVE
    assert any(line.startswith("the archive came damaged") for line in get.said)


def test_next_address_is_tried(server, get, tmp_path):
    assert get((tmp_path / "not there.tgz").as_uri(), server.url) == ARCHIVE
    assert any(line.endswith("not%20there.tgz: no such file") for line in get.said)


def test_missing_everywhere(server, get):
    server.errors = [404]
    with pytest.raises(UserError, match=r"the server answered 404 \(Not Found\)"):
        get(server.url)


def test_checksum_holds_from_the_first_time_on(server, get, tmp_path):
    get(server.url)
    (tmp_path / "a.tgz").write_bytes(gzip.compress(b"tampered"))
    with pytest.raises(UserError) as error:
        get(server.url)
    actual = hashlib.sha256((tmp_path / "a.tgz").read_bytes()).hexdigest()
    assert str(error.value) == (
        f"'{tmp_path / 'a.tgz'}' has the SHA-256 '{actual}', recorded is {DIGEST}: delete the archive to get it again, "
        "or 'a.tgz.sha256' beside it to accept the new one"
    )
    (tmp_path / "a.tgz").unlink()
    assert get(server.url) == ARCHIVE


@pytest.mark.parametrize("url", ["somewhere", "gopher://x", "https://x/a b", "https://x/ü", "https://[x"])
def test_bad_address(get, url):
    with pytest.raises(UserError) as error:
        get(url)
    assert str(error.value) == (
        f"--url '{url}' is not an address: needed is https://... or file:///..., without spaces"
    )


def test_default_addresses_are_whole():
    assert len(set(IWSLT14_URLS)) == 4
    assert all(url.startswith("https://") and "{}" not in url for url in IWSLT14_URLS)


ZIP = b"PK\x03\x04" + random.Random(2).randbytes(1_000_000)
ZIP_DIGEST = hashlib.sha256(ZIP).hexdigest()


@pytest.fixture
def copy():
    """A second server, which has the archive packed again as .zip."""
    server = Server()
    server.body, server.kind, server.url = ZIP, "application/zip", server.url.replace(".tgz", ".zip")
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def published(server, copy, tmp_path):
    """published() fetches from both servers, in order; said lines are in published.said."""

    def run():
        mirrors = (Mirror(server.url, DIGEST), Mirror(copy.url, ZIP_DIGEST))
        digests = FileDigests(tmp_path / "known.json")
        return fetch_published(mirrors, tmp_path, digests, run.said.append, pause_s=0)

    run.said = []
    return run


def test_published_whole(server, copy, published, tmp_path):
    assert published() == (tmp_path / "2014-01.tgz", DIGEST)
    assert files(tmp_path) == ["2014-01.tgz"] and (tmp_path / "2014-01.tgz").read_bytes() == ARCHIVE
    assert published() == (tmp_path / "2014-01.tgz", DIGEST)
    assert len(server.seen) == 1 and not copy.seen  # not fetched twice


def test_published_goes_on_where_it_broke_off(server, published):
    server.cut = 1
    assert published()[1] == DIGEST
    assert server.seen == [None, f"bytes={len(ARCHIVE) // 2}-"]


def test_killed_after_the_last_byte(server, copy, published, tmp_path):
    """All is there but the name: nothing comes twice."""
    server.cut, copy.errors = 5, [404]
    with pytest.raises(UserError):
        published()
    (tmp_path / "2014-01.tgz.part").write_bytes(ARCHIVE)
    assert published() == (tmp_path / "2014-01.tgz", DIGEST)
    assert server.seen[-1] == f"bytes={len(ARCHIVE)}-" and files(tmp_path) == ["2014-01.tgz"]


def test_the_copy_is_taken_where_the_first_always_breaks_off(server, published, tmp_path):
    server.cut = 5
    assert published() == (tmp_path / "2014-01.zip", ZIP_DIGEST)
    assert files(tmp_path) == ["2014-01.zip"]


def test_the_copy_is_taken_where_the_first_has_it_not(server, copy, published, tmp_path):
    server.errors = [404]
    assert published() == (tmp_path / "2014-01.zip", ZIP_DIGEST)
    assert f"{server.url}: the server answered 404 (Not Found)" in published.said
    published()
    assert len(server.seen) == len(copy.seen) == 1  # the copy is there: the first is not asked again


def test_the_copy_is_taken_where_the_first_has_other_bytes(server, published, tmp_path):
    server.body = gzip.compress(b"another archive", mtime=0)
    assert published() == (tmp_path / "2014-01.zip", ZIP_DIGEST)
    actual = hashlib.sha256(server.body).hexdigest()
    assert f"{server.url}: what came has the SHA-256 '{actual}', published is {DIGEST}" in published.said
    assert not list(tmp_path.glob("*.tgz*.part"))


def test_wrong_everywhere(server, copy, published, tmp_path):
    server.body, copy.body = gzip.compress(b"another archive", mtime=0), b"no zip"
    with pytest.raises(UserError) as error:
        published()
    actual = hashlib.sha256(server.body).hexdigest()
    assert str(error.value) == (
        f"could not download '2014-01.tgz' ({server.url}: what came has the SHA-256 '{actual}', published is {DIGEST}; "
        f"{copy.url}: what came is no zip file (it starts with 6e 6f 20 7a, type 'application/zip')): get it with a "
        "browser and give --archives DIR"
    )
    assert not list(tmp_path.glob("2014-01.tgz")) + list(tmp_path.glob("2014-01.zip"))


def test_what_lies_there_is_checked(server, published, tmp_path):
    published()
    (tmp_path / "2014-01.tgz").write_bytes(b"tampered")
    actual = hashlib.sha256(b"tampered").hexdigest()
    with pytest.raises(UserError) as error:
        published()
    assert str(error.value) == (
        f"'{tmp_path / '2014-01.tgz'}' has the SHA-256 '{actual}', published is {DIGEST}: delete it to get it again"
    )


def test_a_full_disk_ends_the_attempts(server, published, monkeypatch):
    def full(*_):
        return open("/dev/full", "ab", buffering=0)

    monkeypatch.setattr("intra_distillation_fairseq.corpus.download.open", full, raising=False)
    with pytest.raises(OSError, match="No space left on device"):
        published()
    assert len(server.seen) == 1


def test_published_archives():
    names = [mirror.name for archive in ARCHIVES for mirror in archive.mirrors]
    assert [name.rsplit(".")[-1] for name in names] == ["tgz", "zip"] * 3 and len(set(names)) == 6
    sums = {mirror.sha256 for archive in ARCHIVES for mirror in archive.mirrors}
    assert len(sums) == 6 and all(len(bytes.fromhex(one)) == 32 for one in sums)
    assert sum(archive.pairs for archive in ARCHIVES) == 4_590_101  # the count of fairseq's script


def test_local_archives(tmp_path):
    europarl, digests = ARCHIVES[0], FileDigests(tmp_path / "known.json")
    with pytest.raises(UserError) as error:
        find_local(europarl, tmp_path)
    assert str(error.value) == (
        f"--archives '{tmp_path}' has no 'training-parallel-europarl-v7.tgz' (nor training-parallel-europarl-v7.zip): "
        "put it there, or leave --archives away to download the archives"
    )
    path = tmp_path / "training-parallel-europarl-v7.zip"
    path.write_bytes(b"mine")
    actual = hashlib.sha256(b"mine").hexdigest()
    with pytest.raises(UserError) as error:
        check_local(europarl, tmp_path, digests, accept_other=False)
    assert str(error.value) == (
        f"'{path}' has the SHA-256 '{actual}', published is {europarl.mirrors[1].sha256}: get it again, or give "
        "--accept-other-archives to take it as it is"
    )
    assert check_local(europarl, tmp_path, digests, accept_other=True) == (path, actual)
