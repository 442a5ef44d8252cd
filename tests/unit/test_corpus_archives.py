from __future__ import annotations

import gzip
import io
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from wit3_sample import pair_files, tgz, write_archive

from intra_distillation_fairseq.cli.prepare_options import max_unpacked
from intra_distillation_fairseq.corpus import archives, wit3
from intra_distillation_fairseq.corpus.archives import copy_members
from intra_distillation_fairseq.errors import UserError

TEXT = {"training/a.de": "eins\nzwei\n", "training/a.en": "one\ntwo\nthree", "other.de": "x\n"}


def as_zip(members: dict[str, str], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as zipped:
        for name, text in members.items():
            zipped.writestr(name, text)
    return buffer.getvalue()


@pytest.fixture
def wanted(tmp_path):
    (tmp_path / "out").mkdir()
    return {f"training/a.{lang}": tmp_path / "out" / lang for lang in ("de", "en")}


def copied(tmp_path):
    return {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("pack", [tgz, as_zip, lambda members: tgz({f"./{n}": t for n, t in members.items()})])
def test_only_what_is_wanted(tmp_path, wanted, pack):
    (tmp_path / "a").write_bytes(pack(TEXT))
    assert copy_members(tmp_path / "a", wanted) == {"training/a.de": 2, "training/a.en": 3}
    assert copied(tmp_path) == {"de": TEXT["training/a.de"], "en": TEXT["training/a.en"]}


@pytest.mark.parametrize("pack", [tgz, as_zip])
def test_no_other_name_will_do(tmp_path, wanted, pack):
    """Nothing outside the wanted paths is written, whatever the archive calls it."""
    names = ["../training/a.de", "/training/a.de", "x/training/a.de", "training/../training/a.de", "training/a.de/x"]
    (tmp_path / "a").write_bytes(pack({**dict.fromkeys(names, "wrong\n"), "training/a.en": "one\n"}))
    message = f"'{tmp_path / 'a'}' has no 'training/a.de': it is another archive, or not whole; get it again"
    with pytest.raises(UserError, match=re.escape(message)):
        copy_members(tmp_path / "a", wanted)
    assert copied(tmp_path) == {"en": "one\n"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, "zip"])
def test_links_and_devices_are_refused(tmp_path, wanted, kind):
    (tmp_path / "secret").write_text("secret\n")
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as zipped:
            link = zipfile.ZipInfo("training/a.de")
            link.external_attr = 0o120777 << 16
            zipped.writestr(link, str(tmp_path / "secret"))
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            info = tarfile.TarInfo("training/a.de")
            info.type, info.linkname = kind, str(tmp_path / "secret")
            tar.addfile(info)
    (tmp_path / "a").write_bytes(buffer.getvalue())
    message = f"'training/a.de' in '{tmp_path / 'a'}' is no plain file: get the archive again"
    with pytest.raises(UserError, match=re.escape(message)):
        copy_members(tmp_path / "a", wanted)
    assert copied(tmp_path) == {}


def test_the_first_of_two_files_of_one_name_counts(tmp_path, wanted):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in (("training/a.de", b"1\n"), ("training/a.de", b"2\n"), ("training/a.en", b"3\n")):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    (tmp_path / "a").write_bytes(buffer.getvalue())
    copy_members(tmp_path / "a", wanted)
    assert copied(tmp_path) == {"de": "1\n", "en": "3\n"}


@pytest.mark.parametrize(
    "content",
    [b"no archive", b"", tgz(TEXT)[:90], as_zip(TEXT)[:90], b"PK\x03\x04", tgz({"big": "x" * 99999})[:-30]],
    ids=["text", "empty", "cut tgz", "cut zip", "start of a zip", "tgz cut at its end"],  # archives hold the time
)
def test_damaged(tmp_path, wanted, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError) as error:
        copy_members(tmp_path / "a", wanted)
    assert str(error.value).startswith(f"'{tmp_path / 'a'}' is not a whole .tgz or .zip archive (")
    assert str(error.value).endswith("): check the path, or get it again")


def test_missing(tmp_path, wanted):
    with pytest.raises(
        UserError, match=r"cannot read the archive '.*/a' \(No such file or directory\): check the path"
    ):
        copy_members(tmp_path / "a", wanted)


def members(*all_of_them: tarfile.TarInfo | tuple[str, bytes], **options) -> bytes:
    """A .tgz of members as given: an info alone, or name and text."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", **options) as tar:
        for member in all_of_them:
            info, text = (
                (member, b"") if isinstance(member, tarfile.TarInfo) else (tarfile.TarInfo(member[0]), member[1])
            )
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


GOOD = (("training/a.de", b"eins\n"), ("training/a.en", b"one\n"))
ODD_NAMES = [
    "../training/a.de", "/training/a.de", "training/../training/a.de", "training\\a.de", "training/a.de\n", "\n",
    "training/a.de ", "training/a.d\udce9", "x" * 5000, "a/" * 2000, "training/A.de", "\u202etraining/a.de",
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD_NAMES)
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_odd_names_are_passed_over(tmp_path, wanted, odd, format):
    content = members((odd, b"wrong\n"), *GOOD, format=format, encoding="utf-8", errors="surrogateescape")
    (tmp_path / "a").write_bytes(content)
    copy_members(tmp_path / "a", wanted)
    assert copied(tmp_path) == {"de": "eins\n", "en": "one\n"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


def test_a_name_that_only_begins_as_wanted_is_another(tmp_path, wanted):
    """zipfile cuts names at a NUL."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        zipped.writestr("training/a.deXhidden", "wrong\n")
        zipped.writestr("training/a.en", "one\n")
    (tmp_path / "a").write_bytes(buffer.getvalue().replace(b"a.deXhidden", b"a.de\0hidden"))
    with pytest.raises(UserError, match="has no 'training/a.de'"):
        copy_members(tmp_path / "a", wanted)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_file_through_a_link_goes_where_the_caller_says(tmp_path, wanted, kind):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").write_bytes(members(special("training", kind, str(tmp_path / "elsewhere")), *GOOD))
    copy_members(tmp_path / "a", wanted)
    assert copied(tmp_path) == {"de": "eins\n", "en": "one\n"}
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_link_before_the_file_of_its_name_is_refused(tmp_path, wanted, kind):
    (tmp_path / "a").write_bytes(members(special("training/a.de", kind, "/etc/passwd"), *GOOD))
    with pytest.raises(UserError, match="'training/a.de' in '.*/a' is no plain file: get the archive again"):
        copy_members(tmp_path / "a", wanted)
    assert copied(tmp_path) == {}


def bomb(size: int) -> bytes:
    return members(("training/a.de", b"\0" * size), GOOD[1])


def zip_bomb(size: int) -> bytes:
    return as_zip({"training/a.de": "\0" * size, "training/a.en": ""})


def unwanted_bomb(size: int) -> bytes:
    return members(("something else", b"\0" * size), *GOOD)


def bomb_of_a_name(size: int) -> bytes:
    return members(("n" * size, b""), *GOOD, format=tarfile.GNU_FORMAT)


def bomb_of_a_comment(size: int) -> bytes:
    return members(*GOOD, format=tarfile.PAX_FORMAT, pax_headers={"comment": "c" * size})


def sparse_bomb(size: int) -> bytes:
    """A file of `size` bytes, all of them holes, in a block of the archive."""
    return gzip.compress(sparse("training/a.de", size, 0) + bytes(1024))


def header(name: str, kind: bytes, size: int, **fields: bytes) -> bytes:
    """A block that says anything; fields by their place, such as at_483=b"..."."""
    block = bytearray(special(name, kind).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    for place, value in fields.items():
        start = int(place.removeprefix("at_"))
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def sparse(name: str, size: int, packed: int, more: bool = False) -> bytes:
    """The header of a file of holes: `size` bytes, of which the archive has `packed`; with more blocks of holes or not."""
    places = b"%011o\0%011o\0" % (size, 0)
    return header(name, tarfile.GNUTYPE_SPARSE, packed, at_386=places, at_482=b"%c%011o\0" % (more, size))


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A member of no bytes with a header of records before its own."""
    return header("pax", kind, len(records)) + records + bytes(-len(records) % 512) + header("x", tarfile.REGTYPE, 0)


def keywords(number: int, last: int = 0) -> bytes:
    """Records that tarfile takes for as many keywords, each of which goes to the end of them all."""
    return b"2 " * number + b"%d=" % last


@pytest.mark.parametrize("pack", [bomb, zip_bomb, unwanted_bomb])
def test_a_bomb_is_stopped(tmp_path, wanted, pack):
    (tmp_path / "a").write_bytes(pack(30_000_000))
    assert (tmp_path / "a").stat().st_size < 100_000
    with pytest.raises(UserError) as error:
        copy_members(tmp_path / "a", wanted, max_bytes=20_000_000)
    assert re.fullmatch(
        rf"'{re.escape(str(tmp_path / 'a'))}'(, at 'training/a.de',)? unpacks to more than 0.02 GB: if that is right, give "
        "a higher --max-unpacked-gb; else get it again",
        str(error.value),
    )
    assert copied(tmp_path) == {} and not list((tmp_path / "out").iterdir())
    copy_members(tmp_path / "a", wanted, max_bytes=40_000_000)


def test_the_limit_is_for_all_files_together(tmp_path, wanted):
    (tmp_path / "a").write_bytes(as_zip({"training/a.de": "x" * 600, "training/a.en": "y" * 600}))
    with pytest.raises(UserError, match="at 'training/a.en', unpacks to more than"):
        copy_members(tmp_path / "a", wanted, max_bytes=1000)


@pytest.mark.parametrize("pack", [bomb_of_a_name, bomb_of_a_comment])
def test_a_header_does_not_fill_the_memory(tmp_path, wanted, pack):
    (tmp_path / "a").write_bytes(pack(3_000_000))
    with pytest.raises(UserError, match=r"is not a whole .tgz or .zip archive \(a header larger than any name\)"):
        copy_members(tmp_path / "a", wanted)


def test_a_file_of_holes_is_refused(tmp_path, wanted):
    (tmp_path / "a").write_bytes(sparse_bomb(8**10))
    with pytest.raises(UserError, match="is no plain file"):
        copy_members(tmp_path / "a", wanted)


START = header("first", tarfile.REGTYPE, 0)
ENDLESS = {
    "member": header("x", tarfile.REGTYPE, -512),
    "file of holes": sparse("x", 100, -512),
    "pax size": pax(b"13 size=-512\n"),
}
FLOODS = {  # archive -> why it is refused
    "members": (lambda: START * 40_000, "more headers than any archive of texts"),
    "names": (lambda: (header("n", b"L", 9216) + b"n" * 9216 + START) * 2000, "more headers than any archive of texts"),
    "digits": (lambda: START + pax(b"1" * 1_000_000), "a header larger than any name"),
    "keywords": (lambda: START + pax(keywords(50_000)), "a header larger than any name"),
    "chain of keywords": (lambda: START + 9 * pax(keywords(4000))[:-512] + START, "a header larger than any name"),
    "holes": (lambda: START + sparse("x", 1, 0, more=True) + HOLES * 100_000, "a header larger than any name"),
    "keywords for all": (lambda: b"".join(pax(keywords(7000, n), b"g") for n in range(6)), "has no 'training/a.de'"),
}
HOLES = b"1" * 504 + b"\1" * 8  # 21 of them, and there are more
IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
sys.argv[0] = "intra-distillation"  # which does not import torch
from intra_distillation_fairseq.corpus import archives, wit3
from intra_distillation_fairseq.errors import UserError

corpus, archive, out, room = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
try:
    if corpus == "wmt17":
        archives.copy_members(archive, {"training/a.de": out / "de"}, max_bytes=70_000_000)
    else:
        wit3.extract_pair(archive, "de", out)
except UserError as error:
    print(error)
"""


def refused_in_little_memory(tmp_path: Path, corpus: str, content: bytes, room: int) -> str:
    """What a process says that may have only `room` bytes more than at its start, and has a minute."""
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "out").mkdir(exist_ok=True)
    words = [sys.executable, "-c", IN_LITTLE_MEMORY, corpus, str(tmp_path / "a"), str(tmp_path / "out"), str(room)]
    said = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    assert not list((tmp_path / "out").iterdir())
    return said


@pytest.mark.parametrize("corpus", ["wmt17", "iwslt14"])
@pytest.mark.parametrize("kind", ENDLESS)
def test_an_archive_that_goes_back_to_its_start_is_refused(tmp_path, corpus, kind):
    content = gzip.compress(START + ENDLESS[kind] + bytes(10240))
    said = refused_in_little_memory(tmp_path, corpus, content, 32 << 20)
    assert "(its members lie over each other): check the path, or get it again" in said


@pytest.mark.parametrize("kind", FLOODS)
def test_headers_fill_neither_memory_nor_time(tmp_path, kind):
    headers, reason = FLOODS[kind]
    content = gzip.compress(headers() + bytes(10240))
    assert len(content) < 200_000
    assert reason in refused_in_little_memory(tmp_path, "wmt17", content, 140 << 20)


def test_members_are_forgotten():
    with archives.open_tgz(io.BytesIO(gzip.compress(START * 50 + bytes(1024))), 10**6, "a") as tar:
        assert [len(tar.members) for _ in tar] == [0] * 50


@pytest.mark.parametrize(("method", "name"), [(zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "lzma")])
def test_a_zip_that_is_unpacked_at_once_is_refused(tmp_path, method, name):
    """zipfile unpacks a whole block of such a member, whatever is asked for."""
    content = as_zip({"training/a.de": "\0" * 40_000_000}, method)
    assert len(content) < 10_000
    assert refused_in_little_memory(tmp_path, "wmt17", content, 32 << 20) == (
        f"'training/a.de' in '{tmp_path / 'a'}' is packed with {name}: pack it again with deflate, or get the archive "
        "elsewhere\n"
    )


@pytest.mark.parametrize(("method", "name"), [(9, "deflate64"), (97, "wavpack"), (77, "method 77")])
def test_a_zip_of_another_method_is_refused(tmp_path, wanted, method, name):
    content = bytearray(as_zip({"training/a.de": "eins"}, zipfile.ZIP_STORED))
    content[8] = content[content.index(b"PK\1\2") + 10] = method
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=f"'training/a.de' in '.*/a' is packed with {name}: pack it again with deflate"):
        copy_members(tmp_path / "a", wanted)


@pytest.mark.parametrize("pack", [bomb, zip_bomb, unwanted_bomb])
def test_a_bomb_does_not_fill_the_memory(tmp_path, pack):
    assert "unpacks to more than" in refused_in_little_memory(tmp_path, "wmt17", pack(80_000_000), 32 << 20)


@pytest.mark.parametrize(("size", "megabytes"), [(300, [1, 1]), (2_300_000, [3, 3])])
def test_progress_of_small_archives(tmp_path, wanted, monkeypatch, size, megabytes):
    """From the megabytes of the archive, rounded up, and no more than these."""
    seen = []

    class Shown:
        def __init__(self, label, total, unit):
            assert (label, unit) == ("unpack a", "MB")
            seen.append(total)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def show(self, done):
            seen.append(done)

    monkeypatch.setattr(archives, "Progress", Shown)
    (tmp_path / "a").write_bytes(members(("else", random.Random(1).randbytes(size)), *GOOD))
    copy_members(tmp_path / "a", wanted)
    assert [seen[0], seen[-1]] == megabytes and max(seen) == seen[0]


def test_an_archive_in_an_archive_is_limited_too(tmp_path):
    (tmp_path / "out").mkdir()
    inner = members(("de-en/train.tags.de-en.de", b"\0" * 9_000_000))
    (tmp_path / "a").write_bytes(members(("x/de-en.tgz", inner)))
    with pytest.raises(UserError, match=r"'de-en.tgz' in '.*/a' unpacks to more than 0.005 GB"):
        wit3.extract_pair(tmp_path / "a", "de", tmp_path / "out", max_bytes=5_000_000)
    inner = members(("else", b"\0" * 9_000_000))
    (tmp_path / "a").write_bytes(members(("x/de-en.tgz", inner)))
    with pytest.raises(UserError, match=r"'de-en.tgz' in '.*/a' unpacks to more than 0.005 GB"):
        wit3.extract_pair(tmp_path / "a", "de", tmp_path / "out", max_bytes=5_000_000)
    assert not list((tmp_path / "out").iterdir())


def test_an_archive_of_itself_ends(tmp_path):
    (tmp_path / "out").mkdir()
    content = b""
    for _ in range(50):
        content = members(("de-en.tgz", content))
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match="has no train.tags.de-en.de; pairs in it: de-en"):
        wit3.extract_pair(tmp_path / "a", "de", tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [b"<!DOCTYPE html><html>Quota exceeded</html>", gzip.compress(b""), gzip.compress(b"<html>"), as_zip({}), b"\0" * 999,
     gzip.compress(gzip.compress(b"x" * 999)), b"\x1f\x8b", b"PK\5\6" + bytes(18), tgz({})],
    ids=["web page", "empty gz", "packed web page", "empty zip", "zeros", "gz in gz", "magic", "end of a zip", "empty tgz"],
)  # fmt: skip
def test_what_is_no_archive(tmp_path, wanted, content):
    (tmp_path / "a.tgz").write_bytes(content)
    with pytest.raises(
        UserError, match=r"a\.tgz' (is not a whole .tgz or .zip archive|has no 'training/a.de')"
    ) as error:
        copy_members(tmp_path / "a.tgz", wanted)
    assert "\n" not in str(error.value) and copied(tmp_path) == {}


def test_garbage_behind_an_archive_does_no_harm(tmp_path, wanted):
    for pack in (tgz, as_zip):
        (tmp_path / "a").write_bytes(pack(TEXT) + b"garbage" * 99)
        assert copy_members(tmp_path / "a", wanted) == {"training/a.de": 2, "training/a.en": 3}


def broken(content: bytes, how: str, full: bool) -> list[bytes]:
    """Copies of an archive, each cut off elsewhere or with other bytes somewhere."""
    rng = random.Random(how)
    if how == "cut":
        return [content[:length] for length in range(0, len(content), 1 if full else 7)]
    if how == "one byte":
        places = range(len(content)) if full else rng.sample(range(len(content)), 150)
        return [content[:at] + bytes([content[at] ^ rng.randint(1, 255)]) + content[at + 1 :] for at in places]
    garbled = []
    for _ in range(2000 if full else 100):
        at, length = rng.randrange(len(content)), rng.randint(1, 40)
        garbled.append(content[:at] + rng.randbytes(length) + content[at + length :])
    return garbled


@pytest.mark.parametrize("how", ["cut", "one byte", "many bytes"])
@pytest.mark.parametrize("pack", [tgz, as_zip], ids=["tgz", "zip"])
def test_a_broken_archive_gives_whole_files_or_one_line(tmp_path, wanted, pack, how, full, record_property):
    rng = random.Random(1)
    texts = {
        name: " ".join(map(str, rng.choices(range(999), k=60))) for name in ("training/a.de", "x", "training/a.en")
    }
    check_broken(
        tmp_path, broken(pack(texts), how, full), lambda path: copy_members(path, wanted),
        {path.name: texts[name] for name, path in wanted.items()} if how == "cut" else None,
    )  # fmt: skip
    record_property("archives broken", len(broken(pack(texts), how, full)))


@pytest.mark.parametrize("how", ["cut", "one byte", "many bytes"])
def test_a_broken_archive_of_archives(tmp_path, how, full, record_property):
    content = write_archive(tmp_path / "whole.tgz", {"de": pair_files("de", talks=1, lines=2)}).read_bytes()
    (tmp_path / "out").mkdir()
    all_of_them = broken(content, how, full)
    check_broken(tmp_path, all_of_them, lambda path: wit3.extract_pair(path, "de", tmp_path / "out"), None)
    record_property("archives broken", len(all_of_them))


def check_broken(tmp_path, contents: list[bytes], unpack: Callable, texts: dict[str, str] | None) -> None:
    """Every one unpacks to `texts` (or something, where bytes were changed), or ends in one line."""
    refusals = []
    for content in contents:
        (tmp_path / "a").write_bytes(content)
        try:
            unpack(tmp_path / "a")
            assert texts is None or copied(tmp_path) == texts
        except UserError as error:
            refusals.append(str(error))
        for path in (tmp_path / "out").iterdir():
            assert not path.name.startswith("."), "something half-written was left"
            assert texts is None or path.read_text() == texts[path.name]
            path.unlink()
    assert len(refusals) > len(contents) / 4
    assert all("\n" not in line and str(tmp_path / "a") in line for line in refusals)


@pytest.mark.parametrize("given", ["0", "-1", "viel", "nan", "inf", ""])
def test_a_limit_has_to_be_a_number(given):
    with pytest.raises(UserError) as error:
        max_unpacked(Namespace(max_unpacked_gb=given))
    assert str(error.value) == f"--max-unpacked-gb '{given}': needed is a number above 0"


def test_the_default_limit_is_far_above_the_archives():
    assert archives.MAX_UNPACKED == 50e9 == max_unpacked(Namespace(max_unpacked_gb="50"))
