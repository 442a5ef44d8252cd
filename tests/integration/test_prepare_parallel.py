"""The real command on generated parallel files."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from killing import AT_EVENT
from wit3_sample import sentence

COMMAND = Path(sys.executable).with_name("intra-distillation")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_parallel.sh"
LINES = {"train": 200, "valid": 20, "test": 30}


def write_text(folder: Path) -> None:
    rng = random.Random(5)
    for split, lines in LINES.items():
        for lang in ("de", "en"):
            (folder / f"{split}.{lang}").write_text("".join(sentence(rng) + "\n" for _ in range(lines)))


def prepare(folder: Path, *flags: object, command=(COMMAND, "prepare-parallel")) -> subprocess.CompletedProcess:
    given = [str(flag) for flag in flags]
    splits = [text for split in LINES if f"--{split}" not in given for text in (f"--{split}", folder / split)]
    defaults = {"--src": "de", "--tgt": "en", "--out": folder / "out", "--vocab-size": 100, "--jobs": 2}
    options = [text for flag, value in defaults.items() if flag not in given for text in (flag, value)]
    everything = [str(text) for text in (*command, *splits, *options, *given)]
    return subprocess.run(everything, capture_output=True, text=True, check=False)


def tree(out: Path) -> dict[str, str]:
    """Path -> checksum of everything that must be the same in two runs: not the logs, nor the stamps' times."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.relative_to(out).parts[0] not in ("logs", "stages", ".lock")
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with text and its finished out/; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("parallel, with ü")
    write_text(folder)
    done = prepare(folder, command=("bash", SCRIPT))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"de-en: train 200 / valid 20 / test 30 lines, 101 types in {folder / 'out'} "
        "(made: clean, subwords, encode, binarise)\n"
    )
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    """A folder with text only."""
    write_text(tmp_path)
    return tmp_path


def test_folder(prepared):
    out = prepared / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock", "bin", "dict.txt", "logs", "manifest.json", "oddities.json", "pieces", "raw", "spm", "stages",
    ]  # fmt: skip
    for split in LINES:
        for lang in ("de", "en"):
            assert (out / f"raw/{split}.{lang}").read_bytes() == (prepared / f"{split}.{lang}").read_bytes()
            assert (out / f"pieces/{split}.{lang}").read_bytes().count(b"\n") == LINES[split]
            assert (out / f"bin/{split}.de-en.{lang}.idx").exists()
    assert (out / "bin/dict.de.txt").read_bytes() == (out / "bin/dict.en.txt").read_bytes()
    assert (out / "bin/dict.de.txt").read_bytes() == (out / "dict.txt").read_bytes()


def test_manifest(prepared):
    manifest = json.loads((prepared / "out/manifest.json").read_text())
    assert (manifest["format"], manifest["source_lang"], manifest["target_lang"]) == (1, "de", "en")
    assert manifest["corpus"] == "out" and manifest["vocab_types"] == 101
    assert {split: values["lines"] for split, values in manifest["splits"].items()} == LINES
    digest = hashlib.sha256((prepared / "train.en").read_bytes()).hexdigest()
    assert manifest["splits"]["train"]["sha256"]["en"] == digest == manifest["inputs"]["train.en"]
    assert manifest["settings"]["num_threads"] == 16 and manifest["settings"]["vocab_size"] == 100
    assert manifest["settings"]["spm_train_on"] == ["raw/train.de", "raw/train.en"]
    assert set(manifest["versions"]) == {"sentencepiece", "fairseq", "unicode"}


def test_fairseq_loads_what_was_written(prepared):
    from fairseq.data import Dictionary, data_utils

    out = prepared / "out"
    dictionary = Dictionary.load(str(out / "bin/dict.de.txt"))
    assert len(dictionary) == 101
    data = data_utils.load_indexed_dataset(str(out / "bin/test.de-en.de"), dictionary)
    pieces = (out / "pieces/test.de").read_text().split("\n")[:-1]
    assert [dictionary.string(data[i]) for i in range(len(data))] == pieces


def test_second_run_has_nothing_to_do(prepared):
    before = {path: path.stat().st_mtime_ns for path in (prepared / "out").rglob("*") if path.name != ".lock"}
    done = prepare(prepared)
    assert done.returncode == 0 and done.stdout.endswith("(nothing to do)\n") and done.stderr == ""
    assert {path: path.stat().st_mtime_ns for path in (prepared / "out").rglob("*") if path.name != ".lock"} == before


def test_same_bytes_after_force_and_with_one_process(prepared, tmp_path):
    subprocess.run(["cp", "-r", prepared / "out", tmp_path / "out"], check=True)
    done = prepare(prepared, "--jobs", 1, "--out", tmp_path / "out", "--name", "out", "--force")
    assert "made: clean, subwords, encode, binarise" in done.stdout
    assert tree(tmp_path / "out") == tree(prepared / "out")


def test_changed_setting_redoes_what_depends_on_it(prepared, tmp_path):
    subprocess.run(["cp", "-r", prepared / "out", tmp_path / "out"], check=True)
    done = prepare(prepared, "--out", tmp_path / "out")
    assert "(nothing to do)" in done.stdout  # a copy has other times, and the same bytes
    done = prepare(prepared, "--out", tmp_path / "out", "--vocab-size", 90)
    assert "91 types" in done.stdout and "(made: subwords, encode, binarise)" in done.stdout
    done = prepare(prepared, "--out", tmp_path / "out", "--vocab-size", 90, "--ratio", 9.5)
    assert "(made: clean)" in done.stdout  # the filter kept everything, so nothing after it has changed


def test_killed_anywhere_it_ends_with_the_same_bytes(prepared, tmp_path):
    """SIGKILL at every rename, in the middle of a text file, and while fairseq-preprocess runs."""
    out, program = tmp_path / "out", (sys.executable, "-c", AT_EVENT)

    def killed(*events):
        for event in events:
            done = prepare(prepared, "--out", out, command=(*program, event, out, "prepare-parallel"))
            assert done.returncode == -9, (event, done.stderr)

    def key(stage):
        return json.loads((out / "stages" / f"{stage}.json").read_text())["key"]

    # A stage writes its stamp twice: without a key before its outputs get their names, with it after.
    killed("write:2", "stages/clean.json:1", "oddities.json:1", "raw:1", "stages/clean.json:2")
    assert (out / "raw").exists() and (out / "oddities.json").exists() and not key("clean")
    killed("raw:1")  # the one that was there has stepped aside
    assert not (out / "raw").exists()
    killed("stages/subwords.json:1", "dict.txt:1", "spm:1", "stages/subwords.json:2")
    assert (out / "spm").exists() and key("clean") and not key("subwords")
    killed("write:2", "pieces:1", "stages/encode.json:2")
    assert (out / "pieces").exists() and not key("encode")
    killed("start:1", "bin:1", "stages/binarise.json:2")
    assert (out / "bin").exists() and not key("binarise")
    killed("manifest.json:1")
    done = prepare(prepared, "--out", out)
    assert done.returncode == 0, done.stderr
    assert tree(out) == tree(prepared / "out")
    assert not list(out.glob(".making*"))


def test_options_for_the_text(text):
    def replace(split, lang, number, line):
        path = text / f"{split}.{lang}"
        lines = path.read_text().split("\n")
        lines[number] = line
        path.write_text("\n".join(lines))

    replace("train", "de", 0, "Eins zwei drei vier fünf.")  # 6 words with the dot
    replace("train", "en", 0, "One two three four.")  # 5
    replace("train", "de", 1, "Eins zwei drei vier.")
    replace("train", "en", 1, "One.")  # 5 / 2 is more than 1.5
    replace("train", "de", 2, " ".join(["w"] * 21))
    replace("train", "en", 2, " ".join(["w"] * 20))
    replace("test", "en", 0, "It's ( Odd ) .")
    replace("test", "de", 1, "")  # a test line always stays
    flags = ("--lowercase", "--moses", "--ratio", "1.5", "--max-length", "20", "--spm-train-on-all", "--name", "mine")
    done = prepare(text, *flags)
    assert done.returncode == 0, done.stderr
    raw = text / "out/raw"
    assert (raw / "train.de").read_text().split("\n")[0] == "eins zwei drei vier fünf."
    assert "one." not in (raw / "train.en").read_text().split("\n")
    assert "w w w" not in (raw / "train.en").read_text()
    assert (raw / "test.en").read_text().split("\n")[0] == "it's (odd)."
    test = (text / "out/pieces/test.de").read_text().split("\n")
    assert len(test) == 31 and test[1] == ""
    manifest = json.loads((text / "out/manifest.json").read_text())
    assert manifest["corpus"] == "mine" and "sacremoses" in manifest["versions"]
    assert manifest["settings"]["spm_train_on"] == [
        f"raw/{split}.{lang}" for split in ("test", "train", "valid") for lang in ("de", "en")
    ]
    assert manifest["settings"]["train"] == {
        "unescape": False, "moses": True, "drop_empty": True, "ratio": 1.5, "max_words": 20, "lowercase": True,
    }  # fmt: skip


def test_odd_line_breaks_never_shift_the_pairs(text):
    """CRLF, BOM, NEL and U+2028 inside lines, gzip; pairs with an empty side go, together."""
    sides = {"de": [], "en": []}
    for number in range(100):
        sides["de"].append(f"ba{number}\u2028be\x85bi\r\n" if number % 10 else "\r\n")
        sides["en"].append(f"ba{number}\x0bda\n" if number % 15 else "\u200b\n")
    (text / "train.de").write_bytes(("\ufeff" + "".join(sides["de"])).encode())
    (text / "train.en").unlink()
    (text / "train.en.gz").write_bytes(gzip.compress("".join(sides["en"]).encode()))
    done = prepare(text, "--vocab-size", 21)
    assert done.returncode == 0, done.stderr
    out = text / "out"
    kept = [number for number in range(100) if number % 10]
    lines = {lang: (out / f"raw/train.{lang}").read_text().split("\n")[:-1] for lang in sides}
    assert lines["de"] == [f"ba{number} be bi" for number in kept]
    assert [len(line.splitlines()) for line in lines["en"]] == [1] * len(kept)
    # U+200B is text, but gives no piece: those pairs go when they are encoded
    kept = [number for number in kept if number % 15]
    pieces = {lang: (out / f"pieces/train.{lang}").read_text().split("\n")[:-1] for lang in sides}
    for lang, rest in (("de", "bebi"), ("en", "da")):
        decoded = [line.replace(" ", "").replace("▁", "") for line in pieces[lang]]
        assert decoded == [f"ba{number}{rest}" for number in kept]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["splits"]["train"]["lines"] == 90
    assert manifest["splits"]["train"]["binarised_lines"] == len(kept)


def check_error(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.split("\n")[-2] == f"intra-distillation prepare-parallel: error: {message}"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--src", "de-CH"), "--src 'de-CH': needed are letters, digits and '_', such as 'de'"),
        (("--src", "en"), "--src and --tgt are both 'en': fairseq needs two different names"),
        (("--vocab-size", "many"), "--vocab-size 'many': needed is a whole number, at least 8"),
        (("--jobs", "0"), "--jobs '0': needed is a whole number, at least 1"),
        (("--ratio", "0.5"), "--ratio '0.5': needed is a number, at least 1"),
        (("--max-length", "-3"), "--max-length '-3': needed is a whole number, at least 1"),
    ],
)
def test_wrong_options(text, flags, message):
    check_error(prepare(text, *flags), message)
    assert not (text / "out").exists()


def test_missing_file(text):
    (text / "valid.en").unlink()
    check_error(
        prepare(text),
        f"--valid '{text}/valid': there is no '{text}/valid.en' and no '{text}/valid.en.gz': check the prefix and the "
        "languages",
    )
    assert not (text / "out").exists()


def test_unequal_numbers_of_lines(text):
    with open(text / "test.de", "a") as stream:
        stream.write("one more\n")
    check_error(
        prepare(text),
        f"'{text}/test.de' has 31 lines and '{text}/test.en' has 30: a parallel text needs the same number on both "
        "sides, line for line",
    )
    assert not (text / "out/raw").exists()


def test_invalid_utf8(text):
    with open(text / "train.de", "ab") as stream:
        stream.write(b"M\xfcnchen\n")
    with open(text / "train.en", "ab") as stream:
        stream.write(b"Munich\n")
    check_error(
        prepare(text),
        f"'{text}/train.de' line 201 is not UTF-8 (byte 0xfc at position 1): convert the file to UTF-8, or give "
        "--replace-invalid-utf8",
    )
    assert not (text / "out/raw").exists() and not list((text / "out").glob(".making*"))


def test_nothing_left(text):
    (text / "valid.en").write_text("\n" * 20)
    check_error(
        prepare(text),
        f"--valid '{text}/valid': none of its 20 pairs is left: give other text, or a wider --ratio and --max-length",
    )


def test_vocabulary_too_large(text):
    done = prepare(text, "--vocab-size", 30000)
    assert done.returncode == 2
    assert "--vocab-size '30000' is too large for this text, from which at most " in done.stderr
    assert (text / "out/raw/train.de").exists() and not (text / "out/spm").exists()


def test_locked_folder(text):
    (text / "out").mkdir()
    with open(text / "out/.lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write("process 4711 on elsewhere\n")
        stream.flush()
        check_error(
            prepare(text),
            f"the data folder '{text}/out' is in use by process 4711 on elsewhere: wait for it, or stop it first",
        )


@pytest.mark.parametrize("name", ["raw", "spm", "dict.txt", "pieces", "bin", "manifest.json"])
def test_what_the_user_has_in_the_folder_is_not_replaced(text, name):
    (text / "out" / name).mkdir(parents=True)
    (text / "out" / name / "mine").write_text("")
    check_error(
        prepare(text),
        f"'{text}/out/{name}' is there and no stamp in '{text}/out/stages' says that it was made here: give another "
        "--out, or move it away",
    )
    assert sorted(p.name for p in (text / "out").rglob("*")) == sorted([".lock", name, "mine"])


def test_text_inside_the_folder_is_not_replaced(text):
    raw = text / "mine" / "raw"
    raw.mkdir(parents=True)
    write_text(raw)
    (raw / "README").write_text("mine")
    before = tree(raw)
    done = prepare(raw, "--out", text / "mine", "--lowercase")
    check_error(
        done,
        f"the input '{raw}/train.de' lies in '{raw}', which is made anew: give another --out, or move the input",
    )
    assert tree(raw) == before


def test_failure_of_fairseq_shows_its_log(text, tmp_path):
    """A fairseq_cli that fails, put before the real one."""
    broken = tmp_path / "broken" / "fairseq_cli"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("")
    (broken / "preprocess.py").write_text("raise SystemExit('the disk is on fire')")
    done = prepare(text, command=("env", f"PYTHONPATH={tmp_path / 'broken'}", COMMAND, "prepare-parallel"))
    check_error(done, f"fairseq-preprocess ended with code 1: its output is in '{text}/out/logs/binarise.log'")
    assert "the disk is on fire" in done.stderr
    assert not (text / "out/bin").exists() and not (text / "out/manifest.json").exists()


@pytest.mark.parametrize("harm", ["lost sentence", "cut data"])
def test_exit_code_of_fairseq_is_not_trusted(text, tmp_path, harm):
    """A fairseq_cli that ends well and loses something."""
    broken = tmp_path / "broken" / "fairseq_cli"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("")
    size = 29 if harm == "lost sentence" else 30
    (broken / "preprocess.py").write_text(
        "import os, struct, sys\n"
        "out = sys.argv[sys.argv.index('--destdir') + 1]\n"
        "os.mkdir(out)\n"
        "for lang in ('de', 'en'):\n"
        "    open(f'{out}/dict.{lang}.txt', 'w').write(open('dict.txt').read())\n"
        f"    for split, n in (('train', 200), ('valid', 20), ('test', {size})):\n"
        "        head = struct.pack('<9sQBQ', b'MMIDIDX\\x00\\x00', 1, 8, n) + struct.pack(f'<{n}i', *[3] * n)\n"
        "        open(f'{out}/{split}.de-en.{lang}.idx', 'wb').write(head)\n"
        "        open(f'{out}/{split}.de-en.{lang}.bin', 'wb').write(bytes(6 * n - (split == 'test')))\n"
    )
    done = prepare(text, command=("env", f"PYTHONPATH={tmp_path / 'broken'}", COMMAND, "prepare-parallel"))
    assert done.returncode == 2
    expected = {
        "lost sentence": "test.de-en.de.idx' has '29' sentences, expected are 30: delete the folder and run again",
        "cut data": "test.de-en.de.bin' has '179' bytes, its index says 180: delete the folder and run again",
    }[harm]
    assert expected in done.stderr
    assert not (text / "out/bin").exists()
