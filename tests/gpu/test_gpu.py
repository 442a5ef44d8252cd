"""What only a GPU can show: dropout masks of the recomputed passes, low precision, autocast, fairseq's precisions."""

import pytest
import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.utils import set_torch_seed
from fairseq_commands import TINY_MODEL, USER_DIR, command
from tiny_corpus import write_corpus
from torch import nn

from intra_distillation_fairseq import passes
from intra_distillation_fairseq.losses import projected
from intra_distillation_fairseq.losses.backends import BACKENDS
from intra_distillation_fairseq.losses.closed_form import CLOSED_FORMS
from intra_distillation_fairseq.losses.objective import Objective
from intra_distillation_fairseq.tasks.rank_masks import RankMasksMixin

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_recompute_draws_the_masks_of_sequential():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 32), nn.Dropout(0.5)).cuda()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, src_tokens):
            return self.layers(src_tokens), None

    model, batch, gradients = Model(), {"src_tokens": torch.randn(5, 7, 16, device="cuda")}, []
    for mode in ("sequential", "recompute"):
        torch.manual_seed(1)
        model.zero_grad()
        sum(z.pow(2).sum() for z in passes.run(model, batch, 3, mode)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_each_process_draws_masks_of_its_own(monkeypatch):
    class Task:
        def train_step(self):
            return nn.functional.dropout(torch.ones(1000, device="cuda")).eq(0).cpu().numpy().tobytes()

    class TaskOfRanks(RankMasksMixin, Task):
        pass

    def masks(rank):
        monkeypatch.setattr(distributed_utils, "get_global_rank", lambda: rank)
        set_torch_seed(1)  # as fairseq's trainer does before each update
        return [TaskOfRanks().train_step() for _ in range(2)]

    assert len({mask for rank in range(4) for mask in masks(rank)}) == 8
    assert masks(3) == masks(3)
    first = masks(0)
    set_torch_seed(1)
    assert first == [Task().train_step() for _ in range(2)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_against_float64_on_the_cpu(backend, divergence, dtype, autocast):
    generator = torch.Generator().manual_seed(0)
    exact = (2 * torch.randn(3, 70, 1001, generator=generator)).to(dtype).double().requires_grad_()
    target = torch.randint(1, 1001, (70,), generator=generator)
    low = exact.detach().to("cuda", dtype).requires_grad_()
    results = []
    for name, z, t in (("reference", exact, target), (backend, low, target.cuda())):
        with torch.autocast("cuda", enabled=autocast and z.is_cuda):
            result = BACKENDS[name].from_logits(z, t, Objective(divergence, 5.0, 0.1, 1))
        (gradient,) = torch.autograd.grad(result.loss, z)
        results.append((*(float(v) for v in result), gradient.double().cpu()))
    assert results[1][:4] == pytest.approx(results[0][:4], rel=1e-5)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(results[1][4], results[0][4], **tolerance)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_from_features_against_float64_on_the_cpu(monkeypatch, backend, dtype, autocast):
    """The largest error at most twice plain PyTorch's in the same type; three chunks of tokens."""
    monkeypatch.setitem(projected.CHUNK_BYTES, "cuda", 25 * 3 * 1001 * dtype.itemsize)
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 70, 64), (1001, 64), (1001,))
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    given[1] *= 0.3
    target = torch.randint(1, 1001, (70,), generator=generator)
    results = {}
    for case, name in (("exact", "reference"), ("plain", "reference"), ("own", backend)):
        inputs = [x.double() if case == "exact" else x.cuda() for x in given]
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        with torch.autocast("cuda", enabled=autocast and case != "exact"):
            result = BACKENDS[name].from_features(*inputs, target.to(inputs[0].device), Objective("x", 5.0, 0.1, 1))
        gradients = torch.autograd.grad(128 * result.loss, inputs)
        results[case] = [value.detach().double().cpu() for value in (*result, *gradients)]
    for exact, plain, own in zip(*results.values()):
        unit = torch.finfo(dtype).eps * exact.abs().max()
        assert (own - exact).abs().max() <= 2 * (plain - exact).abs().max() + unit


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    write_corpus(folder, {"train": 100, "valid": 13, "test": 11})
    prefixes = [f"--{split}pref={folder / split}" for split in ("train", "valid", "test")]
    done = command(
        "preprocess", "--source-lang", "xx", "--target-lang", "en", "--destdir", folder / "bin", *prefixes, fresh=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def train(data, *flags):
    done = command(
        "train", data, "--user-dir", USER_DIR, *TINY_MODEL, "--task", "translation_intra_distillation",
        "--criterion", "intra_distillation", "--label-smoothing", 0.1, "--optimizer", "adam", "--lr", 0.005,
        "--max-tokens", 300, "--max-update", 8, "--no-save", "--log-format", "json", "--log-interval", 1,
        "--fp16-init-scale", 4, *flags, fresh=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"num_updates": "8"' in done.stdout + done.stderr


PRECISIONS = ["", "--fp16", "--bf16", "--amp", "--memory-efficient-fp16"]


@pytest.mark.parametrize("mode", passes.PASS_MODES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("backend", "loss_input"),
    [("auto", "auto"), ("reference", "logits"), ("chunked", "logits"), ("chunked", "features"), ("triton", "features")],
)
def test_trains(data, mode, precision, backend, loss_input):
    train(data, "--id-pass-mode", mode, "--id-loss-backend", backend, "--id-loss-input", loss_input, *precision.split())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sage_adam_trains(data, precision):
    train(data, "--optimizer", "sage_adam", *precision.split())


@pytest.mark.parametrize("mode", passes.PASS_MODES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_switch_transformer_trains(data, mode, precision):
    train(data, "--arch", "switch_transformer_small", "--id-pass-mode", mode, *precision.split())
