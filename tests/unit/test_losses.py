"""Divergences and the reference loss: hand-worked values, identities, gradients, precision, extreme logits."""

import itertools
import math

import pytest
import torch

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.losses import chunked as chunked_loss
from intra_distillation_fairseq.losses.backends import BACKENDS, choose, reference
from intra_distillation_fairseq.losses.divergence import DIVERGENCES, js_divergence, log_probabilities, x_divergence

PAD = 1


def random_logits(k, n, v, dtype=torch.float64, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(k, n, v, generator=generator, dtype=torch.float64) * scale).to(dtype)


def random_target(n, v, seed=0):
    """n token ids, about a third of them padding."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(2, v, (n,), generator=generator)
    return target.masked_fill(torch.rand(n, generator=generator) < 0.3, PAD)


def kl(p, log_p, log_q):
    return (p * (log_p - log_q)).sum(-1)


def test_x_by_hand():
    # p1 = (3/4, 1/4), p2 = (1/4, 3/4), m = (1/2, 1/2): X = (1/2) * 4 * (1/4) * (ln 3 / 2) = ln(3)/4
    lprobs = [torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()]
    assert x_divergence(lprobs).item() == pytest.approx(math.log(3) / 4)
    # JS = H(m) - H(p1) = ln 2 - (3/4 ln(4/3) + 1/4 ln 4)
    assert js_divergence(lprobs).item() == pytest.approx(math.log(2) - 0.75 * math.log(4 / 3) - 0.25 * math.log(4))


@pytest.mark.parametrize("k", [2, 3, 6])
def test_equal_to_the_definitions(k):
    lprobs = torch.log_softmax(random_logits(k, 11, 17), -1)
    probs = lprobs.exp()
    mean, log_mean = probs.mean(0), probs.mean(0).log()
    x = sum(kl(probs[i], lprobs[i], log_mean) + kl(mean, log_mean, lprobs[i]) for i in range(k)) / k
    js = sum(kl(probs[i], lprobs[i], log_mean) for i in range(k)) / k
    pairwise = sum(kl(probs[i], lprobs[i], lprobs[j]) for i, j in itertools.product(range(k), repeat=2)) / k**2
    torch.testing.assert_close(x_divergence(list(lprobs)), x, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(x_divergence(list(lprobs)), pairwise, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(js_divergence(list(lprobs)), js, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_where_passes_agree_and_the_same_in_any_order(name):
    divergence = DIVERGENCES[name]
    lprobs = list(torch.log_softmax(random_logits(4, 5, 9), -1))
    assert divergence([lprobs[0]] * 4).abs().max() < 1e-15
    torch.testing.assert_close(divergence(lprobs), divergence(lprobs[::-1]), rtol=1e-12, atol=0)
    assert (divergence(lprobs) > 0).all()


@pytest.mark.parametrize("k", [2, 3])
def test_closed_form_gradients(k):
    logits = random_logits(k, 7, 13).requires_grad_()
    lprobs = torch.log_softmax(logits, -1)
    p, mean = lprobs.exp(), lprobs.exp().mean(0)
    d = lprobs - lprobs.mean(0)
    e = lprobs - mean.log()
    x_gradient = (p * (d - (p * d).sum(-1, keepdim=True)) + p - mean) / k
    js_gradient = p * (e - (p * e).sum(-1, keepdim=True)) / k
    for divergence, expected in ((x_divergence, x_gradient), (js_divergence, js_gradient)):
        (gradient,) = torch.autograd.grad(divergence(list(lprobs)).sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, expected.detach(), rtol=1e-10, atol=1e-13)
        assert gradient.sum(-1).abs().max() < 1e-13


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(name, divergence):
    logits = random_logits(3, 4, 6).requires_grad_()
    target = torch.tensor([2, 5, PAD, 3])

    def loss(z):
        result = BACKENDS[name](z, target, PAD, 0.1, divergence)
        return 1.7 * result.ls_sum + 4.2 * result.divergence_sum

    assert torch.autograd.gradcheck(loss, (logits,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_against_float64(dtype, divergence, backend):
    """The error of the loss is that of float32, the error of the gradient that of rounding it to the logits' type."""
    low = random_logits(3, 40, 101, dtype).requires_grad_()
    high = low.detach().double().requires_grad_()
    target = random_target(40, 101)
    results = [BACKENDS[b](z, target, PAD, 0.1, divergence) for b, z in ((backend, low), ("reference", high))]
    for got, expected in zip(*results):
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(expected.item(), rel=2e-6)
    gradients = [torch.autograd.grad(r.ls_sum + 5 * r.divergence_sum, z)[0] for r, z in zip(results, (low, high))]
    assert gradients[0].dtype == dtype
    difference = (gradients[0].double() - gradients[1]).abs()
    # One rounding to the type (half a unit in the last place, or a subnormal step) and float32's own error.
    allowed = torch.finfo(dtype).eps * gradients[1].abs() + torch.finfo(dtype).smallest_normal + 2e-6
    assert (difference <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("gap", [50.0, 100.0, 105.0, 200.0, 1000.0])
def test_finite_at_a_large_gap_of_logits(gap, dtype, divergence, backend):
    logits = torch.zeros(3, 2, 5, dtype=dtype)
    logits[0, :, 0] = gap
    logits[1, :, 1] = gap
    logits[2, :, 2] = -gap
    logits.requires_grad_()
    result = BACKENDS[backend](logits, torch.tensor([3, 4]), PAD, 0.1, divergence)
    (gradient,) = torch.autograd.grad(result.ls_sum + 5 * result.divergence_sum, logits)
    assert all(value.isfinite() for value in result)
    assert gradient.isfinite().all()


def test_a_tiny_divergence_does_not_cancel_in_float32():
    base = random_logits(1, 1, 12001, scale=3.0)
    logits = base + 1e-3 * random_logits(3, 1, 12001, seed=7)
    exact = x_divergence(list(log_probabilities(logits)))
    assert x_divergence(list(log_probabilities(logits.float()))).item() == pytest.approx(exact.item(), rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padding_never_matters(divergence, backend):
    logits, target = random_logits(3, 20, 11), random_target(20, 11)
    changed = logits.clone()
    changed[:, target.eq(PAD)] = 1e4 * random_logits(3, int(target.eq(PAD).sum()), 11, seed=5)
    real = logits[:, target.ne(PAD)]
    for z in (logits, changed, real):
        z.requires_grad_()
    results = [
        BACKENDS[backend](z, t, PAD, 0.1, divergence)
        for z, t in ((logits, target), (changed, target), (real, target[target.ne(PAD)]))
    ]
    for values in zip(*results):
        assert values[0].item() == pytest.approx(values[1].item(), rel=1e-12)
        assert values[0].item() == pytest.approx(values[2].item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(results[1].ls_sum + results[1].divergence_sum, changed)
    assert (gradient[:, target.eq(PAD)] == 0).all()
    assert (gradient[:, target.ne(PAD)] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_padding_gives_zero(backend):
    logits = random_logits(3, 4, 7).requires_grad_()
    result = BACKENDS[backend](logits, torch.full((4,), PAD), PAD, 0.1, "x")
    assert [value.item() for value in result] == [0, 0, 0]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("k", "n", "v"), [(2, 1, 5), (3, 37, 101), (6, 50, 12)])
@pytest.mark.parametrize("tokens_per_chunk", [1, 7, 1000])
@pytest.mark.parametrize("apart", [True, False])
def test_chunked_equals_reference(monkeypatch, k, n, v, tokens_per_chunk, divergence, apart):
    """Any number of tokens per chunk, random upstream gradients, non-contiguous passes, apart or in one tensor."""
    monkeypatch.setattr(chunked_loss, "chunk_tokens", lambda *_: tokens_per_chunk)
    target = random_target(n, v, seed=3)
    results = []
    for backend in ("reference", "chunked"):
        leaf = random_logits(n, v, k).requires_grad_()
        logits = leaf.permute(2, 0, 1)
        result = BACKENDS[backend](list(logits) if apart else logits, target, PAD, 0.1, divergence)
        (gradient,) = torch.autograd.grad(-0.3 * result.ls_sum + 2.9 * result.divergence_sum, leaf)
        results.append((*(value.detach() for value in result), gradient))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_chunked_scales_before_it_rounds_to_float16():
    """A gradient below float16's range survives if the upstream gradient (fairseq's loss scale) lifts it into it."""
    logits = random_logits(3, 4, 2001, torch.float16).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    target = torch.tensor([5, 6, 7, 8])
    for backend, z in (("chunked", logits), ("reference", exact)):
        (1e-7 * 2.0**20 * BACKENDS[backend](z, target, PAD, 0.1, "x").ls_sum).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-3, atol=1e-7)


def test_sums_over_tokens_add_up():
    logits, target = random_logits(3, 20, 11), random_target(20, 11)
    whole = reference(logits, target, PAD, 0.1, "x")
    parts = [reference(logits[:, s], target[s], PAD, 0.1, "x") for s in (slice(0, 7), slice(7, 20))]
    for value, a, b in zip(whole, *parts):
        assert value.item() == pytest.approx((a + b).item(), rel=1e-12)


def test_smoothing_is_fairseqs():
    from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

    logits, target = random_logits(3, 20, 11), random_target(20, 11)
    expected = [label_smoothed_nll_loss(torch.log_softmax(z, -1), target, 0.1, ignore_index=PAD) for z in logits]
    result = reference(logits, target, PAD, 0.1, "x")
    assert result.ls_sum.item() == pytest.approx(sum(loss.item() for loss, _ in expected) / 3, rel=1e-12)
    assert result.nll_sum.item() == pytest.approx(sum(nll.item() for _, nll in expected) / 3, rel=1e-12)


def test_unknown_back_end_is_named():
    with pytest.raises(UserError, match="^--id-loss-backend is 'cuda': allowed are auto, reference, chunked"):
        choose("cuda")
