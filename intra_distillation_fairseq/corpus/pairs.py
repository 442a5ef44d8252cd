"""Both sides of a text together: reading, tokenising, filtering, writing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from intra_distillation_fairseq.corpus.clean import count_lines, is_empty, keep_pair, read_lines, single_spaces
from intra_distillation_fairseq.corpus.moses import Moses, lowercase
from intra_distillation_fairseq.corpus.wit3 import unescape
from intra_distillation_fairseq.corpus.workers import Pair, map_pairs
from intra_distillation_fairseq.errors import UserError


@dataclass(frozen=True)
class Treatment:
    """What is done to the lines of a split, in this order.

    Attributes:
        unescape: undo &amp; &lt; &gt;.
        moses: tokenise before the filter and detokenise at the end.
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

    def settings(self) -> dict[str, Any]:
        """As JSON values, for a stamp."""
        return asdict(self)


class Treat:
    """Applies a treatment to chunks of pairs; made once in each worker.

    Args:
        treatment: what to do.
        languages: source and target.
    """

    def __init__(self, treatment: Treatment, languages: tuple[str, str]) -> None:
        self._do = treatment
        # de_CH or pt_br: Moses knows the language only
        self._moses = [Moses(lang.split("_")[0].lower()) for lang in languages] if treatment.moses else []

    def __call__(self, pairs: list[Pair]) -> list[Pair]:
        """Return the treated pairs that are kept."""
        return [pair for pair in map(self._treat, pairs) if pair]

    def _treat(self, pair: Pair) -> Pair | None:
        do, lines = self._do, list(pair)
        if do.unescape:
            lines = [unescape(line) for line in lines]
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


_worker: Callable[[list[Pair]], list[Pair]]


def _start(make_worker: Callable[..., Callable[[list[Pair]], list[Pair]]], arguments: tuple) -> None:
    global _worker
    _worker = make_worker(*arguments)


def _work(pairs: list[Pair]) -> list[Pair]:
    return _worker(pairs)


def process(
    pairs: Iterable[Pair],
    make_worker: Callable[..., Callable[[list[Pair]], list[Pair]]],
    arguments: tuple,
    jobs: int,
    title: str,
    total: int | None = None,
) -> Iterator[Pair]:
    """Run pairs through `make_worker(*arguments)` in parallel; yields what it returns, in order.

    Args:
        pairs: the input.
        make_worker: makes, in each process, the function that takes and returns a list of pairs.
        arguments: for `make_worker`.
        jobs: number of processes.
        title: for the progress bar, drawn only on a terminal.
        total: number of pairs, for the progress bar.
    """
    from tqdm import tqdm

    bar_on = sys.stderr.isatty()
    tqdm.monitor_interval = 0  # no thread, since processes are forked here
    with tqdm(desc=title, total=total, unit=" pairs", disable=not bar_on, leave=False) as bar:
        counted = _counted(pairs, bar)
        for chunk in map_pairs(_work, counted, jobs, _start, (make_worker, arguments)):
            yield from chunk


def _counted(pairs: Iterable[Pair], bar: Any) -> Iterator[Pair]:
    for pair in pairs:
        bar.update()
        yield pair


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


def read_pairs(source: Path, target: Path, replace_invalid: bool = False) -> Iterator[Pair]:
    """Yield the pairs of two text files, which are known to have the same number of lines."""
    return join_sides(
        read_lines(source, replace_invalid), read_lines(target, replace_invalid), (str(source), str(target))
    )


_TEXT = {"encoding": "utf-8", "newline": "\n"}


class PairWriter:
    """Writes two text files line by line.

    Args:
        stem: path without the language.
        languages: source and target.
    """

    def __init__(self, stem: Path, languages: tuple[str, str]) -> None:
        stem.parent.mkdir(parents=True, exist_ok=True)
        self._paths = [stem.with_name(f"{stem.name}.{lang}") for lang in languages]
        self._files = ExitStack()

    def write(self, pair: Pair) -> None:
        """Append a line to each file."""
        for stream, line in zip(self._streams, pair):
            stream.write(line + "\n")

    def __enter__(self) -> PairWriter:
        self._streams = [self._files.enter_context(path.open("w", **_TEXT)) for path in self._paths]
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


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
