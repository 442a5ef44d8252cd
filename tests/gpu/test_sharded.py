"""--ddp-backend fully_sharded (fairscale's), which runs on GPUs only; on two of them there is something to share."""

import importlib.util

import pytest
import torch
from fairseq_commands import TINY_MODEL, USER_DIR, command
from test_training import assert_same_parameters, logged
from tiny_corpus import write_corpus

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: fully sharded training has no CPU version"),
    pytest.mark.skipif(importlib.util.find_spec("fairscale") is None, reason="needs fairscale (pip install fairscale)"),
]
ID = "--criterion intra_distillation --id-num-passes 2 --id-p 2 --id-q 10 --id-pass-mode".split()
FLAGS = (
    "--task translation_intra_distillation --label-smoothing 0.1 --optimizer adam --lr 0.005 --adam-eps 1e-4 --dropout 0 "
    "--clip-norm 1 --max-tokens 60 --max-update 20 --num-workers 0 --log-format json --log-interval 1 "
    "--no-epoch-checkpoints"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, {"train": 100, "valid": 13})
    done = command(
        "preprocess", "--source-lang", "xx", "--target-lang", "en", "--joined-dictionary", "--destdir", folder / "bin",
        "--trainpref", folder / "train", "--validpref", folder / "valid",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.mark.parametrize(
    "flags",
    [
        [*ID, "stacked"],
        [*ID, "sequential"],
        [*ID, "stacked", "--checkpoint-activations"],
        [*ID, "stacked", "--optimizer", "sage_adam"],
        ["--criterion", "label_smoothed_cross_entropy"],
    ],
    ids=lambda flags: " ".join(map(str, flags[1:])),
)
def test_sharded_equals_unsharded_and_resumes(data, tmp_path, flags):
    """On two GPUs if there are: the same losses and parameters as legacy_ddp, in the second half of a stopped training."""
    size = ["--distributed-world-size", min(2, torch.cuda.device_count())]
    words = ["--user-dir", USER_DIR, *TINY_MODEL, *FLAGS, *flags, *size]
    logs = {}
    for backend in ("legacy_ddp", "fully_sharded"):
        for until in (10, 20):
            more = ["--ddp-backend", backend, "--save-dir", tmp_path / backend, "--max-update", until]
            done = command("train", data, *words, *more, fresh=True)
            assert done.returncode == 0, done.stderr[-3000:]
        logs[backend] = logged(done.stdout + done.stderr)
    assert [u["num_updates"] for u in logs["fully_sharded"]] == [str(n) for n in range(11, 21)]
    for a, b in zip(logs["legacy_ddp"], logs["fully_sharded"], strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), abs=5e-3)
        assert float(b["gnorm"]) == pytest.approx(float(a["gnorm"]), rel=1e-2)
    assert_same_parameters(*(tmp_path / backend / "checkpoint_last.pt" for backend in logs), rtol=1e-3, atol=1e-4)


def test_sharded_float16_trains(data, tmp_path):
    words = ["--user-dir", USER_DIR, *TINY_MODEL, *FLAGS, *ID, "stacked", "--fp16", "--fp16-init-scale", 4]
    done = command(
        "train", data, *words, "--ddp-backend", "fully_sharded", "--save-dir", tmp_path, "--no-save", fresh=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(u["loss"]) for u in logged(done.stdout + done.stderr)]
    assert len(losses) == 20 and losses[-1] < losses[0]
