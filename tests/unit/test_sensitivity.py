"""analysis/sensitivity.py against numbers worked out by hand, against exact losses, and on what it leaves alone."""

from __future__ import annotations

import gc
import weakref

import measure as benchmark
import numpy as np
import pytest
import torch
from fairseq import utils
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import nn
from torch.nn import functional as F

from intra_distillation_fairseq.analysis import balance
from intra_distillation_fairseq.analysis.sensitivity import measure
from intra_distillation_fairseq.errors import UserError


class Product(nn.Module):
    """sum of theta_j * x_j: linear in theta, so that gradient and loss can be read off."""

    def __init__(self, *theta: float):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return (self.theta * x).sum()


def criterion(model, sample):
    return model(sample["x"]), None, {"ntokens": sample["ntokens"]}


def sample(*x: float, ntokens: int = 1) -> dict:
    return {"x": torch.tensor(x), "ntokens": ntokens}


def values(model, batches, **options) -> list[float]:
    return measure(model, criterion, batches, **options).values["theta"].tolist()


def test_worked_out_by_hand():
    """theta = (2, -3, 4). Two batches: gradients (1, 2, -1) of 1 token and (6, -4, 2) / 2 of 2 tokens.

    theta * g: (2, -6, -4) and (6, 6, 4). Absolute, then mean: (4, 6, 4); mean, then absolute: (4, 0, 0).
    Losses: -8, and 32 / 2 = 16; divided by them: (.25, .75, .5) and (.375, .375, .25).
    """
    model, batches = Product(2.0, -3.0, 4.0), [sample(1.0, 2.0, -1.0), sample(6.0, -4.0, 2.0, ntokens=2)]
    assert values(model, batches) == [4, 6, 4]
    assert values(model, batches, average="gradient") == [4, 0, 0]
    positive = [sample(1.0, 1.0, 1.0), batches[1]]  # loss 3, theta * g = (2, -3, 4)
    assert values(model, positive, normalise=True) == pytest.approx(
        [(2 / 3 + 6 / 16) / 2, (1 + 6 / 16) / 2, (4 / 3 + 4 / 16) / 2]
    )
    measured = measure(model, criterion, batches)
    assert (measured.loss, measured.tokens, measured.batches, measured.skipped) == (4, 3, 2, 0)
    assert measured.values["unused"].tolist() == [0, 0]
    assert measured.arrays()["theta"].dtype == np.float32
    assert measured.in_order().tolist() == [0, 0, 4, 4, 6]


def test_equals_the_change_of_the_loss_when_a_parameter_is_zeroed():
    """Exactly so where the loss is linear in it: |L(theta) - L(theta with theta_j = 0)|, eq. 1 of the paper."""
    random = torch.Generator().manual_seed(1)
    model = Product(*torch.randn(7, generator=random).tolist())
    batch = sample(*torch.randn(7, generator=random).tolist())
    measured = values(model, [batch])
    with torch.no_grad():
        for place in range(7):
            kept, before = model.theta[place].clone(), model(batch["x"])
            model.theta[place] = 0
            assert measured[place] == pytest.approx(float((before - model(batch["x"])).abs()), rel=1e-4)
            model.theta[place] = kept


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.dropout, self.second = nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 1)

    def forward(self, x):
        return self.second(self.dropout(self.first(x).tanh())).exp().sum()


def noisy_batches(number: int) -> list[dict]:
    random = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(4, 5, generator=random), "ntokens": 4} for _ in range(number)]


def test_many_batches_are_the_mean_of_single_ones():
    model, batches = Noisy(), noisy_batches(100)
    together = measure(model, criterion, batches, seed=7).values
    singles = [measure(model, criterion, [batch], seed=7 + i).values for i, batch in enumerate(batches)]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.stack([single[name] for single in singles]).mean(0))


def test_the_seed_decides_the_masks_and_evaluation_mode_has_none():
    model, batches = Noisy(), noisy_batches(2)

    def weights(**options):
        return measure(model, criterion, batches, **options).values["second.weight"].tolist()

    assert weights(seed=1) == weights(seed=1) != weights(seed=2)
    assert weights(seed=1, dropout=False) == weights(seed=2, dropout=False) != weights(seed=1)


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(dropout, training):
    model = Noisy().train(training)
    model.dropout.train(not training)
    model.first.bias.requires_grad_(False)
    model.second.weight.grad = torch.ones(1, 6)
    state = torch.get_rng_state()
    before = {name: p.clone() for name, p in model.named_parameters()}
    measured = measure(model, criterion, noisy_batches(2), dropout=dropout)
    assert measured.values["first.bias"].gt(0).any()  # measured, though not trained
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in (model, model.first, model.dropout)] == [training, training, not training]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert model.second.weight.grad.tolist() == [[1] * 6] and model.first.weight.grad is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_state_is_restored_after_an_error():
    model = Noisy().eval()
    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        measure(model, criterion, [{}])
    assert not model.training and torch.equal(state, torch.get_rng_state())


def test_a_batch_whose_gradient_is_not_finite_is_left_out():
    model, good = Product(2.0), [sample(1.0), sample(3.0)]
    bad = [sample(float("nan")), sample(float("inf"))]
    measured = measure(model, criterion, [good[0], *bad, good[1]])
    assert measured.values["theta"].tolist() == [4]
    assert (measured.batches, measured.skipped, measured.tokens, measured.loss) == (2, 2, 2, 4)
    with pytest.raises(UserError, match="of all 2 batches loss or gradient is not finite"):
        measure(model, criterion, bad)
    with pytest.raises(UserError, match="there is no batch"):
        measure(model, criterion, [])


def test_a_finite_loss_with_an_infinite_gradient_is_left_out():
    model = Product(0.0)  # sqrt at 0
    measured = measure(
        model, lambda m, s: (m.theta.sum().sqrt() if s["x"] == 0 else m(s["x"]), 0, s), [sample(0.0), sample(1.0)]
    )
    assert (measured.batches, measured.skipped) == (1, 1)


def test_a_shared_parameter_counts_once_with_both_gradients():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(1, 1, bias=False)
            self.b = self.a
            nn.init.constant_(self.a.weight, 3.0)

        def forward(self, x):
            return self.b(self.a(x)).sum()  # 9x, gradient 6x

    measured = measure(Tied(), criterion, [{"x": torch.ones(1, 1), "ntokens": 1}])
    assert {name: value.tolist() for name, value in measured.values.items()} == {"a.weight": [[18]]}


def test_half_precision_is_summed_in_float32_and_scaled():
    """A gradient of 1e-8 is 0 in float16; scaled by 2^16 it is not."""
    model = Product(1.0).half()
    small = [{"x": torch.tensor([2.0**-26]), "ntokens": 1}]

    def tiny(model, sample):
        return (model.theta.float() * sample["x"]).sum(), None, sample

    assert measure(model, tiny, small).values["theta"].tolist() == [0]
    scaled = measure(model, tiny, small, loss_scale=2.0**16).values["theta"]
    assert scaled.dtype == torch.float32 and scaled.tolist() == [2.0**-26]


def test_recomputed_activations_give_the_same_and_stay_recomputed():
    plain, recomputing = Noisy(), Noisy()
    checkpoint_wrapper(recomputing.first)
    wrapped = recomputing.first.forward
    batches = noisy_batches(2)
    expected, found = (measure(model, criterion, batches).values for model in (plain, recomputing))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert recomputing.first.forward is wrapped


def test_memory_is_a_gradient_a_sum_and_the_product_of_one_parameter():
    """However many batches there are; the activations of this model are nothing beside its parameters."""
    model = nn.ModuleList(nn.Linear(300, 300, bias=False) for _ in range(6))
    parameters = 6 * 300 * 300 * 4 / benchmark.MIB

    def chain(model, sample):
        x = sample["x"]
        for layer in model:
            x = layer(x)
        return x.sum(), None, {"ntokens": 1}

    def batches(number):
        return ({"x": torch.ones(1, 300)} for _ in range(number))

    measure(model, chain, batches(1))
    few, many = (benchmark.peak_memory(lambda n=n: measure(model, chain, batches(n))) for n in (1, 20))
    assert many == pytest.approx(few, abs=0.01)
    assert many < 2 * parameters * (1 + 1 / 6)


def test_batches_are_read_one_at_a_time_and_given_up():
    class Sample(dict):
        pass

    seen: list[weakref.ref] = []

    def batches():
        for _ in range(4):
            gc.collect()
            assert sum(ref() is not None for ref in seen) <= 1
            one = Sample(sample(1.0))
            seen.append(weakref.ref(one))
            yield one

    assert measure(Product(1.0), criterion, batches()).batches == 4


def test_progress_is_told():
    told = []
    measure(Product(2.0), criterion, [sample(1.0), sample(3.0)], done=lambda *news: told.append(news))
    assert told == [(1, 2), (2, 6)]


def test_the_transformer_agrees_with_its_loss_to_first_order(tiny_transformer):
    """(L(theta) - L(theta with theta_j * (1 - eps))) / eps -> theta_j * dL/dtheta_j, in float64 without dropout."""
    model, batch = tiny_transformer

    def loss(model, sample):
        logits = model(**sample["net_input"])[0].flatten(0, 1)
        value = F.cross_entropy(
            logits, sample["target"].flatten(), reduction="sum", ignore_index=1, label_smoothing=0.1
        )
        return value, None, sample

    measured = measure(model, loss, [batch], dropout=False).values
    random = np.random.default_rng(4)
    checked, eps = 0, 1e-4
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        for place in random.integers(len(flat), size=3):
            kept, losses = float(flat[place]), []
            with torch.no_grad():
                for factor in (1 + eps, 1 - eps):  # from both sides: the error is of the order of eps^2
                    flat[place] = kept * factor
                    losses.append(float(loss(model, batch)[0]) / batch["ntokens"])
                flat[place] = kept
            change = abs(losses[0] - losses[1]) / (2 * eps)
            assert float(measured[name].view(-1)[place]) == pytest.approx(change, rel=1e-3, abs=1e-8), name
            checked += change > 1e-6
    assert checked > 20


@pytest.fixture
def tiny_transformer(monkeypatch):
    import in_process

    # fairseq's own is float32 at best: its rounding would be as large as these differences
    monkeypatch.setattr(utils, "softmax", lambda x, dim, **_: torch.softmax(x, dim))

    class Task:
        source_dictionary = target_dictionary = benchmark.dictionary(20)

    model = in_process.make_model(Task()).double().eval()
    return model, benchmark.random_batch(20, 60, torch.device("cpu"))


def test_summary_of_a_measurement():
    result = balance.summary(measure(Product(1.0, 2.0, 3.0), criterion, [sample(1.0, 1.0, 1.0)]).in_order())
    assert result["parameters"] == 5 and result["mean"] == pytest.approx(6 / 5)
