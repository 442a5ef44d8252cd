"""A tiny binarised corpus and fairseq's commands on it, for all integration tests."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import intra_distillation_fairseq

USER_DIR = Path(intra_distillation_fairseq.__file__).parent

# A model that takes milliseconds per update.
TINY_MODEL = (
    "--arch transformer_small --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16 "
    "--encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 --encoder-attention-heads 2 --decoder-attention-heads 2"
).split()
TRAINING = (
    "--optimizer adam --lr 0.005 --max-tokens 300 --num-workers 0 --log-format json --log-interval 1 --cpu".split()
)


def write_corpus(folder: Path, splits: dict[str, int], seed: int = 1) -> None:
    """Sentences of invented words on the source side and the same words in reverse order on the target side."""
    rng = random.Random(seed)
    words = [a + b for a in "kbmtr" for b in "aeiou"]
    for split, size in splits.items():
        sentences = [[rng.choice(words) for _ in range(rng.randint(2, 9))] for _ in range(size)]
        (folder / f"{split}.xx").write_text("".join(" ".join(s) + "\n" for s in sentences), encoding="utf-8")
        (folder / f"{split}.en").write_text("".join(" ".join(s[::-1]) + "\n" for s in sentences), encoding="utf-8")


def command(name: str, *arguments: object, env: dict[str, str] | None = None, **kwargs) -> subprocess.CompletedProcess:
    """Run a fairseq command (train, generate, ...) in a process of its own; the result has its text and exit code."""
    return subprocess.run(
        [sys.executable, "-m", f"fairseq_cli.{name}", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        **kwargs,
    )


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A data-bin of 100/13/11 sentences: no size is a multiple of 8."""
    folder = tmp_path_factory.mktemp("tiny corpus")
    write_corpus(folder, {"train": 100, "valid": 13, "test": 11})
    done = command(
        "preprocess", "--source-lang", "xx", "--target-lang", "en", "--joined-dictionary", "--destdir", folder / "bin",
        *(f"--{split}pref={folder / split}" for split in ("train", "valid", "test")),
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
