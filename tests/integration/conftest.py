"""A tiny binarised corpus, and fairseq-train on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fairseq_commands import TINY_MODEL, TRAINING, USER_DIR, command
from tiny_corpus import write_corpus


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


@pytest.fixture
def task(tiny_data):
    from in_process import make_task  # imports fairseq, which most tests here leave to the commands

    return make_task(tiny_data)


@pytest.fixture
def sample(task):
    """Sentences of different lengths, so that there is padding."""
    task.load_dataset("train")
    dataset = task.datasets["train"]
    batch = dataset.collater([dataset[i] for i in range(9)])
    assert batch["target"].eq(task.target_dictionary.pad()).any()
    return batch
