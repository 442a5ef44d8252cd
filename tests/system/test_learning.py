"""A model trained with the plugin must really learn: translating word for word, to a bound on loss and accuracy."""

import json
import random
import re

import pytest
from fairseq_commands import USER_DIR, command

MODEL = (
    "--arch transformer_small --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 32 --decoder-embed-dim 32 "
    "--encoder-ffn-embed-dim 64 --decoder-ffn-embed-dim 64 --encoder-attention-heads 2 --decoder-attention-heads 2"
).split()


@pytest.fixture(scope="module")
def word_for_word(tmp_path_factory):
    """Sentences over 12 words, each with one translation, in the same order."""
    folder, rng = tmp_path_factory.mktemp("word for word"), random.Random(0)
    for split, size in (("train", 3000), ("valid", 60), ("test", 61)):
        sentences = [[rng.randrange(12) for _ in range(rng.randint(2, 5))] for _ in range(size)]
        (folder / f"{split}.xx").write_text("".join(" ".join(f"s{w}" for w in s) + "\n" for s in sentences))
        (folder / f"{split}.en").write_text("".join(" ".join(f"t{w}" for w in s) + "\n" for s in sentences))
    done = command(
        "preprocess", "--source-lang", "xx", "--target-lang", "en", "--destdir", folder / "bin",
        *(argument for split in ("train", "valid", "test") for argument in (f"--{split}pref", folder / split)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "criterion",
    [
        "label_smoothed_cross_entropy",
        # The full weight of 5 slows the first hundreds of updates down, which are all that this training has.
        "intra_distillation --id-alpha 1",
    ],
)
def test_learns_to_translate_word_for_word(word_for_word, tmp_path, criterion):
    trained = command(
        "train", word_for_word / "bin", "--user-dir", USER_DIR, "--task", "translation_intra_distillation", *MODEL,
        "--criterion", *criterion.split(), "--dropout", 0.1, "--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr", 0.01,
        "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 100, "--max-tokens", 600, "--max-update", 450,
        "--save-dir", tmp_path, "--no-epoch-checkpoints", "--num-workers", 0, "--log-format", "json", "--cpu",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr[-3000:]
    validations = [json.loads(line) for line in re.findall(r"\| valid \| (\{.*\})", trained.stdout)]
    assert float(validations[-1]["valid_ppl"]) < 1.3
    translated = command(
        "generate", word_for_word / "bin", "--user-dir", USER_DIR, "--task", "translation_intra_distillation", "--cpu",
        "--path", tmp_path / "checkpoint_best.pt", "--beam", 2, "--max-len-b", 20, "--batch-size", 61,
    )  # fmt: skip
    assert translated.returncode == 0, translated.stderr[-3000:]
    hypotheses = dict(re.findall(r"^H-(\d+)\t\S+\t(.*)$", translated.stdout, re.M))
    references = (word_for_word / "test.en").read_text().splitlines()
    assert len(hypotheses) == len(references)
    right = sum(hypotheses[str(i)] == reference for i, reference in enumerate(references))
    assert right >= 0.9 * len(references)
