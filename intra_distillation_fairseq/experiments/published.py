"""The published numbers, which stand nowhere else in the code: Tables 1 to 3 of Xu, Koehn, Murray, "The Importance of
Being Parameters: An Intra-Distillation Method for Serious Gains" (EMNLP 2022, arXiv 2205.11416)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One table of the paper.

    Attributes:
        number: of the table.
        title: what it is about.
        pairs: its columns, in its order.
        scores: method -> BLEU of each pair; methods in the order of its rows.
        averages: method -> its last column, rounded as printed; empty where it has none.
        parameters: method -> number of parameters, rounded as printed.
        recipe: the config of this repository that holds the published settings.
        corpus: name that our manifests give to the corpus; SRC and TGT stand for the languages.
        least_train_lines: sentence pairs of training text that every real archive exceeds by far. With fewer, the text
            has the layout of the corpus but is another one.
    """

    number: int
    title: str
    pairs: tuple[str, ...]
    scores: dict[str, tuple[float, ...]]
    averages: dict[str, float]
    parameters: dict[str, float]
    recipe: str
    corpus: str
    least_train_lines: int

    @property
    def methods(self) -> tuple[str, ...]:
        """Its rows, in its order."""
        return tuple(self.scores)

    def bleu(self, method: str, pair: str) -> float | None:
        """One cell, or None where the table has no such cell."""
        known = pair in self.pairs and method in self.scores
        return self.scores[method][self.pairs.index(pair)] if known else None

    def average(self, method: str, pairs: Sequence[str]) -> float | None:
        """Mean over some of its pairs; over all of them the printed one. None where a cell is missing."""
        values = [self.bleu(method, pair) for pair in pairs]
        if not values or None in values:
            return None
        if set(pairs) == set(self.pairs) and method in self.averages:
            return self.averages[method]
        return sum(values) / len(values)

    def is_of_paper(self, pair: str, corpus: str, train_lines: int | None) -> bool:
        """Whether numbers on such data may stand beside the published ones.

        Args:
            pair: as in `de-en`.
            corpus: its name in the manifest.
            train_lines: pairs of training text, or None where nobody knows.
        """
        return pair in self.pairs and corpus == self.corpus_of(pair) and (train_lines or 0) >= self.least_train_lines

    def corpus_of(self, pair: str) -> str:
        """Name of a pair's corpus in our manifests."""
        source, _, target = pair.partition("-")
        return self.corpus.replace("SRC", source).replace("TGT", target)


TABLES = {
    2: Published(
        number=2,
        title="IWSLT'14 Xx-En",
        pairs=("ar-en", "de-en", "es-en", "fa-en", "he-en", "it-en", "nl-en", "pl-en"),
        scores={
            "transformer": (28.62, 33.07, 38.89, 19.64, 35.13, 32.76, 35.90, 19.69),
            "sage": (29.76, 33.51, 39.22, 20.01, 36.19, 32.77, 36.12, 20.45),
            "rdrop": (32.58, 35.43, 41.00, 22.80, 38.63, 34.96, 38.01, 23.24),
            "switch": (28.24, 33.11, 38.43, 19.50, 34.42, 31.93, 34.59, 19.82),
            "id_js": (32.68, 35.19, 41.44, 22.78, 38.66, 34.89, 38.16, 23.12),
            "id_x": (33.42, 36.10, 41.82, 23.78, 39.31, 35.43, 38.53, 23.61),
        },
        averages={
            "transformer": 30.46,
            "sage": 31.00,
            "rdrop": 33.33,
            "switch": 30.00,
            "id_js": 33.37,
            "id_x": 34.00,
        },
        parameters={**dict.fromkeys(("transformer", "sage", "rdrop", "id_js", "id_x"), 49.98e6), "switch": 87.81e6},
        recipe="configs/iwslt14_transformer_small",
        corpus="iwslt14_SRC_TGT",
        least_train_lines=50_000,  # German has 160,239 of them
    ),
    3: Published(
        number=3,
        title="WMT'17 En-De, newstest2014",
        pairs=("en-de",),
        scores={"transformer": (27.56,), "sage": (27.76,), "rdrop": (28.10,), "switch": (27.80,), "id_x": (28.62,)},
        averages={},
        parameters={**dict.fromkeys(("transformer", "sage", "rdrop", "id_x"), 275e6), "switch": 577e6},
        recipe="configs/wmt17_transformer_big",
        corpus="wmt17_SRC_TGT",
        least_train_lines=3_000_000,  # 4.5 million raw pairs
    ),
}

# Table 1: BLEU of the baseline and of each round of self-distillation, on the corpus of Table 2's de-en.
SELF_DISTILLATION_PAIR = "de-en"
SELF_DISTILLATION_BLEU = (33.07, 34.87, 35.03)
