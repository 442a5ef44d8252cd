"""K passes: which masks they draw, that their gradients agree, what they keep alive."""

import pytest
import torch
from torch import nn

from intra_distillation_fairseq import passes

BATCH = {"src_tokens": torch.arange(12).view(4, 3) % 7, "prev_output_tokens": torch.arange(20).view(4, 5) % 7}


class Model(nn.Module):
    """Returns (logits, extra) like fairseq's models: B x T x V."""

    def __init__(self, dropout=0.3):
        super().__init__()
        self.embed, self.dropout, self.out = nn.Embedding(7, 8), nn.Dropout(dropout), nn.Linear(8, 7)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, src_tokens, prev_output_tokens):
        h = self.embed(prev_output_tokens) + self.embed(src_tokens).mean(1, keepdim=True)
        for layer in self.layers:
            h = self.dropout(torch.tanh(layer(h)))
        return self.out(h), {"name": "extra"}


def gradients(model, mode, seed=3):
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = passes.run(model, BATCH, 3, mode)
    sum(((i + 1) * out.pow(2)).sum() for i, out in enumerate(outputs)).backward()
    return [out.detach() for out in outputs], [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def test_sequential_draws_the_masks_of_plain_forwards(model):
    torch.manual_seed(5)
    expected = [model(**BATCH)[0] for _ in range(3)]
    torch.manual_seed(5)
    outputs = passes.run(model, BATCH, 3, "sequential")
    assert all(torch.equal(out, e) for out, e in zip(outputs, expected))
    assert not torch.equal(expected[0], expected[1])


def test_recompute_equals_sequential_bit_for_bit(model):
    outputs, expected = gradients(model, "sequential")
    again, got = gradients(model, "recompute")
    assert all(torch.equal(a, b) for a, b in zip(outputs, again))
    assert all(torch.equal(a, b) for a, b in zip(expected, got))


def test_recompute_leaves_the_random_state_where_sequential_does(model):
    states = []
    for mode in ("sequential", "recompute"):
        gradients(model, mode)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("mode", passes.PASS_MODES)
def test_passes_differ_and_have_the_shape_of_the_single_batch(model, mode):
    torch.manual_seed(1)
    outputs = passes.run(model, BATCH, 3, mode)
    assert len(outputs) == 3
    assert all(out.shape == (4, 5, 7) for out in outputs)
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("mode", passes.PASS_MODES)
def test_flatten_tokens_leaves_the_prefix_out(model, mode):
    outputs = passes.run(model, BATCH, 2, mode)
    flat = passes.flatten_tokens(outputs, skip=2)
    for before, after in zip(outputs, flat):
        assert torch.equal(after, before[:, 2:].reshape(12, 7))


def test_stacked_gives_one_tensor(model):
    """Which the loss takes as it is, without taking it apart."""
    assert passes.flatten_tokens(passes.run(model, BATCH, 3, "stacked")).shape == (3, 20, 7)


def test_all_modes_agree_without_dropout():
    torch.manual_seed(0)
    model = Model(dropout=0.0).double()
    results = [gradients(model, mode)[1] for mode in passes.PASS_MODES]
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_recompute_keeps_the_activations_of_one_pass_only(model):
    """Counts what autograd saves outside of parameters and outputs while K passes run."""

    def saved_elements(mode):
        parameters = {p.data_ptr() for p in model.parameters()}
        saved = {}

        def pack(tensor):
            if tensor.data_ptr() not in parameters:
                saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        kept = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept.append(passes.run(model, BATCH, 3, mode))
        return sum(saved.values())

    assert saved_elements("recompute") < 0.2 * saved_elements("sequential")


def test_recompute_hands_checkpoint_every_tensor_it_needs_for_the_devices(model, monkeypatch):
    """Keyword arguments are not searched for devices: on a GPU their dropout masks would not be restored."""
    seen = []
    monkeypatch.setattr(passes, "checkpoint", lambda f, *args, **kwargs: seen.append((args, kwargs)) or f(*args))
    passes.run(model, BATCH, 2, "recompute")
    for args, kwargs in seen:
        assert [id(a) for a in args] == [id(v) for v in BATCH.values()]
        assert kwargs == {"use_reentrant": False, "preserve_rng_state": True}


def test_recompute_runs_the_second_time_inside_the_wrapper(model):
    class Wrapper(nn.Module):
        calls = 0

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **kwargs):
            Wrapper.calls += 1
            return self.module(**kwargs)

    gradients(Wrapper(model), "recompute")
    assert Wrapper.calls == 3


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, False), (0.1, True)])
def test_is_stochastic(dropout, expected):
    assert passes.is_stochastic(Model(dropout)) is expected
