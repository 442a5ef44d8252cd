"""How much memory the back ends take beyond the logits: counted, so it is the same on every machine."""

import pytest
import torch
from measure import peak_memory

from intra_distillation_fairseq.losses import chunked, projected
from intra_distillation_fairseq.losses.backends import BACKENDS
from intra_distillation_fairseq.losses.objective import Objective

K, N, V, H = 3, 400, 1501, 32
LOGITS_MIB = K * N * V * 4 / 2**20  # 6.9
OBJECTIVE = Objective("x", 5.0, 0.1, 1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """In proportion to the logits, as with those of a real batch."""
    monkeypatch.setitem(chunked.BLOCK_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(projected.CHUNK_BYTES, "cpu", 1 << 19)


def forward_and_backward(backend, overwrite):
    """Peak in MiB of loss and gradient from logits, beyond the logits themselves."""
    leaf = torch.randn(K, N, V, requires_grad=True)
    logits = leaf * 1.0  # kept alive by this variable; its own gradient is that of the leaf
    target = torch.randint(2, V, (N,))

    def work():
        loss = BACKENDS[backend].from_logits(logits, target, OBJECTIVE, overwrite).loss
        return torch.autograd.grad(loss, logits)

    return peak_memory(work)


def test_from_logits():
    reference, chunked, overwriting = (
        forward_and_backward(backend, overwrite)
        for backend, overwrite in (("reference", False), ("chunked", False), ("chunked", True))
    )
    assert reference > 4 * LOGITS_MIB
    beyond_the_gradient = reference - LOGITS_MIB
    assert chunked - LOGITS_MIB < 0.1 * beyond_the_gradient
    assert overwriting < 0.1 * beyond_the_gradient


def test_from_features_the_logits_never_exist():
    weight = torch.randn(V, H, requires_grad=True)
    features = torch.randn(K, N, H, requires_grad=True)
    target = torch.randint(2, V, (N,))

    def work():
        loss = BACKENDS["chunked"].from_features(features, weight, None, target, OBJECTIVE).loss
        return torch.autograd.grad(loss, (features, weight))

    inputs_mib = (features.numel() + weight.numel()) * 4 / 2**20
    assert inputs_mib < 0.1 * LOGITS_MIB
    assert peak_memory(work) < 2 * inputs_mib + 0.2 * LOGITS_MIB
