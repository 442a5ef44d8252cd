"""The real command on archives of the layout of WMT'17: generated ones, and small real ones where they are at hand."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from killing import AT_EVENT
from wit3_sample import sentence, tgz

from intra_distillation_fairseq.cli.main import main
from intra_distillation_fairseq.corpus import pairs

COMMAND = Path(sys.executable).with_name("intra-distillation")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_wmt17.sh"
# name of the archive -> path of its text, pairs of it here
CORPORA = {
    "training-parallel-europarl-v7.tgz": ("training/europarl-v7.de-en", 210),
    "training-parallel-commoncrawl.tgz": ("commoncrawl.de-en", 150),
    "training-parallel-nc-v12.tgz": ("training/news-commentary-v12.de-en", 90),
}
FLAGS = ("--accept-other-archives", "--vocab-size", 130, "--jobs", 2)


def prepare(*flags: object, command=(COMMAND, "prepare-wmt17"), env=None) -> subprocess.CompletedProcess:
    environment = {**os.environ, **(env or {})}
    words = [str(text) for text in (*command, *flags)]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


def lines_of(path: Path) -> list[str]:
    lines = path.read_bytes().decode().split("\n")
    assert lines.pop() == ""
    return lines


def tree(folder: Path) -> dict[str, str]:
    """Path -> checksum of all that must not depend on how the folder was made."""
    out = folder / "en-de"
    names = ["raw", "spm", "pieces", "bin", "orig"]
    files = [path for name in names for path in (out / name).iterdir()] + [out / "dict.txt", out / "manifest.json"]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def text_of(name: str, lang: str) -> list[str]:
    """Both sides have as many words, but for some pairs that the filter drops."""
    inner, count = CORPORA[name]
    words, own = random.Random(inner), random.Random(inner + lang)
    lines = []
    for number in range(1, count + 1):
        line = " ".join(sentence(own)[:-1] for _ in range(words.randint(2, 3)))
        if number % 50 == 0 and lang == "de":
            line = " ".join([line] * 4)
        lines.append(line + ("" if number % 60 == 0 and lang == "en" else "."))
    lines[3] = "Ein „Wort–Paar“…\r1 2\u2028x" if lang == "de" else "A “word–pair”…\r1 2\u2028x"
    lines[4] = "" if lang == "en" else "Keine Seite."
    return lines


def sgm(lines: list[str]) -> str:
    body = "".join(f'<seg id="{i}">{line}</seg>\n' for i, line in enumerate(lines, start=1))
    return f'<srcset setid="newstest2014" srclang="any">\n<doc docid="1">\n<p>\n{body}</p>\n</doc>\n</srcset>\n'


SOURCES = ["“Ba be”, bi–bo…", "ba  ( be ) .", "bi &amp; bo"]
REFERENCES = ["„Da de“, di – do …", "da  ( de ) .", "di &amp; do"]


def write_archives(folder: Path, test: bool = True) -> Path:
    folder.mkdir()
    for name, (inner, _) in CORPORA.items():
        members = {f"{inner}.{lang}": "\n".join(text_of(name, lang)) + "\n" for lang in ("de", "en")}
        (folder / name).write_bytes(tgz({"training/other.cs-en.cs": "x\n", **members}))
    if test:
        stem = "test-full/newstest2014-deen"
        members = {f"{stem}-src.en.sgm": sgm(SOURCES), f"{stem}-ref.de.sgm": sgm(REFERENCES)}
        (folder / "test-full.tgz").write_bytes(tgz(members))
    return folder


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    return write_archives(tmp_path_factory.mktemp("wmt ü") / "archives")


@pytest.fixture(scope="module")
def prepared(archives, tmp_path_factory) -> Path:
    """The whole command through the script; tests leave the folder as it is."""
    out = tmp_path_factory.mktemp("wmt17 ü") / "out"
    done = prepare("--archives", archives, "--out", out, *FLAGS, command=("bash", SCRIPT))
    assert done.returncode == 0, done.stderr
    stages = [line for line in done.stderr.split("\n") if line.endswith(" ...")]  # among the progress of slow ones
    assert stages == ["extract ...", "clean ...", "subwords ...", "encode ...", "binarise ..."]
    manifest = json.loads((out / "en-de/manifest.json").read_text())
    train, valid = (manifest["splits"][split]["binarised_lines"] for split in ("train", "valid"))
    assert done.stdout == (
        f"en-de: train 443 / valid 4 / test 3 lines, 131 types in {out / 'en-de'} (made: extract, clean, subwords, "
        "encode, binarise)\n"
        "  odd lines: carriage_return 6, line_separator 6, empty 3; which ones, and what became of them: "
        f"{out / 'en-de' / 'oddities.json'}\n"
        f"  train: {train} of 446 pairs left by the filter (pieces, ratio 1.5, at most 256)\n"
        f"  valid: {valid} of 4 pairs left by the filter (pieces, ratio 1.5, at most 256)\n"
        "  test: newstest2014, 3 pairs, from test-full.tgz\n"
        "  pairs given: europarl-v7 210, commoncrawl 150, news-commentary-v12 90; the published archives give "
        "1,920,209 / 2,399,123 / 270,769 and 3,003 of the test set (the third from memory), not as here: these "
        "archives have another text\n"
    )
    return out


def test_every_hundredth_pair_is_held_out_before_any_filter(prepared):
    """Numbers 100, 200, 300, 400 over the three corpora; a pair with an empty side counts and goes."""
    raw = prepared / "en-de" / "raw"
    given = {lang: [line for name in CORPORA for line in text_of(name, lang)] for lang in ("en", "de")}
    for lang in ("en", "de"):
        assert lines_of(raw / f"valid.{lang}") == [given[lang][number - 1] for number in (100, 200, 300, 400)]
        train = lines_of(raw / f"train.{lang}")
        expected = [
            line
            for number, line in enumerate(given[lang], start=1)
            if number % 100 and all(given[side][number - 1] for side in given)
        ]
        assert len(train) == len(expected) == 443
        assert [line for line in train if "2 x" not in line] == [line for line in expected if "\r" not in line]
    assert lines_of(raw / "train.de")[3] == 'Ein "Wort-Paar"... 1 2 x'
    assert lines_of(raw / "train.en")[3] == 'A "word-pair..." 1 2 x'


def test_source_is_treated_and_reference_is_not(prepared):
    raw = prepared / "en-de" / "raw"
    assert lines_of(raw / "test.en") == ['"Ba be," bi-bo...', "ba (be).", "bi & amp; bo"]
    assert lines_of(raw / "test.de") == ["„Da de“, di – do …", "da ( de ) .", "di &amp; do"]


def test_pieces_are_filtered_and_raw_text_is_not(prepared):
    folder = prepared / "en-de"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["corpus"], manifest["source_lang"], manifest["target_lang"]) == ("wmt17_en_de", "en", "de")
    assert manifest["settings"]["max_pieces"] == 256 and manifest["settings"]["ratio_in_pieces"] == 1.5
    lengths = [
        [len(line.split()) for line in lines_of(folder / f"pieces/train.{lang}")] for lang in ("en", "de")
    ]  # fmt: skip
    assert max(max(one) / min(one) for one in zip(*lengths)) <= 1.5
    split = manifest["splits"]["train"]
    assert split["lines"] == 443 and split["binarised_lines"] == len(lengths[0]) < 443
    assert manifest["splits"]["test"]["binarised_lines"] == 3


def test_second_run_has_nothing_to_do(prepared, archives):
    done = prepare("--archives", archives, "--out", prepared, *FLAGS)
    assert done.returncode == 0 and "(nothing to do)" in done.stdout and done.stderr == ""


def test_other_jobs_and_zip_archives_give_the_same_text(prepared, archives, tmp_path):
    """The archives as the mirrors have them, one process, forced: all but the checksums of the archives is alike."""
    (tmp_path / "zips").mkdir()
    for name, (inner, _) in CORPORA.items():
        with zipfile.ZipFile(tmp_path / "zips" / name.replace(".tgz", ".zip"), "w") as zipped:
            for lang in ("de", "en"):
                zipped.writestr(f"{inner}.{lang}", "\n".join(text_of(name, lang)) + "\n")
    (tmp_path / "zips/test-full.tgz").write_bytes((archives / "test-full.tgz").read_bytes())
    done = prepare("--archives", tmp_path / "zips", "--out", tmp_path, *FLAGS, "--jobs", 1)
    assert done.returncode == 0, done.stderr
    other, same = tree(tmp_path), tree(prepared)
    del other["manifest.json"], same["manifest.json"]
    assert other == same


def test_words_on_request_and_a_sample_of_lines(prepared, archives, tmp_path):
    subprocess.run(["cp", "-r", prepared, tmp_path / "out"], check=True)
    flags = (*FLAGS, "--count", "words", "--max-length", 40, "--spm-lines", 300)
    done = prepare("--archives", archives, "--out", tmp_path / "out", *flags)
    assert "(made: clean, subwords, encode, binarise)" in done.stdout
    assert " pairs left by the filter (words, ratio 1.5, at most 40)\n" in done.stdout
    manifest = json.loads((tmp_path / "out/en-de/manifest.json").read_text())
    settings = manifest["settings"]
    assert settings["train"]["max_words"] == 40 and "max_pieces" not in settings
    assert settings["spm_lines_evenly_spaced"] == 300
    assert manifest["splits"]["train"]["binarised_lines"] == manifest["splits"]["train"]["lines"] < 443


def test_killed_anywhere_it_ends_with_the_same_bytes(prepared, archives, tmp_path):
    """SIGKILL at renames, and between the writes of raw/ and of pieces/."""
    out = tmp_path / "out"

    def killed(event):
        command = (sys.executable, "-c", AT_EVENT, event, out / "en-de", "prepare-wmt17")
        done = prepare("--archives", archives, "--out", out, *FLAGS, command=command)
        assert done.returncode == -9, (event, done.stderr)

    killed("write:1")  # the test set in orig/
    killed("stages/extract.json:2")  # after orig/ took its place, before its stamp
    assert (out / "en-de/orig").exists()
    killed("write:4")  # in raw/
    killed("raw:1")
    killed("write:3")  # in pieces/
    done = prepare("--archives", archives, "--out", out, *FLAGS)
    assert done.returncode == 0, done.stderr
    assert tree(out) == tree(prepared)
    assert not list((out / "en-de").glob(".making*"))


@pytest.mark.parametrize("writes", [1, 3, 9])
def test_full_disk(prepared, archives, tmp_path, monkeypatch, capsys, writes):
    """At the first write (orig/), in raw/, in pieces/: one line, and a run with room finishes the work."""
    real, left = pairs.PairWriter.write, [writes]

    def write(self, chunk):
        left[0] -= 1
        if not left[0]:
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"x")
        real(self, chunk)

    flags = [str(flag) for flag in ("--archives", archives, "--out", tmp_path / "out", *FLAGS)]
    with monkeypatch.context() as patched:
        patched.setattr(pairs.PairWriter, "write", write)
        assert main(["prepare-wmt17", *flags]) == 2
    assert capsys.readouterr().err.split("\n")[-2] == (
        f"intra-distillation prepare-wmt17: error: no space left on the disk of '{tmp_path / 'out'}' (No space left on "
        "device): free some and run the same command again, it goes on where it stopped; or give another --out"
    )
    made = {path.name for path in (tmp_path / "out/en-de").iterdir()} - {".lock", "stages"}
    assert made == {1: set(), 3: {"orig"}, 9: {"orig", "raw", "oddities.json", "spm", "dict.txt"}}[writes]
    left[0] = 0  # room again
    assert main(["prepare-wmt17", *flags, "--vocab-size", "99999"]) == 2  # ends after raw/
    assert "--vocab-size '99999' is too large" in capsys.readouterr().err
    for path in (prepared / "en-de/raw").iterdir():
        assert (tmp_path / "out/en-de/raw" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("command", ["prepare-iwslt14", "prepare-parallel"])
def test_full_disk_in_the_other_commands(command, tmp_path, monkeypatch, capsys):
    from wit3_sample import pair_files, write_archive

    def full(self, chunk):
        with open("/dev/full", "wb", buffering=0) as stream:
            stream.write(b"x")

    monkeypatch.setattr(pairs.PairWriter, "write", full)
    if command == "prepare-iwslt14":
        archive = write_archive(tmp_path / "a.tgz", {"de": pair_files("de", talks=1, lines=30)})
        flags = ["--langs", "de", "--archive", str(archive)]
    else:
        for lang in ("de", "en"):
            (tmp_path / f"text.{lang}").write_text("a\n")
        prefix = str(tmp_path / "text")
        flags = ["--train", prefix, "--valid", prefix, "--test", prefix, "--src", "de", "--tgt", "en"]
    assert main([command, *flags, "--out", str(tmp_path / "out"), "--jobs", "1"]) == 2
    assert f"{command}: error: no space left on the disk of '{tmp_path / 'out'}' (" in capsys.readouterr().err


def check_error(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"intra-distillation prepare-wmt17: error: {message}\n"


def test_missing_archive(archives, tmp_path):
    (tmp_path / "some").mkdir()
    for name in CORPORA:
        if "commoncrawl" not in name:
            (tmp_path / "some" / name).write_bytes((archives / name).read_bytes())
    check_error(
        prepare("--archives", tmp_path / "some", "--out", tmp_path / "out"),
        f"--archives '{tmp_path / 'some'}' has no 'training-parallel-commoncrawl.tgz' (nor "
        "training-parallel-commoncrawl.zip): put it there, or leave --archives away to download the archives",
    )
    assert not (tmp_path / "out").exists()


def test_wrong_checksum(archives, tmp_path):
    """Refused before anything is made of it; nothing but the download folder's notes is there."""
    env = {"SACREBLEU": str(sacrebleu_files(tmp_path / "sacrebleu"))}
    folder = write_archives(tmp_path / "archives", test=False)
    path = folder / "training-parallel-europarl-v7.tgz"
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    check_error(
        prepare("--archives", folder, "--out", tmp_path / "out", env=env),
        f"'{path}' has the SHA-256 '{actual}', published is "
        "0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7: get it again, or give "
        "--accept-other-archives to take it as it is",
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["download"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--count", "letters"), "--count 'letters': needed is one of pieces, words"),
        (("--ratio", "0.5"), "--ratio '0.5': needed is a number, at least 1"),
        (("--max-length", "0"), "--max-length '0': needed is a whole number, at least 1"),
        (("--spm-lines", "many"), "--spm-lines 'many': needed is a whole number, at least 1"),
        (("--archives", "no/such"), "--archives 'no/such' is not a folder: give the one that holds the archives"),
        (
            ("--accept-other-archives",),
            "--accept-other-archives is for archives of yours: give --archives DIR too",
        ),
    ],
)
def test_bad_flags(flags, message, tmp_path):
    check_error(prepare(*flags, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def test_archive_with_a_side_too_short(archives, tmp_path):
    folder = tmp_path / "archives"
    subprocess.run(["cp", "-r", archives, folder], check=True)
    name = "training-parallel-commoncrawl.tgz"
    inner = CORPORA[name][0]
    members = {f"{inner}.{lang}": "\n".join(text_of(name, lang)) + "\n" for lang in ("de", "en")}
    members[f"{inner}.de"] += "mehr\n"
    (folder / name).write_bytes(tgz(members))
    done = prepare("--archives", folder, "--out", tmp_path / "out", *FLAGS)
    assert done.returncode == 2 and done.stderr.endswith(
        f"error: '{inner}.en' has 150 lines and '{inner}.de' has 151: a parallel text needs the same number on both "
        "sides, line for line\n"
    )
    assert not (tmp_path / "out/en-de/orig").exists()


def sacrebleu_files(folder: Path) -> Path:
    """As sacrebleu keeps the test set once it has it."""
    texts = folder / "wmt14" / "full"
    texts.mkdir(parents=True)
    for field, lines in (("src", SOURCES), ("ref", REFERENCES)):
        (texts / f"wmt14_full.en-de.{field}").write_text("".join(" ".join(line.split()) + "\n" for line in lines))
    for field in ("docid", "genre", "origlang"):
        (texts / f"wmt14_full.en-de.{field}").write_text("x\n" * 3)
    return folder


def test_test_set_through_sacrebleu(prepared, archives, tmp_path):
    """The same text as from the archive; without either, one clear line."""
    folder = write_archives(tmp_path / "archives", test=False)
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9") | {"no_proxy": ""}
    done = prepare(
        "--archives", folder, "--out", tmp_path, *FLAGS, env={**nowhere, "SACREBLEU": str(tmp_path / "empty")}
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "error: sacrebleu could not get its test set wmt14/full (" in done.stderr
    assert done.stderr.endswith("into a folder with the other archives and give --archives DIR\n")
    env = {**nowhere, "SACREBLEU": str(sacrebleu_files(tmp_path / "sacrebleu"))}
    prepare("--archives", folder, "--out", tmp_path, *FLAGS, "--vocab-size", 99999, env=env)  # ends after raw/
    report = json.loads((tmp_path / "en-de/stages/clean.json").read_text())["report"]
    assert report["test_sets"] == [{"name": "newstest2014", "lines": 3, "from": "sacrebleu wmt14/full"}]
    for lang in ("en", "de"):
        name = f"en-de/raw/test.{lang}"
        assert (tmp_path / name).read_bytes() == (prepared / name).read_bytes()


# The start of the SHA-256 of each text.
REAL_SHA256 = {
    "test.de": "ae5d110486bc33d7",
    "test.en": "45630a6a0096c275",
    "train.de": "fe359bb264f0ef79",
    "train.en": "651c6d2ff55979b2",
    "valid.de": "a07aee87ed3c3589",
    "valid.en": "5f850b301f07e851",
}


def test_real_archives_to_binarised_data(shared_data, tmp_path):
    """The text is what Moses' scripts give (checked with perl), joined to plain text again."""
    folder = shared_data / "wmt17-mini"
    if not folder.is_dir():
        pytest.skip(f"'{folder}' is not there")
    flags = ("--accept-other-archives", "--out", tmp_path, "--vocab-size", 2000, "--spm-lines", 8000, "--jobs", 2)
    done = prepare("--archives", folder, *flags, command=("bash", SCRIPT))
    assert done.returncode == 0, done.stderr
    assert "europarl-v7 13,573, commoncrawl 8,172, news-commentary-v12 6,413; " in done.stdout
    assert "en-de: train 27,877 / valid 281 / test 3,003 lines, 2,001 types in " in done.stdout
    raw = tmp_path / "en-de" / "raw"
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in raw.iterdir()}
    assert digests == REAL_SHA256
    bin_files = {path.name for path in (tmp_path / "en-de/bin").iterdir()}
    assert len(bin_files) == 14 and {"dict.en.txt", "train.en-de.de.bin", "test.en-de.en.idx"} < bin_files
