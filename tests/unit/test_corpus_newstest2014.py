from __future__ import annotations

import hashlib
import re

import pytest
from wit3_sample import tgz

from intra_distillation_fairseq.cli import main
from intra_distillation_fairseq.corpus import newstest2014
from intra_distillation_fairseq.corpus.clean import read_lines
from intra_distillation_fairseq.corpus.oddities import Oddities
from intra_distillation_fairseq.corpus.stages import FileDigests
from intra_distillation_fairseq.corpus.wmt17_archives import ARCHIVES
from intra_distillation_fairseq.errors import UserError

SGM = (
    '<refset setid="newstest2014" srclang="any" trglang="de">\n<doc sysid="ref" docid="d" genre="news">\n<p>\n'
    '<seg id="1">Gutach:  Noch mehr\u00a0Sicherheit </seg>\n<seg id="2"> „R&amp;D“ – it’s <b>1 & 2</b>\t!</seg>\n'
    '</p>\n<seg id="3"></seg>\n</doc>\n</refset>\n'
)
MEMBERS = {"test-full/newstest2014-deen-src.en.sgm": SGM, "test-full/newstest2014-deen-ref.de.sgm": SGM}
LINES = ["Gutach: Noch mehr Sicherheit", "„R&amp;D“ – it’s <b>1 & 2</b> !", ""]


@pytest.fixture
def digests(tmp_path):
    return FileDigests(tmp_path / "known.json")


def test_sentences_are_those_of_sacrebleu(tmp_path):
    from sacrebleu.dataset.fake_sgml import FakeSGMLDataset

    (tmp_path / "a.sgm").write_text(SGM)
    FakeSGMLDataset("wmt14/full", langpairs={})._convert_format(str(tmp_path / "a.sgm"), str(tmp_path / "a.txt"))
    segments = newstest2014.segments(read_lines(tmp_path / "a.sgm"), "a.sgm", Oddities())
    assert [one.text for one in segments] == (tmp_path / "a.txt").read_text().split("\n")[:-1] == LINES


def test_from_the_archive(tmp_path, digests):
    archive = tgz(MEMBERS)
    (tmp_path / "test-full.tgz").write_bytes(archive)
    test = newstest2014.from_archive(tmp_path / "test-full.tgz", digests, accept_other=True)
    pairs, odd = test.read(tmp_path)
    assert pairs == [(line, line) for line in LINES]
    assert [odd[f"newstest2014-deen-{name}"].as_json() for name in ("src.en.sgm", "ref.de.sgm")] == [
        {"lines": 9, "tab": {"lines": 1, "first": [5]}}
    ] * 2
    assert test.sha256 == {"test-full.tgz": hashlib.sha256(archive).hexdigest()}


def test_another_archive_is_refused(tmp_path, digests):
    (tmp_path / "test-full.tgz").write_bytes(b"other")
    md5 = hashlib.md5(b"other").hexdigest()
    message = (
        f"'{tmp_path / 'test-full.tgz'}' has the MD5 '{md5}', published is a8cd784e006feb32ac6f3d9ec7eb389a: get it "
        "again, or give --accept-other-archives to take it as it is"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        newstest2014.from_archive(tmp_path / "test-full.tgz", digests, accept_other=False)


def test_sides_of_different_length(tmp_path, digests):
    other = {**MEMBERS, "test-full/newstest2014-deen-ref.de.sgm": SGM.replace('<seg id="3"></seg>\n', "")}
    (tmp_path / "test-full.tgz").write_bytes(tgz(other))
    test = newstest2014.from_archive(tmp_path / "test-full.tgz", digests, accept_other=True)
    with pytest.raises(UserError, match=r"-src\.en\.sgm' has 3 lines and '.*-ref\.de\.sgm' has 2: a parallel text"):
        test.read(tmp_path)


def test_the_limit_is_for_its_archive_too(tmp_path, capsys):
    for archive in ARCHIVES:
        text = {f"{archive.inner}.{lang}": "x\n" for lang in ("de", "en")}
        (tmp_path / archive.mirrors[0].name).write_bytes(tgz(text))
    (tmp_path / "test-full.tgz").write_bytes(tgz(dict.fromkeys(MEMBERS, "\n" * 2_000_000)))
    words = ["prepare-wmt17", "--archives", str(tmp_path), "--accept-other-archives", "--out", str(tmp_path / "out")]
    assert main.main([*words, "--jobs", "1", "--max-unpacked-gb", "0.001"]) == 2
    last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert f"'{tmp_path / 'test-full.tgz'}', at '" in last or f"'{tmp_path / 'test-full.tgz'}' unpacks" in last
    assert last.endswith(
        "unpacks to more than 0.001 GB: if that is right, give a higher --max-unpacked-gb; else get it again"
    )


class Dataset:
    """Stands for sacrebleu's wmt14/full."""

    def __init__(self, folder, error=None):
        self.folder, self.error = folder, error

    def get_source_file(self, pair):
        if self.error:
            raise self.error
        return str(self.folder / f"{pair}.src")

    def get_reference_files(self, pair):
        return [str(self.folder / f"{pair}.ref")]


def test_through_sacrebleu(tmp_path, digests, monkeypatch):
    (tmp_path / "en-de.src").write_text("one\ntwo\n")
    (tmp_path / "en-de.ref").write_text("eins\nzwei\n")
    monkeypatch.setattr("sacrebleu.dataset.DATASETS", {"wmt14/full": Dataset(tmp_path)})
    test = newstest2014.from_sacrebleu(digests)
    pairs, odd = test.read(tmp_path / "unused")
    assert pairs == [("one", "eins"), ("two", "zwei")] and odd["en-de.src"].as_json() == {"lines": 2}
    assert test.sha256["sacrebleu wmt14/full/en-de.src"] == hashlib.sha256(b"one\ntwo\n").hexdigest()


@pytest.mark.parametrize(("error", "why"), [(OSError("no\nroute"), "no route"), (SystemExit(1), "1")])
def test_sacrebleu_cannot_get_it(tmp_path, digests, monkeypatch, error, why):
    monkeypatch.setattr("sacrebleu.dataset.DATASETS", {"wmt14/full": Dataset(tmp_path, error)})
    with pytest.raises(UserError) as raised:
        newstest2014.from_sacrebleu(digests)
    assert str(raised.value) == (
        f"sacrebleu could not get its test set wmt14/full ({why}): check the network, or put test-full.tgz "
        "(https://statmt.org/wmt14/test-full.tgz) into a folder with the other archives and give --archives DIR"
    )


def test_a_full_disk_is_not_the_network_s_fault(tmp_path, digests, monkeypatch):
    error = OSError(28, "No space left on device")
    monkeypatch.setattr("sacrebleu.dataset.DATASETS", {"wmt14/full": Dataset(tmp_path, error)})
    with pytest.raises(OSError, match="No space left"):
        newstest2014.from_sacrebleu(digests)
