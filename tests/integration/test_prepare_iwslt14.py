"""The real command on archives of the layout of IWSLT'14: generated ones, and the real text where it is at hand."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from wit3_sample import pair_files, tgz, write_archive

COMMAND = Path(sys.executable).with_name("intra-distillation")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_iwslt14.sh"


def prepare(*flags: object, command=(COMMAND, "prepare-iwslt14")) -> subprocess.CompletedProcess:
    return subprocess.run([str(text) for text in (*command, *flags)], capture_output=True, text=True, check=False)


def lines_of(path: Path) -> list[str]:
    lines = path.read_bytes().decode().split("\n")
    assert lines.pop() == ""
    return lines


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Two pairs; es has no TEDX set, de has one more than the published test set takes."""
    files = pair_files("de")
    for side in ("de", "en"):
        files[f"IWSLT14.TEDX.tst2013.de-en.{side}.xml"] = files[f"IWSLT14.TED.tst2010.de-en.{side}.xml"]
    es = pair_files("es", sets=("TED.dev2010", "TED.tst2010"))
    return write_archive(tmp_path_factory.mktemp("archive") / "2014-01.tgz", {"es": es, "de": files})


@pytest.fixture(scope="module")
def prepared(archive, tmp_path_factory) -> Path:
    """Both pairs, through the script and a download; tests leave the folder as it is."""
    out = tmp_path_factory.mktemp("iwslt ü") / "out"
    flags = ("--url", archive.as_uri(), "--out", out, "--vocab-size", 130, "--jobs", 2)
    done = prepare("--langs", "de es", *flags, command=("bash", SCRIPT))
    assert done.returncode == 0, done.stderr
    de, es = done.stdout.split("es-en: ")
    assert de.startswith("de-en: train ") and f"131 types in {out / 'de-en'}" in de
    assert "  test: TED.dev2010 12, TEDX.dev2012 12, TED.tst2010 12\n" in de
    assert "  note: de-en has no IWSLT14.TED.tst2011, IWSLT14.TED.tst2012; the test set goes without\n" in de
    assert "  note: not part of the published test set: IWSLT14.TEDX.tst2013\n" in de
    assert (
        "  the published archive gives 160,239 / 7,283 / 6,750 lines for de-en, not as here: this archive has another text"
    ) in de
    assert "note: es-en has no IWSLT14.TEDX.dev2012, " in es and "published archive" not in es
    return out


def test_download_is_kept_with_its_checksum(prepared, archive):
    download = prepared / "download"
    assert checksum(download / "2014-01.tgz") == checksum(archive)
    assert (download / "2014-01.tgz.sha256").read_text() == f"{checksum(archive)}  2014-01.tgz\n"
    assert not list(download.glob("*.part*"))


def test_train_and_valid(prepared):
    """Every pair of the training text is there, lower-cased, without tags; every 23rd in valid."""
    raw = prepared / "de-en" / "raw"
    for side in ("de", "en"):
        train, valid = lines_of(raw / f"train.{side}"), lines_of(raw / f"valid.{side}")
        assert len(valid) == (len(train) + len(valid)) // 23
        merged = train[:]
        for number, line in enumerate(valid, start=1):
            merged.insert(23 * number - 1, line)
        tags = pair_files("de")[f"train.tags.de-en.{side}"].split("\n")
        text = [
            line.replace("<title>", "").replace("</title>", "").replace("<description>", "")
            .replace("</description>", "").lower()
            for line in tags if not line.startswith(("<url>", "<talkid>", "<keywords>"))
        ]  # fmt: skip
        kept = [line for line in text if line in set(merged)]
        assert merged == kept and len(merged) > 100
        assert any(line.startswith("title 3: ") for line in merged)


def test_test_set(prepared):
    manifest = json.loads((prepared / "de-en/manifest.json").read_text())
    assert manifest["corpus"] == "iwslt14_de_en" and manifest["splits"]["test"]["lines"] == 36
    assert [(one["name"], one["lines"]) for one in manifest["test_sets"]] == [
        ("IWSLT14.TED.dev2010", 12), ("IWSLT14.TEDX.dev2012", 12), ("IWSLT14.TED.tst2010", 12),
    ]  # fmt: skip
    files = pair_files("de")
    for side in ("de", "en"):
        expected = []
        for one in manifest["test_sets"]:
            text = files[f"{one['name']}.de-en.{side}.xml"]
            assert one["sha256"][side] == hashlib.sha256(text.encode()).hexdigest()
            expected += [line.split("> ")[1].split(" </seg>")[0].lower() for line in text.split("\n") if "<seg" in line]
        assert lines_of(prepared / f"de-en/raw/test.{side}") == expected


def test_second_run_has_nothing_to_do(prepared, archive):
    done = prepare(
        "--langs", "de,es", "--url", archive.as_uri(), "--out", prepared, "--vocab-size", 130, command=("bash", SCRIPT)
    )
    assert done.returncode == 0 and done.stdout.count("(nothing to do)") == 2 and done.stderr == ""


def test_a_pair_does_not_wait_for_the_folder_of_another(prepared, archive):
    import fcntl

    with open(prepared / "es-en" / ".lock", "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        flags = ("--url", archive.as_uri(), "--out", prepared, "--vocab-size", 130)
        assert prepare("--langs", "de", *flags).returncode == 0
        done = prepare("--langs", "es", *flags)
        assert done.returncode == 2 and f"the data folder '{prepared / 'es-en'}' is in use by " in done.stderr


def harmed(files: dict[str, str], name: str, old: str, new: str) -> dict[str, str]:
    assert old in files[name]
    return {**files, name: files[name].replace(old, new, 1)}


def test_consistent_test_treats_the_test_as_the_training_text(tmp_path):
    files = pair_files("de")
    name = "IWSLT14.TED.dev2010.de-en.{}.xml"
    files = harmed(files, name.format("de"), '<seg id="1"> ', '<seg id="1"> ja , R&amp;D . ')
    files = harmed(files, name.format("en"), '<seg id="1"> ', '<seg id="1"> It’s &lt;b&gt; , yes . ')
    files = harmed(files, "train.tags.de-en.de", "</url>\n", "</url>\nEins zwei R&amp;D.\n")
    files = harmed(files, "train.tags.de-en.en", "</url>\n", "</url>\nOne two R&amp;D.\n")
    archive = write_archive(tmp_path / "a.tgz", {"de": files})
    # only raw/ is wanted here: a vocabulary that is too large stops the run after it
    flags = ("--langs", "de", "--archive", archive, "--vocab-size", 99999, "--out", tmp_path)
    raw = tmp_path / "de-en" / "raw"
    assert "--vocab-size '99999' is too large" in prepare(*flags).stderr
    assert lines_of(raw / "test.de")[0].startswith("ja , r&amp;d . ")
    assert lines_of(raw / "test.en")[0].startswith("it's &lt;b&gt; , yes . ")
    assert lines_of(raw / "train.de")[0] == "eins zwei r & amp; d."
    assert "--vocab-size '99999' is too large" in prepare(*flags, "--consistent-test").stderr
    assert lines_of(raw / "test.de")[0].startswith("ja, r & d. ")
    assert lines_of(raw / "test.en")[0].startswith("it's < b >, yes. ")
    assert lines_of(raw / "train.de")[0] == "eins zwei r & d."


def test_default_vocabulary_shrinks_to_the_text(tmp_path):
    archive = write_archive(tmp_path / "a.tgz", {"de": pair_files("de", talks=3, lines=20)})
    done = prepare("--langs", "de", "--archive", archive, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "de-en: note: the text is too small for 12,000 pieces; it gives " in done.stderr
    types = json.loads((tmp_path / "de-en/manifest.json").read_text())["vocab_types"]
    assert len(lines_of(tmp_path / "de-en/dict.txt")) == types - 4
    done = prepare("--langs", "de", "--archive", archive, "--out", tmp_path, "--vocab-size", 12000)
    assert done.returncode == 2 and f"at most {types - 1} pieces can be learnt" in done.stderr


def check_error(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.split("\n")[-2] == f"intra-distillation prepare-iwslt14: error: {message}"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("langs", ["DE", "de en", "german", " "])
def test_wrong_languages(langs, tmp_path):
    check_error(
        prepare("--langs", langs, "--out", tmp_path / "out"),
        f"--langs '{langs}': needed are codes of source languages with a space between them, of the published ones "
        "(ar de es fa he it nl pl) or others of the archive; the target is always English",
    )
    assert not (tmp_path / "out").exists()


def test_archive_and_url(tmp_path):
    check_error(
        prepare("--archive", "a.tgz", "--url", "https://x/a.tgz", "--out", tmp_path / "out"),
        "--archive 'a.tgz' and --url 'https://x/a.tgz' are both given: give one of them",
    )


def test_limit_is_checked_before_anything_is_downloaded(tmp_path):
    check_error(
        prepare("--max-unpacked-gb", "50GB", "--url", "https://x/a.tgz", "--out", tmp_path / "out"),
        "--max-unpacked-gb '50GB': needed is a number above 0",
    )
    assert not (tmp_path / "out").exists()


def test_archive_that_is_not_there(tmp_path):
    check_error(
        prepare("--archive", tmp_path / "a.tgz", "--out", tmp_path / "out"),
        f"--archive '{tmp_path / 'a.tgz'}' is not a file: give the path of 2014-01.tgz",
    )
    assert not (tmp_path / "out").exists()


def test_archive_that_is_none(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    done = prepare("--langs", "de", "--archive", tmp_path / "README.md", "--out", tmp_path / "out")
    assert done.returncode == 2
    start = f"error: '{tmp_path}/README.md' is not a whole gzip-compressed tar archive ("
    assert start in done.stderr and done.stderr.endswith("): check the path, or get it again\n")


def test_archive_inside_the_folder_is_not_replaced(archive, tmp_path):
    inside = tmp_path / "de-en" / "orig" / "a.tgz"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(archive.read_bytes())
    check_error(
        prepare("--langs", "de", "--archive", inside, "--out", tmp_path),
        f"the input '{inside}' lies in '{inside.parent}', which is made anew: give another --out, or move the input",
    )
    assert checksum(inside) == checksum(archive)


def test_language_that_the_archive_lacks(archive, tmp_path):
    check_error(
        prepare("--langs", "nl", "--archive", archive, "--out", tmp_path),
        f"'{archive}' has no train.tags.nl-en.nl; pairs in it: de-en, es-en: give --langs one of them",
    )
    assert sorted(p.name for p in (tmp_path / "nl-en").iterdir()) == [".lock", "stages"]


def test_training_text_that_is_not_parallel(tmp_path):
    files = pair_files("de")
    files["train.tags.de-en.en"] += "One line more.\n"
    archive = write_archive(tmp_path / "a.tgz", {"de": files})
    orig = tmp_path / "de-en" / "orig"
    check_error(
        prepare("--langs", "de", "--archive", archive, "--out", tmp_path),
        f"'{orig}/train.tags.de-en.de' has 192 lines and '{orig}/train.tags.de-en.en' has 193: a parallel text needs "
        "the same number on both sides, line for line",
    )
    assert not (tmp_path / "de-en/raw").exists()


def test_test_set_that_is_not_parallel(tmp_path):
    name = "IWSLT14.TED.tst2010.de-en.en.xml"
    archive = write_archive(tmp_path / "a.tgz", {"de": harmed(pair_files("de"), name, '<seg id="3">', "<lost>")})
    done = prepare("--langs", "de", "--archive", archive, "--out", tmp_path)
    assert done.returncode == 2
    assert "IWSLT14.TED.tst2010.de-en.de.xml' line 8 has segment '3' of document '1' where " in done.stderr
    assert (
        f"'{tmp_path}/de-en/orig/{name}' line 9 has segment '4' of document '1': the sides do not match" in done.stderr
    )


def test_too_little_text(tmp_path):
    archive = write_archive(tmp_path / "a.tgz", {"de": pair_files("de", talks=1, lines=10)})
    check_error(
        prepare("--langs", "de", "--archive", archive, "--out", tmp_path),
        "de-en has too little training text: of 12 pairs, fewer than 23 are left after cleaning",
    )


def test_web_page_as_archive(tmp_path):
    (tmp_path / "a.tgz").write_text("<!DOCTYPE html><html>Quota exceeded</html>")
    url = (tmp_path / "a.tgz").as_uri()
    done = prepare("--langs", "de", "--url", url, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert (
        f"({url}: a web page came instead of the archive (a download quota or a sign-in)): get it with" in done.stderr
    )
    assert not list((tmp_path / "out").rglob("*.tgz"))


def test_archive_of_one_pair(tmp_path):
    (tmp_path / "de-en.tgz").write_bytes(tgz({f"de-en/{name}": text for name, text in pair_files("de").items()}))
    done = prepare("--langs", "de", "--archive", tmp_path / "de-en.tgz", "--out", tmp_path, "--vocab-size", 99999)
    assert "de-en: clean ..." in done.stderr and (tmp_path / "de-en/raw/train.de").exists()


# What the published shell steps with Moses give for the real text: lines of train, valid, test.
REAL = {
    "de": (6874, 312, 6750),
    "ar": (6182, 280, 1012),
    "es": (4686, 213, 1012),
    "fa": (4384, 199, 1012),
    "he": (4295, 195, 1012),
    "it": (4608, 209, 1012),
    "nl": (4730, 214, 1012),
    "pl": (4367, 198, 1012),
}
# And the SHA-256 of train.XX + train.en + valid.XX + valid.en + test.XX + test.en.
REAL_SHA256 = {
    "de": "c929da500f78bc5be3a2913a0f94ec0a3a414d54a631ab39b436863b71fe9bc0",
    "ar": "360bd41aa2251f047a285559ca51d4dba4608705ad056012a53e76af1d2c329b",
    "it": "d516e148f13c5718ea153af3aafbf0a16eba6c9375486dcc1b8ed0a32b7e8a83",
}


def test_real_archives_to_binarised_data(shared_data, tmp_path):
    """Both archives, all pairs, one after the other: raw/ is what the published steps give, bin/ is complete."""
    both = [shared_data / "iwslt14-mini" / name for name in ("2014-01-8pairs.tgz", "2014-01.tgz")]
    for archive in both:
        if not archive.is_file():
            pytest.skip(f"'{archive}' is not there")
    flags = ("--jobs", 2, "--out")
    done = prepare("--archive", both[0], *flags, tmp_path / "8", command=("bash", SCRIPT))
    assert done.returncode == 0, done.stderr
    for lang, expected in REAL.items():
        folder = tmp_path / "8" / f"{lang}-en"
        counts = []
        digest = hashlib.sha256()
        for split in ("train", "valid", "test"):
            sides = [(folder / "raw" / f"{split}.{side}").read_bytes() for side in (lang, "en")]
            assert sides[0].count(b"\n") == sides[1].count(b"\n")
            counts.append(sides[0].count(b"\n"))
            digest.update(b"".join(sides))
        assert (lang, *counts) == (lang, *expected)
        assert digest.hexdigest() == REAL_SHA256.get(lang, digest.hexdigest()), lang
        bin_files = {
            f"{split}.{lang}-en.{side}.{ending}"
            for split in ("train", "valid", "test")
            for side in (lang, "en")
            for ending in ("bin", "idx")
        }
        assert {path.name for path in (folder / "bin").iterdir()} == {f"dict.{lang}.txt", "dict.en.txt", *bin_files}
    done = prepare("--archive", both[1], "--langs", "de", *flags, tmp_path / "1", command=("bash", SCRIPT))
    assert done.returncode == 0, done.stderr
    assert "de-en: train 6,874 / valid 312 / test 6,750 lines, 12,001 types in " in done.stdout
    assert (
        "  test: TED.dev2010 887, TEDX.dev2012 1,165, TED.tst2010 1,565, TED.tst2011 1,433, TED.tst2012 1,700\n"
    ) in done.stdout
    for path in (tmp_path / "8/de-en/bin").iterdir():
        assert path.read_bytes() == (tmp_path / "1/de-en/bin" / path.name).read_bytes(), path.name


def test_command_imports_neither_torch_nor_fairseq(archive, prepared):
    """So that a run with nothing to do is fast."""
    code = (
        "import sys; sys.argv = ['intra-distillation'] + sys.argv[1:]\n"
        "from intra_distillation_fairseq.cli.main import main\n"
        "assert main() == 0\n"
        "heavy = {'torch', 'fairseq', 'sacremoses', 'sentencepiece', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = prepare(
        "--langs", "de", "--url", archive.as_uri(), "--out", prepared, "--vocab-size", 130,
        command=(sys.executable, "-c", code, "prepare-iwslt14"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_sample_has_the_layout_of_the_real_archive(archive):
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["2014-01/texts/es/en/es-en.tgz", "2014-01/texts/de/en/de-en.tgz"]
