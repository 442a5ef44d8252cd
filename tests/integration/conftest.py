"""A tiny binarised corpus, and fairseq-train on it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fairseq_commands import TINY_MODEL, TRAINING, USER_DIR, command


def write_corpus(folder: Path, splits: dict[str, int], seed: int = 1) -> None:
    """Sentences of invented words on the source side and the same words in reverse order on the target side."""
    rng = random.Random(seed)
    words = [a + b for a in "kbmtr" for b in "aeiou"]
    for split, size in splits.items():
        sentences = [[rng.choice(words) for _ in range(rng.randint(2, 9))] for _ in range(size)]
        (folder / f"{split}.xx").write_text("".join(" ".join(s) + "\n" for s in sentences), encoding="utf-8")
        (folder / f"{split}.en").write_text("".join(" ".join(s[::-1]) + "\n" for s in sentences), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A data-bin of 100/13/11 sentences: no size is a multiple of 8."""
    folder = tmp_path_factory.mktemp("tiny corpus")
    write_corpus(folder, {"train": 100, "valid": 13, "test": 11})
    done = command(
        "preprocess", "--source-lang", "xx", "--target-lang", "en", "--joined-dictionary", "--destdir", folder / "bin",
        *(argument for split in ("train", "valid", "test") for argument in (f"--{split}pref", folder / split)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.fixture
def train(tiny_data, tmp_path):
    """train(*flags) runs fairseq-train with the plugin on the tiny corpus, saving under tmp_path/run."""

    def run(*flags: object, data: Path = tiny_data, save_dir: Path = tmp_path / "run", **kwargs):
        return command(
            "train", data, "--user-dir", USER_DIR, "--save-dir", save_dir, *TINY_MODEL, *TRAINING, *flags, **kwargs
        )

    return run
