"""Joint sentencepiece model, fairseq dictionary, encoded pairs."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from intra_distillation_fairseq.corpus import learning
from intra_distillation_fairseq.corpus.clean import keep_pair, read_lines
from intra_distillation_fairseq.errors import UserError

# Everything of the published training command, and num_threads: each number of threads learns another vocabulary.
TRAINING_OPTIONS = {
    "model_type": "unigram",
    "character_coverage": 0.99999995,
    "input_sentence_size": 1000000,
    "num_threads": 16,
}
Item = TypeVar("Item")

FAIRSEQ_SPECIALS = 4  # <s> <pad> </s> <unk>, which every fairseq dictionary has
_SENTENCEPIECE_SPECIALS = 3  # <unk> <s> </s>, the first of its vocabulary


class VocabularyTooLarge(UserError):
    """More pieces were asked for than the text gives; `largest` is how many it gives."""

    def __init__(self, asked: int, largest: int) -> None:
        super().__init__(
            f"--vocab-size '{asked}' is too large for this text, from which at most {largest} pieces can be learnt: "
            f"give --vocab-size {largest} or less"
        )
        self.largest = largest


def train(
    files: list[Path],
    vocab_size: int,
    folder: Path,
    lines: int = 0,
    most: int = TRAINING_OPTIONS["input_sentence_size"],
) -> None:
    """Learn a model from text files; writes spm.model and spm.vocab into `folder`.

    The text is handed over line by line and not by file name, because the model would otherwise store the names and
    the same text in another folder would give other bytes. The vocabulary is that of the command-line tool.

    Args:
        files: raw text, in the order that the training sees it.
        vocab_size: number of pieces, sentencepiece's own three included.
        folder: where to write.
        lines: of all files together; 0 for not counted, which takes all.
        most: where there are more lines than this, learn from so many of them, evenly spaced over the text. Chosen
            here, because sentencepiece holds what it is given in memory.

    Raises:
        VocabularyTooLarge: the text gives fewer pieces than asked.
        UserError: it has more characters than pieces asked.
    """
    import sentencepiece

    model = io.BytesIO()
    sentences = evenly_spaced((line for path in files for line in read_lines(path)), lines, most)
    try:
        with learning.shown(vocab_size):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences,
                model_writer=model,
                vocab_size=vocab_size,
                minloglevel=0,
                **TRAINING_OPTIONS | {"input_sentence_size": max(most, TRAINING_OPTIONS["input_sentence_size"])},
            )
    except (RuntimeError, OSError) as error:
        raise _explain(str(error), vocab_size) from None
    (folder / "spm.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    with open(folder / "spm.vocab", "w", encoding="utf-8", newline="\n") as out:
        for i in range(processor.get_piece_size()):
            out.write(f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n")


def evenly_spaced(items: Iterable[Item], total: int, wanted: int) -> Iterator[Item]:
    """Yield `wanted` of `total` items at even distances, in order; all of them where there are no more."""
    for number, item in enumerate(items):
        if total <= wanted or number * wanted // total < (number + 1) * wanted // total:
            yield item


def _explain(message: str, vocab_size: int) -> UserError:
    if largest := re.search(r"Please set it to a value <= (\d+)", message):
        return VocabularyTooLarge(vocab_size, int(largest.group(1)))
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"--vocab-size '{vocab_size}' is too small for this text, which has {smallest.group(1)} characters and "
            f"marks: give --vocab-size {int(smallest.group(1)) + 1} or more"
        )
    return UserError(f"sentencepiece could not learn --vocab-size '{vocab_size}' pieces from this text: {message}")


def write_dictionary(vocab: Path, dictionary: Path) -> int:
    """Write fairseq's dict.txt: every piece but sentencepiece's own three, with a constant count.

    Returns:
        The number of types of the dictionary once fairseq has loaded it.
    """
    pieces = [line.split("\t")[0] for line in read_lines(vocab)][_SENTENCEPIECE_SPECIALS:]
    dictionary.write_text("".join(f"{piece} 100\n" for piece in pieces), encoding="utf-8", newline="\n")
    return len(pieces) + FAIRSEQ_SPECIALS


class Encoder:
    """Encodes chunks of pairs in a worker process.

    Args:
        model: path of spm.model.
        drop_empty: leave out a pair of which a side has no piece. A test line must stay: fairseq takes an empty line,
            and a hypothesis must stand against every reference.
        limits: ratio of lengths and most pieces of a side above which a pair is left out, exactly these are kept; the
            filter of clean-corpus-n.perl, counting pieces. Only with `drop_empty`. None: any.
    """

    def __init__(self, model: Path, drop_empty: bool, limits: tuple[float, int] | None = None) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self._drop_empty = drop_empty
        self._limits = limits

    def __call__(self, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return the pairs with pieces separated by spaces."""
        sides = [self._model.encode(list(lines), out_type=str) for lines in zip(*pairs)]
        encoded = [(" ".join(source), " ".join(target)) for source, target in zip(*sides)]
        if not self._drop_empty:
            return encoded
        return [pair for pair in encoded if all(pair) and (not self._limits or keep_pair(*pair, *self._limits))]
