"""Text that is not as it should be: no line of it may shift one side against the other, and each is counted."""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path

import pytest
from wit3_sample import pair_files, sentence, tgz, write_archive

from intra_distillation_fairseq.cli.main import main
from intra_distillation_fairseq.corpus import newstest2014, wit3
from intra_distillation_fairseq.corpus.clean import read_lines, split_lines
from intra_distillation_fairseq.corpus.moses import Moses
from intra_distillation_fairseq.corpus.oddities import KINDS, Oddities, scan
from intra_distillation_fairseq.corpus.pairs import Chunk, pack, read_chunks
from intra_distillation_fairseq.corpus.segments import join_segments
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.generation import read_hypotheses
from intra_distillation_fairseq.experiments.prepared import open_prepared, raw_lines

# What stands in a line -> its kind in the report, and what is read.
ODD = {
    "a\rb": ("carriage_return", "a b"),
    **{f"a{mark}b": ("line_separator", "a b") for mark in "\v\f\x1c\x1d\x1e\x85\u2028\u2029"},
    "a\0b": ("nul", "a\0b"),
    **{f"a{mark}b": ("control", f"a{mark}b") for mark in "\x01\x1b\x1f\x7f\x80\x9f"},
    "a\tb": ("tab", "a\tb"),
    "a\ufeffb": ("byte_order_mark_within", "a\ufeffb"),
    **{f"a{mark}b": ("bidi_mark", f"a{mark}b") for mark in "\u061c\u200e\u200f\u202a\u202e\u2066\u2069"},
    **{f"a{mark}b": ("zero_width", f"a{mark}b") for mark in "\u00ad\u200b\u200c\u200d\u2060"},
    "a" * 1_000_000: ("long_line", "a" * 1_000_000),
    "a b " * 250_000 + "c": ("long_line", "a b " * 250_000 + "c"),
    "": ("empty", ""),
    **{mark: ("only_spaces", mark) for mark in (" ", "\u00a0", "\u3000", " \u2003 ")},
    "\x85": ("only_spaces", " "),
}
NAMES = [f"{kind} {text[:8]!a}" for text, (kind, _) in ODD.items()]
INVALID = {
    "Latin-1": b"M\xfcnchen",
    "lone surrogate": b"\xed\xa0\x80",
    "overlong": b"\xc0\xaf",
    "cut": b"\xe2\x80",
    "beyond Unicode": b"\xf5\x80\x80\x80",
}


def lines_of_file(payloads, path):
    path.write_bytes(b"".join(line + b"\n" for line in payloads))
    return list(read_lines(path))


def lines_of_gzip(payloads, path):
    path = path.with_suffix(".gz")
    path.write_bytes(gzip.compress(b"".join(line + b"\r\n" for line in payloads)))
    return list(read_lines(path))


def lines_of_chunks(payloads, path):
    path.write_bytes(b"\n".join(payloads) + (b"" if payloads[-1] else b"\n"))  # no newline at the end
    return [line for chunk in read_chunks("train", path, path) for line in split_lines(chunk.sides[1])]


def lines_of_tags(payloads, path):
    path.write_bytes(b"<url>x</url>\n" + b"".join(line + b"\n" for line in payloads) + b"<talkid>1</talkid>\n")
    texts, found = (read_lines(path), read_lines(path)), (Oddities(), Oddities())
    return [target for _, target in wit3.train_pairs(texts, ("a", "b"), found)]


def segment_lines(payloads):
    return b"".join(b'<seg id="%d">%b</seg>\n' % (n, line) for n, line in enumerate(payloads, start=1))


def lines_of_xml(payloads, path):
    path.write_bytes(b'<doc docid="1">\n' + segment_lines(payloads) + b"</doc>\n")
    return [one.text for one in wit3.test_segments(read_lines(path), "x", Oddities())]


def lines_of_sgm(payloads, path):
    path.write_bytes(b'<doc docid="1">\n' + segment_lines(payloads) + b"</doc>\n")
    return [one.text for one in newstest2014.segments(read_lines(path), "x", Oddities())]


def lines_of_raw(payloads, path):
    path.write_bytes(b"".join(line + b"\n" for line in payloads))
    return raw_lines(path)


def lines_of_generate(payloads, path):
    """Not in order, as fairseq-generate writes them."""
    lines = [b"D-%d\t-1.5\t%b\n" % (number, line) for number, line in enumerate(payloads)]
    path.write_bytes(b"H-0\t1\tx\n" + b"".join(lines[::-1]))
    return read_hypotheses(path)


READERS = [
    lines_of_file, lines_of_gzip, lines_of_chunks, lines_of_tags, lines_of_xml, lines_of_sgm, lines_of_raw,
    lines_of_generate,
]  # fmt: skip
# They read what was cleaned before, or what fairseq made of it: nothing is changed on the way.
AS_IT_IS = (lines_of_raw, lines_of_generate)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("odd", ODD, ids=NAMES)
def test_each_kind_in_each_reader(tmp_path, reader, odd):
    """Line 4 of 7 is odd; it stays line 4, and the others stay what they are."""
    texts = ["eins", "zwei", "drei", odd, "fünf", "sechs", "sieben"]
    got = reader([text.encode() for text in texts], tmp_path / "text.de")
    expected = odd if reader in AS_IT_IS else ODD[odd][1]
    if reader is lines_of_xml:
        expected = re.sub("^[ \u2003\u3000]+|[ \u2003\u3000]+$", "", expected)
    if reader is lines_of_sgm:
        expected = " ".join(expected.split())
    assert got == [*texts[:3], expected, *texts[4:]]


@pytest.mark.parametrize("odd", ODD, ids=NAMES)
def test_each_kind_is_counted(tmp_path, odd):
    (tmp_path / "a").write_bytes(f"eins\n{odd}\ndrei\n{odd}\n".encode() * 3)
    kind = ODD[odd][0]
    found = scan(tmp_path / "a").as_json()
    assert found.pop("lines") == 12
    assert found[kind] == {"lines": 6, "first": [2, 4, 6, 8, 10]}
    assert found.keys() - {kind} <= ({"line_separator"} if odd == "\x85" else set())


@pytest.mark.parametrize(("data", "expected"), [
    (b"", {"lines": 0}),
    (b"a\nb", {"lines": 2, "no_final_newline": {"lines": 1, "first": [2]}}),
    (b"\xef\xbb\xbfa\r\nb\n", {
        "lines": 2, "byte_order_mark": {"lines": 1, "first": [1]}, "crlf": {"lines": 1, "first": [1]},
    }),
    (b"\xef\xbb\xbf", {
        "lines": 1, "byte_order_mark": {"lines": 1, "first": [1]}, "empty": {"lines": 1, "first": [1]},
        "no_final_newline": {"lines": 1, "first": [1]},
    }),
    (b"a\n\r\n\xc2\xa0\r\n", {
        "lines": 3, "crlf": {"lines": 2, "first": [2, 3]}, "empty": {"lines": 1, "first": [2]},
        "only_spaces": {"lines": 1, "first": [3]},
    }),
])  # fmt: skip
def test_starts_and_ends_are_counted(tmp_path, data, expected):
    (tmp_path / "a").write_bytes(data)
    assert scan(tmp_path / "a").as_json() == expected


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", INVALID)
def test_what_is_not_utf8_is_refused_with_its_line(tmp_path, reader, name):
    with pytest.raises(UserError) as error:
        reader([b"eins", b"zwei", INVALID[name], b"vier"], tmp_path / "text.de")
    line = {lines_of_tags: 4, lines_of_xml: 4, lines_of_sgm: 4, lines_of_generate: 3}.get(reader, 3)
    assert re.search(rf"text(\.de|\.gz)' line {line} is not (UTF-8|a whole translation)", str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", INVALID)
def test_what_is_not_utf8_can_be_replaced_and_is_counted(tmp_path, name):
    path = tmp_path / "a"
    path.write_bytes(b"eins\n" + INVALID[name] + b"\n\xff\rdrei\n")
    lines = list(read_lines(path, replace_invalid=True))
    assert len(lines) == 3 and "\ufffd" in lines[1] and lines[2] == "\ufffd drei"
    [chunk] = read_chunks("train", path, path, replace_invalid=True)
    assert split_lines(chunk.sides[0]) == lines
    assert scan(path, replace_invalid=True).as_json()["invalid_utf8"] == {"lines": 2, "first": [2, 3]}


@pytest.mark.parametrize("text", ["DOT" * 300_000, "a" + " " * 1_000_000 + "b", ">" * 300_000])
def test_no_step_takes_longer_than_the_line(text):
    """Each of these took hours somewhere: one look at the rest of the line from each of its characters."""
    moses = Moses("de", aggressive=True)
    assert moses.detokenise(moses.tokenise(text)).strip()
    assert wit3.segment_text(f'<seg id="1"> {text}') == text
    assert newstest2014.segment_text(f'<seg id="1"> {text}').startswith("<seg ") or ">" in text
    assert newstest2014.segment_text(f'<seg id="1"> {text}</seg>') == " ".join(text.split())


def test_a_step_that_breaks_a_line_is_found():
    with pytest.raises(AssertionError, match="put a line feed into a line"):
        list(pack("train", [("a\nb", "c"), ("d", "e")]))
    assert list(pack("train", [("a", "b")])) == [Chunk("train", (b"a\n", b"b\n"))]


def test_a_manifest_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is damaged"):
        open_prepared(tmp_path, ())


# --- prepare-parallel, from files to scored hypotheses


def prepare(capsys, *flags: object) -> tuple[int, str, str]:
    status = main([str(flag) for flag in flags])
    return status, *capsys.readouterr()


LINES = {"train": 150, "valid": 60, "test": 60}
NUMBER = re.compile("zahl ?([0-9]+)")


def plant(folder: Path, tail: bytes = b"\n") -> dict[str, dict[str, list[int]]]:
    """Write parallel text in which both sides of pair N have "Zahl N"; returns file -> kind -> lines.

    The kinds come one after the other from line 3 on, on either side in turn.
    """
    rng, planted = random.Random(8), {}
    folder.mkdir(exist_ok=True)
    for split, count in LINES.items():
        sides = {lang: [f"Zahl {n} {sentence(rng)}".encode() for n in range(1, count + 1)] for lang in ("de", "en")}
        for index, (odd, (kind, _)) in enumerate(ODD.items()):
            lang, number = ("de", "en")[index % 2], 3 + index
            if split != "train" or " " in odd:  # one line of a million characters is enough
                odd = odd[:20_000]
            whole = kind in ("empty", "only_spaces")
            sides[lang][number - 1] = odd.encode() if whole else sides[lang][number - 1] + f" {odd} wort".encode()
            planted.setdefault(f"{split}.{lang}", {}).setdefault(kind, []).append(number)
        for lang, lines in sides.items():
            text = b"\n".join(lines) + tail
            if lang == "de":
                text = b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n", 2)
                planted[f"{split}.de"] |= {"byte_order_mark": [1], "crlf": [1, 2]}
            if not tail:
                planted[f"{split}.{lang}"]["no_final_newline"] = [count]
            planted[f"{split}.{lang}"].setdefault("line_separator", [])
            (folder / f"{split}.{lang}").write_bytes(text)
    return planted


def numbers(lines: list[str]) -> list[int | None]:
    """N of each line, None for one without a number."""
    return [int(found[1]) if (found := NUMBER.search(line.lower())) else None for line in lines]


def check_sides(sides: list[list[str]], split: str) -> None:
    """Both sides have the same number in each line; only test has lines without one, and has all pairs."""
    one, other = map(numbers, sides)
    assert len(one) == len(other)
    if split == "test":
        assert len(one) == LINES["test"]
        every = range(1, LINES["test"] + 1)
        assert all(number in (None, n) and mate in (None, n) for number, mate, n in zip(one, other, every))
        assert all(number or mate for number, mate in zip(one, other))
    else:
        assert one == other == sorted(set(one)) and LINES[split] - 10 < len(one) < LINES[split]


def flags(text: Path, out: Path) -> list[object]:
    splits = [flag for split in LINES for flag in (f"--{split}", text / split)]
    return ["prepare-parallel", *splits, "--src", "de", "--tgt", "en", "--out", out, "--jobs", 2, "--name", "x"]


def test_from_planted_files_to_hypotheses(tmp_path, capsys):
    """Each kind in each split: raw/, pieces/, bin/, and what fairseq-generate would print, stay line for line."""
    planted = plant(tmp_path / "text", tail=b"")
    out = tmp_path / "out"
    status, said, errors = prepare(capsys, *flags(tmp_path / "text", out))
    assert status == 0, errors
    report = json.loads((out / "oddities.json").read_text())
    check_report(report, planted)
    assert "  odd lines: byte_order_mark 3, byte_order_mark_within 3, crlf 6, carriage_return 3, " in said
    assert said.endswith(f"which ones, and what became of them: {out}/oddities.json\n")
    manifest = json.loads((out / "manifest.json").read_text())
    for split in LINES:
        check_sides([raw_lines(out / f"raw/{split}.{lang}") for lang in ("de", "en")], split)
        check_sides([decoded(raw_lines(out / f"pieces/{split}.{lang}")) for lang in ("de", "en")], split)
        check_sides([of_fairseq(out, split, lang) for lang in ("de", "en")], split)
        assert report["pairs_left_out"][split] == LINES[split] - manifest["splits"][split]["lines"]
    # hypotheses as fairseq-generate prints them, out of order
    texts = list(enumerate(of_fairseq(out, "test", "en")))
    random.Random(3).shuffle(texts)
    (out / "generate.txt").write_text("".join(f"D-{n}\t-0.5\t{text}\n" for n, text in texts), newline="\n")
    assert numbers(read_hypotheses(out / "generate.txt")) == numbers(raw_lines(out / "raw/test.en"))
    # the same text elsewhere gives the same report, and a second run says it again
    status, said, _ = prepare(capsys, *flags(tmp_path / "text", out))
    assert "(nothing to do)\n  odd lines: " in said
    plant(tmp_path / "elsewhere", tail=b"")
    assert prepare(capsys, *flags(tmp_path / "elsewhere", tmp_path / "b"), "--vocab-size", 99999, "--jobs", 1)[0] == 2
    assert (tmp_path / "b/oddities.json").read_bytes() == (out / "oddities.json").read_bytes()


def check_report(report, planted) -> None:
    for name, kinds in planted.items():
        found = report["files"][name]
        assert found.pop("lines") == LINES[name.split(".")[0]]
        assert found.keys() == {kind for kind, lines in kinds.items() if lines or kind in found}
        for kind, lines in kinds.items():
            if kind == "line_separator":  # U+0085 alone is one, too
                assert set(found[kind]["first"]) <= {*lines, *kinds["only_spaces"]}
            else:
                assert found[kind] == {"lines": len(lines), "first": lines[:5]}
    assert all(report["kinds"][kind] == KINDS[kind] for kind in report["lines"])


def decoded(lines: list[str]) -> list[str]:
    return [line.replace(" ", "").replace("▁", " ").strip() for line in lines]


def of_fairseq(out: Path, split: str, lang: str) -> list[str]:
    from fairseq.data import Dictionary, data_utils

    dictionary = Dictionary.load(str(out / "bin/dict.en.txt"))
    data = data_utils.load_indexed_dataset(str(out / f"bin/{split}.de-en.{lang}"), dictionary)
    return [dictionary.string(data[i], "sentencepiece") for i in range(len(data))]


@pytest.mark.parametrize("further", [("--moses", "--lowercase"), ("--moses", "--ratio", 3, "--max-length", 100)])
def test_planted_files_through_the_options(tmp_path, capsys, further):
    """Only raw/ is wanted: a vocabulary that is too large stops the command after it."""
    check = plant(tmp_path / "text")
    status, _, errors = prepare(capsys, *flags(tmp_path / "text", tmp_path / "out"), *further, "--vocab-size", 99999)
    assert status == 2 and "--vocab-size '99999' is too large" in errors
    for split in LINES:
        check_sides([raw_lines(tmp_path / f"out/raw/{split}.{lang}") for lang in ("de", "en")], split)
    check_report(json.loads((tmp_path / "out/oddities.json").read_text()), check)


def test_clean_files_have_a_short_report(tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for split, count in LINES.items():
        for lang in ("de", "en"):
            (text / f"{split}.{lang}").write_text("".join(f"zahl {n} ist hier\n" for n in range(count)))
    status, said, _ = prepare(capsys, *flags(text, tmp_path / "out"), "--vocab-size", 99999)
    assert status == 2 and said == ""
    assert json.loads((tmp_path / "out/oddities.json").read_text()) == {
        "kinds": {},
        "pairs_left_out": {"train": 0, "valid": 0, "test": 0},
        "lines": {},
        "files": {f"{split}.{lang}": {"lines": count} for split, count in LINES.items() for lang in ("de", "en")},
    }


# --- XML sets: prepare-iwslt14


def iwslt(capsys, tmp_path: Path, files: dict[str, str]) -> tuple[int, str]:
    """Make raw/ of an archive of de-en and stop after it."""
    archive = write_archive(tmp_path / "a.tgz", {"de": files})
    status, _, errors = prepare(
        capsys, "prepare-iwslt14", "--langs", "de", "--archive", archive, "--vocab-size", 99999, "--out", tmp_path,
        "--jobs", 1,
    )  # fmt: skip
    return status, errors


def identified() -> dict[str, str]:
    """The files of an archive, in which both sides of a pair begin with the same "Zahl N"."""
    files = {}
    for name, text in pair_files("de").items():
        # where the text of a line begins: after the <seg> tag, or at a line without a tag
        parts = re.split("(?<=>) (?=.*</seg>)" if name.endswith(".xml") else "(?m)^(?=[^<])", text)
        files[name] = parts[0] + "".join(f"Zahl {n} {part}" for n, part in enumerate(parts[1:]))
    return files


SET = "IWSLT14.TED.tst2010.de-en.{}.xml"
LAUGHS = (
    '<!DOCTYPE lolz [\n<!ENTITY a "ha">\n<!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">\n'
    '<!ENTITY c SYSTEM "file:///etc/passwd">\n]>\n'
)


def test_odd_but_whole_archives(tmp_path, capsys):
    """Entities, other document ids, segments of two lines, odd characters: kept, line for line, and counted."""
    files = identified()
    for side in ("de", "en"):
        name = SET.format(side)
        text = files[name].replace("<mteval>\n", LAUGHS + "<mteval>\n")
        text = text.replace('<seg id="7">Zahl 6', '<seg id="7">Zahl 6 &b; &c;\u2028&#10;\x85')
        text = text.replace('<seg id="9">', '<seg id="8">')  # the same id twice
        files[name] = "\ufeff" + text.replace('</seg>\n<seg id="3"', '\nund weiter</seg>\n<seg id="3"')
    files[SET.format("en")] = files[SET.format("en")].replace('docid="1"', 'docid="eins"').replace("\n", "\r\n")
    train = "train.tags.de-en."
    files[train + "de"] = files[train + "de"].replace("Zahl 5 ", "Zahl 5 <url> ").replace("<talkid>2</talkid>\n", "")
    files[train + "en"] = files[train + "en"].replace("Zahl 9 ", "Zahl 9 <keywords> ")
    files[train + "en"] = files[train + "en"].replace("<keywords>talks, words</keywords>\n", "", 1)
    status, errors = iwslt(capsys, tmp_path, files)
    assert status == 2 and "--vocab-size '99999' is too large" in errors, errors
    raw = {name: raw_lines(tmp_path / "de-en/raw" / name) for name in ("train.de", "train.en", "test.de", "test.en")}
    assert numbers(raw["train.de"]) == numbers(raw["train.en"])
    assert not {5, 9} & set(numbers(raw["train.de"]))
    assert numbers(raw["test.de"]) == numbers(raw["test.en"]) == [*range(12)] * 3
    assert raw["test.de"][30].startswith("zahl 6 &b; &c; &#10; ")
    report = json.loads((tmp_path / "de-en/oddities.json").read_text())
    first = {
        name: {kind: found["first"] for kind, found in kinds.items() if kind != "lines"}
        for name, kinds in report["files"].items()
    }
    assert first[train + "de"] == {"tag_in_text": [7]}
    assert first[train + "en"] == {"tag_in_text": [11], "talk_on_one_side": [101]}
    assert first[SET.format("en")].pop("crlf") == [1, 2, 3, 4, 5]
    assert first[SET.format("de")] == first[SET.format("en")] == {
        "byte_order_mark": [1], "line_separator": [18], "document_names_differ": [11], "open_segment": [12],
        "duplicate_segment": [20], "xml_declaration": [2, 3, 4, 5],
    }  # fmt: skip


def without(text: str, start: str) -> str:
    return re.sub(f"{re.escape(start)}.*\n", "", text, count=1)


def swapped(text: str, one: str, other: str) -> str:
    lines = text.split("\n")
    i, j = (next(n for n, line in enumerate(lines) if line.startswith(start)) for start in (one, other))
    lines[i], lines[j] = lines[j], lines[i]
    return "\n".join(lines)


REFUSED = {
    "missing": (lambda text: without(text, '<seg id="4">'), "line 9 has segment '4' of document '1'"),
    "twice": (
        lambda text: text.replace('<seg id="4">', '<seg id="3"> x</seg>\n<seg id="4">'),
        "line 9 has segment '4'",
    ),
    "not in order": (lambda text: swapped(text, '<seg id="4">', '<seg id="5">'), "line 9 has segment '4'"),
    "another id": (lambda text: text.replace('<seg id="4">', '<seg id="40">'), "line 9 has segment '4'"),
    "last one missing": (lambda text: without(text, '<seg id="12">'), "has 12 lines and "),
    "two on a line": (
        lambda text: text.replace(' </seg>\n<seg id="4">', ' </seg> <seg id="4">'),
        "line 8 has not exactly one '<seg id=\"N\">'",
    ),
    "without id": (lambda text: text.replace('<seg id="4">', "<seg>"), "line 9 has not exactly one"),
    "capital": (lambda text: text.replace('<seg id="4">', '<SEG id="4">'), "line 9 has not exactly one"),
    "cut": (lambda text: text[: text.index('<seg id="7">') + 6], "line 12 has not exactly one"),
}


@pytest.mark.parametrize("harm", REFUSED)
@pytest.mark.parametrize("side", ["de", "en"])
def test_sets_whose_segments_do_not_match_are_refused(tmp_path, capsys, harm, side, record_property):
    files = identified()
    change, message = REFUSED[harm]
    if harm == "last one missing" and side == "de":
        message = "has 11 lines and "
    assert (changed := change(files[SET.format(side)])) != files[SET.format(side)]
    status, errors = iwslt(capsys, tmp_path, {**files, SET.format(side): changed})
    assert status == 2 and message in errors.split("\n")[-2], errors
    assert not (tmp_path / "de-en/raw").exists()
    record_property("sets with other segments refused", 1)


def test_documents_that_changed_places_are_refused():
    def side(*documents: str):
        lines = [line for name in documents for line in (f'<doc docid="{name}">', '<seg id="1">a</seg>')]
        return wit3.test_segments(lines, "x", Oddities())

    odd = Oddities(), Oddities()
    assert len(join_segments((side("a", "b"), side("c", "d")), ("x", "y"), odd)) == 2
    assert odd[1].kinds == {"document_names_differ": (2, [2, 4])}
    with pytest.raises(UserError) as error:
        join_segments((side("a", "b"), side("b", "a")), ("x", "y"), odd)
    assert str(error.value) == (
        "'x' line 2 has segment '1' of document 'a' where 'y' line 2 has segment '1' of document 'b': the sides do not "
        "match, get the archive again"
    )


@pytest.mark.parametrize("harm", ["line lost", "line shifted", "invalid"])
def test_training_text_that_does_not_match_is_refused(tmp_path, capsys, harm):
    files, name = identified(), "train.tags.de-en.en"
    text = files[name]
    if harm == "invalid":
        files[name] = text.encode().replace(b"Zahl 20 ", b"Zahl 20 \xff")
    else:
        files[name] = without(text, "Zahl 3 ")
        if harm == "line shifted":
            files[name] = files[name].replace("Zahl 40 ", "More of it.\nZahl 40 ")
    status, errors = iwslt(capsys, tmp_path, files)
    orig = tmp_path / "de-en/orig"
    expected = {
        "invalid": f"'{orig}/{name}' line 22 is not UTF-8 (byte 0xff at position 8)",
        "line lost": f"talk '0' comes after 30 lines of text in '{orig}/train.tags.de-en.de' (line 32) and after 29 in "
        f"'{orig}/{name}' (line 31): the sides do not match, get the archive again",
    }
    assert status == 2 and expected.get(harm, expected["line lost"]) in errors
    assert not (tmp_path / "de-en/raw").exists()


def test_newstest2014_sides_that_do_not_match_are_refused(tmp_path):
    text = b'<doc docid="d">\n' + segment_lines([b"eins", b"zwei", b"drei"])
    members = dict(zip(("test-full/newstest2014-deen-src.en.sgm", "test-full/newstest2014-deen-ref.de.sgm"), (
        text, text.replace(b'<seg id="2">', b'<seg id="3">'),
    )))  # fmt: skip
    (tmp_path / "t.tgz").write_bytes(tgz(members))
    test = newstest2014.TestSet("t.tgz", tmp_path / "t.tgz", None, {})
    with pytest.raises(UserError, match=r"src\.en\.sgm' line 3 has segment '2' .*ref\.de\.sgm' line 3 has segment '3'"):
        test.read(tmp_path)
