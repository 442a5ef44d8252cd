"""Text readers on text that nobody wrote: no exception but our own, and no pair shifted against the other side."""

from __future__ import annotations

import io
import json
import re
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intra_distillation_fairseq.corpus import newstest2014, pairs, wit3
from intra_distillation_fairseq.corpus.clean import LINE_BREAKS, count_lines, read_lines, single_spaces, split_lines
from intra_distillation_fairseq.corpus.oddities import Oddities, scan
from intra_distillation_fairseq.corpus.pairs import Chunk, Treat, Treatment, hold_out, pack, process, read_chunks
from intra_distillation_fairseq.corpus.segments import join_segments
from intra_distillation_fairseq.corpus.subwords import Encoder, train
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.generation import read_hypotheses
from intra_distillation_fairseq.experiments.prepared import open_prepared, raw_lines

# What has a meaning for some reader, and any character at all.
BREAKS = st.sampled_from(LINE_BREAKS)
PARTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\nqQ"), max_size=5),
    st.text(st.characters(max_codepoint=0xFF, exclude_characters="\nqQ"), max_size=5),
    st.sampled_from([
        *"\r\v\f\x1c\x1d\x1e\x1f\x85\u2028\u2029\0\t \u00a0\u3000\u200b\u200e\u202e\ufeff▁|", " . ", "...", ".\"", "'s ",
        "&amp;", "&lt;", "&#10;", "&#124;", "@-@", "DOTMULTI.", "<s>", "</s>", "<pad>", "<unk>", "d'", "1,2", " %",
        "\u201e", "\u2019", "e.g.", "İ", "Σ", "ß", "½", "\ufdfa", "中", "\U0001f1e9", "<seg", "</seg>", "<url>",
    ]),
)  # fmt: skip
ODD_TEXT = st.lists(PARTS, max_size=6).map("".join)
BYTES = st.one_of(
    st.binary(max_size=40),
    st.lists(
        st.sampled_from([
            b"\n", b"\r\n", b"\r", b"\xef\xbb\xbf", b"\xc2\x85", b"\xe2\x80\xa8", b"\xe2\x80", b"\xed\xa0\x80", b"\xff",
            b"\0", b"a", b"b c", b"\xc3\xbc", b"\xf0\x9f\x87\xa9", b"\xc2\xa0", b"\t", b"\x1f",
        ]),
        max_size=20,
    ).map(b"".join),
)  # fmt: skip


@pytest.fixture
def fuzz(full, record_property):
    """fuzz(check, *strategies, cases=N) runs check on N cases, with --full on ten times as many, and counts them."""

    def run(check, *strategies, cases: int) -> None:
        done = 0

        @settings(max_examples=cases * (10 if full else 1))
        @given(st.tuples(*strategies))
        def run_all(values):
            nonlocal done
            done += 1
            check(*values)

        run_all()
        record_property("inputs fuzzed", done)

    return run


def oracle(data: bytes) -> list[bytes]:
    """The lines of a file by the simplest reading there is."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"" and data[-1:] in (b"", b"\n"):
        lines.pop()
    return [line.removesuffix(b"\r") for line in lines]


def first_invalid(lines: list[bytes]) -> int | None:
    for number, line in enumerate(lines, start=1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return None


def plain(line: str) -> str:
    for mark in LINE_BREAKS:
        line = line.replace(mark, " ")
    return line


def test_bytes(fuzz, tmp_path, monkeypatch):
    """Every reader of files has the lines of `split(b"\\n")`, or names the first that is not UTF-8."""
    monkeypatch.setattr(pairs, "_CHUNK_PAIRS", 3)
    path = tmp_path / "a"

    def chunked(replace_invalid):
        chunks = read_chunks("train", path, path, replace_invalid)
        return [line for chunk in chunks for line in split_lines(chunk.sides[0])]

    def check(data):
        path.write_bytes(data)
        lines = oracle(data)
        assert count_lines(path) == len(lines)
        invalid = first_invalid(lines)
        readers = [lambda replace: list(read_lines(path, replace)), chunked]
        for read in readers:
            assert read(True) == [plain(line.decode(errors="replace")) for line in lines]
            if invalid:
                with pytest.raises(UserError, match=f"a' line {invalid} is not UTF-8"):
                    read(False)
            else:
                assert read(False) == [plain(line.decode()) for line in lines]
        found = scan(path, replace_invalid=True)
        assert found.lines == len(lines)
        assert all(1 <= number <= len(lines) for _, first in found.kinds.values() for number in first)
        assert ("invalid_utf8" in found.kinds) == bool(invalid)
        assert found.kinds.get("empty", (0,))[0] == sum(not line.decode(errors="replace") for line in lines)
        if invalid:
            with pytest.raises(UserError, match=f"a' line {invalid} is not UTF-8"):
                scan(path)

    fuzz(check, BYTES, cases=500)


def test_reading_what_was_written_changes_nothing(fuzz, tmp_path):
    def check(data):
        (tmp_path / "a").write_bytes(data)
        once = list(read_lines(tmp_path / "a", replace_invalid=True))
        (tmp_path / "b").write_bytes("".join(f"{line}\n" for line in ["", *once]).encode())
        assert list(read_lines(tmp_path / "b")) == raw_lines(tmp_path / "b") == ["", *once]

    fuzz(check, BYTES, cases=200)


def test_two_files_of_any_length(fuzz, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "_CHUNK_PAIRS", 2)

    def check(one, other):
        files = [tmp_path / "a", tmp_path / "b"]
        for path, data in zip(files, (one, other)):
            path.write_bytes(data)
        counts = [len(oracle(data)) for data in (one, other)]
        if counts[0] == counts[1]:
            assert sum(chunk.pairs for chunk in read_chunks("train", *files, True)) == counts[0]
        else:
            with pytest.raises(UserError, match=f"a' has {counts[0]} lines and .*b' has {counts[1]}: a parallel text"):
                list(read_chunks("train", *files, True))

    fuzz(check, BYTES, BYTES, cases=200)


# --- pairs with an identity through cleaning, pieces and fairseq


def mark(number: int) -> str:
    """A word that no step changes: qabc for 012."""
    return "q" + "".join(chr(ord("a") + int(digit)) for digit in str(number))


def marks(line: str) -> list[str]:
    return re.findall("q[a-j]+", line)


def marked(texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A pair keeps its empty sides; where there is text, the mark of the pair stands in front, so that it is found."""
    return [tuple(text and f" {mark(n)} {text}" for text in both) for n, both in enumerate(texts)]


TREATMENTS = [
    Treatment(),
    Treatment(drop_empty=True, lowercase=True, ratio=2.0, max_words=20),
    Treatment(moses=True, drop_empty=True, lowercase=True, ratio=1.5, max_words=175),
    Treatment(unescape=True, moses=True, lowercase=True),
    Treatment(normalise=True, moses=True, aggressive=True, drop_empty=True),
]


@lru_cache
def treat(index: int, languages: tuple[str, str]) -> Treat:
    return Treat(TREATMENTS[index], languages)


def of_chunks(chunks: list[Chunk]) -> list[tuple[str, ...]]:
    return [pair for chunk in chunks for pair in zip(*map(split_lines, chunk.sides))]


def check_marks(got: list[tuple[str, ...]], given_pairs: list[tuple[str, str]], every: bool) -> None:
    """Both sides of each pair have the same mark, in the order given; all of them where none may be dropped."""
    numbers = []
    for pair in got:
        of_pair = [marks(side)[:1] for side in pair]
        assert len({tuple(found) for found in of_pair if found}) <= 1, pair
        numbers += [next((found[0] for found in of_pair if found), None)]
    known = [mark(n) if any(pair) else None for n, pair in enumerate(given_pairs)]
    if every:
        assert numbers == known
    else:
        places = iter(known)
        assert all(number in places for number in numbers)


def test_cleaning_keeps_pairs_together(fuzz):
    """What a worker does to a chunk, with every treatment that the commands know."""

    def check(index, languages, texts):
        some = marked([tuple(map(plain, both)) for both in texts])
        pairs._start(treat, (index, languages))
        got = of_chunks([pairs._work(chunk) for chunk in pack("train", some)])
        check_marks(got, some, every=not TREATMENTS[index].drop_empty)
        if not TREATMENTS[index].moses:
            again = of_chunks([pairs._work(chunk) for chunk in pack("train", got)])
            assert again == got

    languages = st.sampled_from([("de", "en"), ("fr", "it"), ("fa", "cs")])
    texts = st.lists(st.tuples(ODD_TEXT, ODD_TEXT), max_size=6)
    fuzz(check, st.integers(0, len(TREATMENTS) - 1), languages, texts, cases=500)


def test_holding_out_keeps_pairs_together(fuzz, monkeypatch):
    monkeypatch.setattr(pairs, "_CHUNK_PAIRS", 3)

    def check(texts, every):
        some = marked([tuple(map(plain, both)) for both in texts])
        held = list(hold_out(process(pack("train", some), Treat, (TREATMENTS[0], ("de", "en")), 1, "x"), every))
        for split in ("train", "valid"):
            numbers = [n for n in range(1, len(some) + 1) if (n % every == 0) == (split == "valid")]
            assert of_chunks([chunk for chunk in held if chunk.split == split]) == [some[n - 1] for n in numbers]

    fuzz(check, st.lists(st.tuples(ODD_TEXT, ODD_TEXT), max_size=10), st.integers(1, 5), cases=100)


def test_single_spaces(fuzz):
    def check(text):
        once = single_spaces(plain(text))
        assert single_spaces(once) == once == once.strip(" ") and "  " not in once

    fuzz(check, ODD_TEXT, cases=100)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    words = [f"{mark(n)} {chr(0x61 + n % 26)}{chr(0xE0 + n % 20)} <s> <pad> & . ▁ x{n}" for n in range(300)]
    (folder / "text").write_text("\n".join(words) + "\n")
    train([folder / "text"], 100, folder)
    return folder / "spm.model"


@pytest.mark.parametrize("split", ["train", "test"])
def test_pieces_are_words_for_fairseq_and_keep_pairs_together(fuzz, model, split):
    """fairseq splits lines of pieces at any space of Unicode, and lines at any \\n or \\r."""
    from fairseq.tokenizer import tokenize_line

    encoder = Encoder(model, drop_empty=split != "test")

    def check(texts):
        some = marked([tuple(map(plain, both)) for both in texts])
        got = encoder(some)
        text = "".join(f"{source}\n{target}\n" for source, target in got)
        read = list(io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))  # universal newlines, as fairseq
        assert len(read) == 2 * len(got)
        assert [tokenize_line(line) for line in read] == [line.split(" ") if line else [] for p in got for line in p]
        whole = [tuple("".join(side.split(" ")).replace("▁", " ").strip() for side in pair) for pair in got]
        check_marks(whole, some, every=split == "test")

    fuzz(check, st.lists(st.tuples(ODD_TEXT, ODD_TEXT), max_size=5), cases=150)


# --- XML and SGML


def check_message(error: UserError) -> None:
    assert "'" in str(error) and len(str(error).splitlines()) == 1


def xml(documents: int, segments: int) -> list[str]:
    number, lines = 0, ['<?xml version="1.0"?>', "<mteval>"]
    for document in range(documents):
        lines.append(f'<doc docid="{document}">')
        for segment in range(1, segments + 1):
            lines.append(f'<seg id="{segment}"> {mark(number)} x </seg>')
            number += 1
        lines.append("</doc>")
    return lines


def mutated(lines: list[str], changes: list[tuple[str, int, str]]) -> list[str]:
    lines = lines[:]
    for what, where, text in changes:
        i = where % len(lines)
        if what == "delete" and len(lines) > 1:
            del lines[i]
        elif what == "double":
            lines.insert(i, lines[i])
        elif what == "swap":
            lines[i - 1], lines[i] = lines[i], lines[i - 1]
        elif what == "join" and i:
            lines[i - 1 : i + 1] = ["".join(lines[i - 1 : i + 1])]
        elif what == "cut":
            lines[i] = lines[i][: where % 12]
        elif what == "break":
            lines[i : i + 1] = [lines[i][: where % 12], lines[i][where % 12 :]]
        elif what == "insert":
            lines.insert(i, text)
        elif what == "append":
            lines[i] += text
    return lines


XML_TEXT = st.one_of(
    ODD_TEXT.map(plain),
    st.sampled_from([
        "</doc>", '<doc docid="7">', '<doc docid="0">', "</seg>", "<!DOCTYPE x>", '<!ENTITY a "b">', "&a;", "<!--", "-->",
        "<![CDATA[", "<seg>", "<SEG id='3'>", '<seg id="">', "<url>x</url>", "<talkid>0</talkid>", "<talkid>9</talkid>",
    ]),
)  # fmt: skip
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["delete", "double", "swap", "join", "cut", "break", "insert", "append"]),
        st.integers(0, 200),
        XML_TEXT,
    ),
    max_size=4,
)


@pytest.mark.parametrize("reader", [wit3.test_segments, newstest2014.segments])
def test_harmed_xml_sets(fuzz, reader):
    """Whatever happens to the lines of either side: the pairs still belong together, or the set is refused."""
    outcomes = {"refused": 0, "read": 0}

    def check(documents, segments, changes, other_changes):
        lines = xml(documents, segments)
        found = Oddities(), Oddities()
        try:
            sides = [
                reader(mutated(lines, some), name, odd)
                for some, name, odd in zip((changes, other_changes), ("a", "b"), found)
            ]
            got = join_segments(tuple(sides), ("a", "b"), found)
        except UserError as error:
            check_message(error)
            outcomes["refused"] += 1
            return
        outcomes["read"] += 1
        for source, target in got:
            one, other = marks(source), marks(target)
            assert not one or not other or one[0] == other[0], (source, target)

    fuzz(check, st.integers(1, 3), st.integers(1, 4), CHANGES, CHANGES, cases=300)
    assert min(outcomes.values()) > 20


def test_harmed_training_tags(fuzz):
    """Tags may be missing, doubled or within the text of either side; a whole talk may be gone from one."""

    def tags(talks, lines):
        number = 0
        for talk in range(talks):
            yield f"<url>{talk}</url>"
            for _ in range(lines):
                yield f"{mark(number)} x"
                number += 1
            yield f"<talkid>{talk}</talkid>"
            yield f"<title>{mark(number)}</title>"
            yield "<keywords>x</keywords>"
            number += 1

    def harmed(lines, changes, lost):
        for what, where, tag in changes:
            i = where % len(lines)
            if lines[i].startswith(("<url", "<keywords")) and what != "within":
                lines[i : i + 1] = [] if what == "delete" else [lines[i]] * 2
            elif not lines[i].startswith("<") and what == "within":
                lines[i] += tag
        if lost is not None:
            lines = [line for n, line in enumerate(lines) if n != lost % len(lines)]
        return lines

    outcomes = {"refused": 0, "read": 0}

    def check(talks, lines, changes, other_changes, lost, other_lost):
        whole = list(tags(talks, lines))
        sides = harmed(whole[:], changes, lost), harmed(whole[:], other_changes, other_lost)
        try:
            got = list(wit3.train_pairs(sides, ("a", "b"), (Oddities(), Oddities())))
        except UserError as error:
            check_message(error)
            outcomes["refused"] += 1
            return
        outcomes["read"] += 1
        if lost is None and other_lost is None:
            assert all(marks(source)[:1] == marks(target)[:1] for source, target in got)

    changes = st.lists(
        st.tuples(
            st.sampled_from(["delete", "double", "within"]),
            st.integers(0, 50),
            st.sampled_from(["<url>", "<talkid>", "<keywords>x"]),
        ),
        max_size=4,
    )
    lost = st.one_of(st.none(), st.none(), st.integers(0, 50))
    fuzz(check, st.integers(1, 3), st.integers(1, 4), changes, changes, lost, lost, cases=300)
    assert min(outcomes.values()) > 20


TAGS = st.lists(
    st.sampled_from(["<seg", "</seg>", ">", "<", ' id="1"', '<seg id="1">', " ", "\u3000", "\t", "a", "’", "\u00a0"]),
    max_size=9,
).map("".join)


def test_segment_text_is_that_of_the_published_expressions(fuzz):
    """Each was rewritten so that no line takes it hours; on short lines the plain one is quick."""
    space = "[\t-\r \u1680\u2000-\u2006\u2008-\u200a\u2028\u2029\u205f\u3000]"

    def check(line):
        of_sacrebleu = " ".join(re.sub("<seg.*?>(.*)</seg>.*?", r"\1", line).split())
        assert newstest2014.segment_text(line) == of_sacrebleu
        of_sed = re.sub(f"{space}*</seg>{space}*", "", re.sub(f'<seg id="[0-9]*">{space}*', "", line))
        assert wit3.segment_text(line) == of_sed.replace("’", "'")

    fuzz(check, TAGS, cases=300)


# --- what fairseq wrote, and records


def test_hypotheses_in_any_order(fuzz, tmp_path):
    path = tmp_path / "generate.txt"

    def check(texts, chance):
        lines = [f"D-{number}\t-1.5\t{text}" for number, text in enumerate(texts)]
        lines += [f"{kind}-{number}\t{text}" for kind in "STHP" for number, text in enumerate(texts)]
        chance.shuffle(lines)
        path.write_text("\n".join([*lines, ""]), encoding="utf-8", newline="\n")
        assert read_hypotheses(path) == texts
        (tmp_path / "hypotheses.txt").write_text("".join(f"{t}\n" for t in texts), encoding="utf-8", newline="\n")
        assert raw_lines(tmp_path / "hypotheses.txt") == texts

    fuzz(check, st.lists(ODD_TEXT, max_size=6), st.randoms(use_true_random=False), cases=150)


def test_broken_output_of_fairseq(fuzz, tmp_path):
    path = tmp_path / "generate.txt"
    parts = st.sampled_from(
        [b"D-", b"0", b"1", b"-", b"\t", b"\n", b"x", b"\xff", "٣".encode(), b"9" * 30, b"D-0\t1\ta\n"]
    )

    def check(data):
        path.write_bytes(data)
        for read in (read_hypotheses, raw_lines):
            try:
                assert len(read(path)) <= data.count(b"\n") + 1
            except UserError as error:
                check_message(error)

    fuzz(check, st.one_of(st.lists(parts, max_size=12).map(b"".join), BYTES), cases=200)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["de", 1])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["format", "source_lang", "target_lang", "splits", "lines", "train", "x"]),
            inner,
            max_size=6,
        ),
    ),
    max_leaves=8,
)


def test_broken_manifests(fuzz, tmp_path):
    def check(value):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        (tmp_path / "manifest.json").write_bytes(data)
        with pytest.raises(UserError, match="manifest.json' is damaged|has the format|is missing"):
            open_prepared(tmp_path, ("test",))

    whole = st.fixed_dictionaries({"format": st.just(1), "source_lang": JSON, "target_lang": JSON, "splits": JSON})
    fuzz(check, st.one_of(BYTES, JSON, whole), cases=200)
