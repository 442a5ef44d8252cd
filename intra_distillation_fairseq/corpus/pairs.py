"""Both sides of a text together: reading, tokenising, filtering, writing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.corpus.clean import (
    count_lines,
    is_empty,
    keep_pair,
    read_blocks,
    single_spaces,
    split_lines,
    unescape,
)
from intra_distillation_fairseq.corpus.moses import Moses, lowercase
from intra_distillation_fairseq.corpus.punctuation import Normaliser
from intra_distillation_fairseq.corpus.workers import map_in_order
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.progress import Progress

Pair = tuple[str, str]


@dataclass(frozen=True)
class Treatment:
    """What is done to the lines of a split, in this order.

    Attributes:
        unescape: undo &amp; &lt; &gt;.
        normalise: even out punctuation and put a space for each character without a shape, as Moses does.
        moses: tokenise before the filter and detokenise at the end.
        aggressive: tokenise hyphens too.
        drop_empty: leave out a pair with an empty side.
        ratio: longest side / shortest side, in words, above which a pair is left out.
        max_words: words of a side above which a pair is left out.
        lowercase: lower-case.
    """

    unescape: bool = False
    moses: bool = False
    drop_empty: bool = False
    ratio: float | None = None
    max_words: int | None = None
    lowercase: bool = False
    normalise: bool = False
    aggressive: bool = False

    def settings(self) -> dict[str, Any]:
        """As JSON values, for a stamp; without the newer ones where they are off, so that older stamps still fit."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("normalise", "aggressive")}


class Treat:
    """Applies a treatment to chunks of pairs; made once in each worker.

    Args:
        treatment: what to do.
        languages: source and target.
    """

    def __init__(self, treatment: Treatment, languages: tuple[str, str]) -> None:
        self._do = treatment
        codes = [lang.split("_")[0].lower() for lang in languages]  # de_CH or pt_br: Moses knows the language only
        self._normalisers = [Normaliser(code) for code in codes] if treatment.normalise else []
        self._moses = [Moses(code, treatment.aggressive) for code in codes] if treatment.moses else []

    def __call__(self, pairs: list[Pair]) -> list[Pair]:
        """Return the treated pairs that are kept."""
        return [pair for pair in map(self._treat, pairs) if pair]

    def _treat(self, pair: Pair) -> Pair | None:
        do, lines = self._do, list(pair)
        if do.unescape:
            lines = [unescape(line) for line in lines]
        if do.normalise:
            lines = [normaliser(line) for normaliser, line in zip(self._normalisers, lines)]
        if do.moses:
            lines = [single_spaces(moses.tokenise(line)) for moses, line in zip(self._moses, lines)]
        if do.drop_empty and any(map(is_empty, lines)):
            return None
        if (do.ratio or do.max_words) and not keep_pair(*map(single_spaces, lines), do.ratio, do.max_words):
            return None
        if do.lowercase:
            lines = [lowercase(line) for line in lines]
        if do.moses:
            lines = [moses.detokenise(line) for moses, line in zip(self._moses, lines)]
        return lines[0], lines[1]


@dataclass(frozen=True, slots=True)
class Chunk:
    r"""Consecutive pairs on their way between files and processes: one text per side, each line closed by "\n".

    Both sides of a pair are always in one chunk, so that no worker can shift them against each other; and a process
    hands over two long strings, which costs far less than thousands of short ones.

    Attributes:
        split: the split they belong to.
        sides: source and target, UTF-8.
    """

    split: str
    sides: tuple[bytes, bytes]

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return self.sides[0].count(b"\n")


_CHUNK_PAIRS = 2000


def read_chunks(split: str, source: Path, target: Path, replace_invalid: bool = False) -> Iterator[Chunk]:
    """Yield the pairs of two text files, each plain or .gz.

    Raises:
        UserError: a line is not UTF-8, or one file has more lines than the other; the message has both counts.
    """
    blocks = [read_blocks(path, _CHUNK_PAIRS, replace_invalid) for path in (source, target)]
    for sides in zip_longest(*blocks, fillvalue=b""):
        if sides[0].count(b"\n") != sides[1].count(b"\n"):
            raise unequal((str(source), str(target)), [count_lines(source), count_lines(target)])
        yield Chunk(split, sides)


def pack(split: str, pairs: Iterable[Pair]) -> Iterator[Chunk]:
    """Put pairs of lines into chunks."""
    iterator = iter(pairs)
    while some := list(islice(iterator, _CHUNK_PAIRS)):
        yield _pack(split, some)


def _pack(split: str, pairs: list[Pair]) -> Chunk:
    source, target = ("".join(f"{pair[side]}\n" for pair in pairs).encode() for side in (0, 1))
    if not source.count(b"\n") == target.count(b"\n") == len(pairs):
        raise AssertionError("a step put a line feed into a line: every pair after it would be shifted")
    return Chunk(split, (source, target))


def hold_out(chunks: Iterable[Chunk], every: int, held_out: str = "valid") -> Iterator[Chunk]:
    """Move every n-th pair, counted over all chunks, to another split."""
    passed = 0
    for chunk in chunks:
        kept = [side.split(b"\n")[:-1] for side in chunk.sides]
        first = every - 1 - passed % every
        passed += len(kept[0])
        held = [lines[first::every] for lines in kept]
        for lines in kept:
            del lines[first::every]
        for split, sides in ((chunk.split, kept), (held_out, held)):
            if sides[0]:
                yield Chunk(split, tuple(b"\n".join([*lines, b""]) for lines in sides))


# Made by the initialiser of each worker process.
_worker: Callable[[list[Pair]], list[Pair]]


def _start(make_worker: Callable[..., Callable[[list[Pair]], list[Pair]]], arguments: tuple) -> None:
    global _worker
    _worker = make_worker(*arguments)


def _work(chunk: Chunk) -> Chunk:
    return _pack(chunk.split, _worker(list(zip(*map(split_lines, chunk.sides)))))


def process(
    chunks: Iterable[Chunk],
    make_worker: Callable[..., Callable[[list[Pair]], list[Pair]]],
    arguments: tuple,
    jobs: int,
    title: str,
    total: int | None = None,
) -> Iterator[Chunk]:
    """Run pairs through `make_worker(*arguments)` in parallel; yields what it returns, in order.

    Args:
        chunks: the input.
        make_worker: makes, in each process, the function that takes and returns a list of pairs.
        arguments: for `make_worker`.
        jobs: number of processes.
        title: what the progress is called.
        total: number of pairs, by which the time left is told.
    """
    with Progress(title, total or 0, "pairs") as progress:
        yield from map_in_order(_work, _counted(chunks, progress), jobs, _start, (make_worker, arguments))


def _counted(chunks: Iterable[Chunk], progress: Progress) -> Iterator[Chunk]:
    done = 0
    for chunk in chunks:
        done += chunk.pairs
        progress.show(done)
        yield chunk


def join_sides(sources: Iterable[str], targets: Iterable[str], names: tuple[str, str]) -> Iterator[Pair]:
    """Pair the lines of two texts.

    Raises:
        UserError: one text ends before the other; the message has both counts.
    """
    counts = [0, 0]
    for source, target in zip_longest(sources, targets):
        counts[0] += source is not None
        counts[1] += target is not None
        if counts[0] == counts[1]:
            yield source, target
    if counts[0] != counts[1]:
        raise unequal(names, counts)


def unequal(names: tuple[str, str], counts: list[int]) -> UserError:
    """The message for two sides that do not have the same number of lines."""
    return UserError(
        f"'{names[0]}' has {counts[0]} lines and '{names[1]}' has {counts[1]}: a parallel text needs the same number "
        "on both sides, line for line"
    )


class PairWriter:
    """Writes two text files.

    Args:
        stem: path without the language.
        languages: source and target.
    """

    def __init__(self, stem: Path, languages: tuple[str, str]) -> None:
        stem.parent.mkdir(parents=True, exist_ok=True)
        self._paths = [stem.with_name(f"{stem.name}.{lang}") for lang in languages]
        self._files = ExitStack()

    def write(self, chunk: Chunk) -> None:
        """Append to each file."""
        for stream, text in zip(self._streams, chunk.sides):
            stream.write(text)

    def __enter__(self) -> PairWriter:
        self._streams = [self._files.enter_context(path.open("wb")) for path in self._paths]
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


def write_splits(chunks: Iterable[Chunk], folder: Path, languages: tuple[str, str], splits: tuple[str, ...]) -> None:
    """Write the pairs of each of `splits` to FOLDER/SPLIT.LANGUAGE, empty files included."""
    with ExitStack() as files:
        writers = {split: files.enter_context(PairWriter(folder / split, languages)) for split in splits}
        for chunk in chunks:
            writers[chunk.split].write(chunk)


def check_pair(stem: Path, languages: tuple[str, str], why_empty: str) -> int:
    """Count the lines of two files just written.

    Returns:
        Lines of each.

    Raises:
        UserError: the counts differ or are 0; `why_empty` explains the latter.
    """
    paths = [stem.with_name(f"{stem.name}.{lang}") for lang in languages]
    counts = [count_lines(path) for path in paths]
    if counts[0] != counts[1]:
        raise unequal((str(paths[0]), str(paths[1])), counts)
    if not counts[0]:
        raise UserError(why_empty)
    return counts[0]
