from __future__ import annotations

import io
import re
import tarfile
import zipfile

import pytest
from wit3_sample import tgz

from intra_distillation_fairseq.corpus.archives import copy_members
from intra_distillation_fairseq.errors import UserError

TEXT = {"training/a.de": "eins\nzwei\n", "training/a.en": "one\ntwo\nthree", "other.de": "x\n"}


def as_zip(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
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
