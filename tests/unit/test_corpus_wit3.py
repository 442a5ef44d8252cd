from __future__ import annotations

import io
import re
import tarfile

import pytest
from wit3_sample import pair_files, tgz, write_archive

from intra_distillation_fairseq.corpus import wit3
from intra_distillation_fairseq.corpus.oddities import Oddities
from intra_distillation_fairseq.errors import UserError


def test_train_text_keeps_title_and_description():
    text = [
        "<url>http://x</url>", "Guten Tag.", "<talkid>1</talkid>", "<title>Titel</title>",
        "<description>Er <title>sagt</title></description>", "<keywords>a</keywords>", "a <url> b", " x ",
    ]  # fmt: skip
    found = Oddities(), Oddities()
    pairs = list(wit3.train_pairs((text, text), ("a", "b"), found))
    assert pairs == [(line, line) for line in ("Guten Tag.", "Titel", "Er sagt", " x ")]
    assert found[0].kinds == found[1].kinds == {"tag_in_text": (1, [7])}


def test_segments_of_an_xml_set():
    text = [
        "<doc>",
        "<title>T</title>",
        '<seg id="1"> It’s R&amp;D. </seg>',
        '  <seg id="22">\u00a0a b</seg>',
        "</doc>",
    ]
    # a no-break space is no space for the published sed command
    assert [one.text for one in wit3.test_segments(text, "a", Oddities())] == ["It's R&amp;D.", "  \u00a0a b"]


@pytest.mark.parametrize(
    "line",
    [
        " a </seg> ",
        "a</seg> </seg>\u3000</seg>b",
        "  </seg>",
        "</seg></seg> ",
        " a  b  </seg>c </seg> d ",
        "a  < /seg>",
    ],
)
def test_spaces_around_the_end_of_a_segment_go_as_with_sed(line):
    """`s/\\s*<\\/seg>\\s*//g`, with spaces looked at once only."""
    plain = re.sub(r"[ \u3000]*</seg>[ \u3000]*", "", line)
    assert wit3.segment_text(line) == plain


def test_extract_takes_what_matters(tmp_path):
    archive = write_archive(tmp_path / "a.tgz", {"es": pair_files("es"), "de": pair_files("de")})
    (tmp_path / "out").mkdir()
    names = wit3.extract_pair(archive, "de", tmp_path / "out")
    assert names == sorted(pair_files("de"))
    for name, text in pair_files("de").items():
        assert (tmp_path / "out" / name).read_text() == text


def test_extract_takes_the_archive_of_one_pair_too(tmp_path):
    (tmp_path / "de-en.tgz").write_bytes(tgz({f"de-en/{name}": text for name, text in pair_files("de").items()}))
    (tmp_path / "out").mkdir()
    assert wit3.extract_pair(tmp_path / "de-en.tgz", "de", tmp_path / "out") == sorted(pair_files("de"))


def test_hostile_members_go_nowhere(tmp_path):
    """Names that lead out of the folder, and links, are passed over or land under their bare name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:

        def add(name, text="evil", **what):
            info = tarfile.TarInfo(name)
            data = text.encode()
            info.size = 0 if what else len(data)
            for key, value in what.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))

        add("../../escaped.txt")
        add(str(tmp_path / "absolute.txt"))
        add("de-en/train.tags.de-en.de", type=tarfile.SYMTYPE, linkname=str(tmp_path / "linked"))
        add("de-en/train.tags.de-en.en", type=tarfile.LNKTYPE, linkname="../../etc/passwd")
        add("../../de-en/train.tags.de-en.de", "gut\n")
        add("/de-en/train.tags.de-en.en", "good\n")
        add("de-en/IWSLT14.TED.dev2010.de-en.de.xml/../../x")
    (tmp_path / "a.tgz").write_bytes(buffer.getvalue())
    (tmp_path / "deep" / "out").mkdir(parents=True)
    names = wit3.extract_pair(tmp_path / "a.tgz", "de", tmp_path / "deep" / "out")
    assert names == ["train.tags.de-en.de", "train.tags.de-en.en"]
    assert (tmp_path / "deep/out/train.tags.de-en.de").read_text() == "gut\n"
    assert not (tmp_path / "deep/out/train.tags.de-en.de").is_symlink()
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["a.tgz", "deep/out/train.tags.de-en.de", "deep/out/train.tags.de-en.en"]


def test_missing_pair_lists_those_there(tmp_path):
    archive = write_archive(tmp_path / "a.tgz", {"es": pair_files("es"), "ar": pair_files("ar")})
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError) as error:
        wit3.extract_pair(archive, "de", tmp_path / "out")
    assert str(error.value) == (
        f"'{archive}' has no train.tags.de-en.de; pairs in it: ar-en, es-en: give --langs one of them"
    )


@pytest.mark.parametrize("damage", ["cut", "web page", "inner cut"])
def test_damaged_archive(tmp_path, damage):
    archive = write_archive(tmp_path / "a.tgz", {"de": pair_files("de")})
    data = archive.read_bytes()
    if damage == "cut":
        archive.write_bytes(data[: len(data) // 2])
    elif damage == "web page":
        archive.write_bytes(b"<!DOCTYPE html><html>quota exceeded</html>")
    else:
        inner = tgz({f"de-en/{name}": text for name, text in pair_files("de").items()})
        archive.write_bytes(tgz({"2014-01/texts/de/en/de-en.tgz": inner[: len(inner) // 2]}))
    (tmp_path / "out").mkdir()
    with pytest.raises(
        UserError, match=r"a\.tgz' is not a whole gzip-compressed tar archive .*: check the path, or get it again"
    ):
        wit3.extract_pair(archive, "de", tmp_path / "out")


def names_of(*sets: str, sides: tuple[str, ...] = ("de", "en")) -> list[str]:
    return [f"IWSLT14.{name}.de-en.{side}.xml" for name in sets for side in sides]


def test_test_sets_by_rule():
    names = names_of("TED.tst2012", "TED.tst2010", "TED.dev2010", "TEDX.tst2013", "TEDX.dev2012")
    chosen, absent, beyond = wit3.choose_test_sets(names, "de")
    assert chosen == ["IWSLT14.TED.dev2010", "IWSLT14.TEDX.dev2012", "IWSLT14.TED.tst2010", "IWSLT14.TED.tst2012"]
    assert absent == ["IWSLT14.TED.tst2011"]
    assert beyond == ["IWSLT14.TEDX.tst2013"]


def test_one_sided_test_set_is_refused():
    names = names_of("TED.dev2010", "TED.tst2010") + names_of("TED.tst2011", sides=("en",))
    with pytest.raises(UserError) as error:
        wit3.choose_test_sets(names, "de")
    assert str(error.value) == (
        "test set 'IWSLT14.TED.tst2011' of de-en has a file for 'en' but none for 'de': the archive is not "
        "whole, get it again"
    )


@pytest.mark.parametrize("sets", [("TED.tst2010",), ("TED.dev2010", "TEDX.dev2012"), ()])
def test_required_test_sets(sets):
    with pytest.raises(UserError, match="needed are IWSLT14.TED.dev2010 and at least one of IWSLT14.TED.tst2010"):
        wit3.choose_test_sets(names_of(*sets), "de")
