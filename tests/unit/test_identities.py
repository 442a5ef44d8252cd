"""The identities behind docs/method.md, "Fair comparison": each is exact and each is tested here, in float64."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy_with_rdrop import RdropLabelSmoothedCrossEntropyCriterion
from fairseq.optim.adam import Adam
from torch import nn

from intra_distillation_fairseq.criterions.intra_distillation import IntraDistillationCriterion
from intra_distillation_fairseq.losses.divergence import DIVERGENCES, js_divergence, x_divergence

PAD = 1
TASK = SimpleNamespace(target_dictionary=SimpleNamespace(pad=lambda: PAD))


class GivenLogits(nn.Module):
    """A "model" whose only parameters are the logits of its passes: K*B x T x V, whatever the input."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, **net_input):
        return self.logits, None

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        return (torch.log_softmax if log_probs else torch.softmax)(net_output[0], -1)

    def get_targets(self, sample, net_output):
        return sample["target"]


def random_logits(*shape, scale=2.0, seed=0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lprobs_of(logits):
    return list(torch.log_softmax(logits, -1))


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def entropy(log_p):
    return -(log_p.exp() * log_p).sum(-1)


def make_sample(target):
    tokens = torch.zeros_like(target)
    return {
        "net_input": {"src_tokens": tokens, "prev_output_tokens": tokens},
        "target": target,
        "ntokens": int(target.ne(PAD).sum()),
    }


def loss_and_gradient(criterion, logits, target):
    model = GivenLogits(logits.clone())
    loss, sample_size, log = criterion(model, make_sample(target))
    loss.backward()
    return loss.item(), model.logits.grad, sample_size, log


@pytest.mark.parametrize("k", [2, 3, 6])
def test_x_is_the_jeffreys_divergence_times_a_constant(k):
    """J_K = sum over ordered pairs of KL(i || j) + KL(j || i) = 2 K^2 X, value and gradient."""
    logits = random_logits(k, 7, 13).requires_grad_()
    x = x_divergence(lprobs_of(logits))
    jeffreys = sum(kl(a, b) + kl(b, a) for a, b in itertools.product(lprobs_of(logits), repeat=2))
    torch.testing.assert_close(jeffreys, 2 * k**2 * x, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value.sum(), logits)[0] for value in (jeffreys, 2 * k**2 * x)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_x_of_two_passes_is_a_quarter_of_the_usual_jeffreys():
    p, q = lprobs = lprobs_of(random_logits(2, 7, 13))
    torch.testing.assert_close(x_divergence(lprobs), (kl(p, q) + kl(q, p)) / 4, rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_x_is_the_covariance_of_probabilities_and_log_probabilities(k):
    lprobs = torch.log_softmax(random_logits(k, 13), -1)  # K x V
    covariances = [torch.cov(torch.stack([lp.exp(), lp]), correction=0)[0, 1] for lp in lprobs.T]
    assert x_divergence(list(lprobs[:, None])).item() == pytest.approx(sum(covariances).item(), rel=1e-12)
    assert min(covariances) >= 0


@pytest.mark.parametrize("k", [2, 3, 6])
def test_js_is_the_entropy_of_the_mean_minus_the_mean_entropy(k):
    lprobs = lprobs_of(random_logits(k, 7, 13))
    mean = sum(lp.exp() for lp in lprobs) / k
    expected = entropy(mean.log()) - sum(entropy(lp) for lp in lprobs) / k
    torch.testing.assert_close(js_divergence(lprobs), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_js_is_bounded_by_ln_k_and_x_is_not(k):
    """Pass i wants token i, by an ever larger gap of logits."""
    previous = 0.0
    for gap in (1.0, 10.0, 100.0, 1000.0):
        lprobs = lprobs_of(gap * torch.eye(k, 9, dtype=torch.float64)[:, None])
        js, x = js_divergence(lprobs).item(), x_divergence(lprobs).item()
        assert js <= math.log(k) + 1e-12
        assert x > previous
        previous = x
    assert js == pytest.approx(math.log(k), rel=1e-12)
    assert x == pytest.approx((k - 1) / k * gap, rel=1e-12)  # every pair of passes has KL = gap


@pytest.mark.parametrize(("d", "expected"), [(1e-3, 3.446), (1e-12, 13.816)])
def test_x_has_no_bound_by_hand(d, expected):
    """p = (1 - d, d), q = (d, 1 - d): X = (1 - 2 d) / 2 * ln((1 - d) / d)."""
    lprobs = [torch.tensor([pair], dtype=torch.float64).log() for pair in ((1 - d, d), (d, 1 - d))]
    assert x_divergence(lprobs).item() == pytest.approx((1 - 2 * d) / 2 * math.log((1 - d) / d), rel=1e-12)
    assert x_divergence(lprobs).item() == pytest.approx(expected, abs=5e-4)
    assert js_divergence(lprobs).item() < math.log(2)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_x_is_twice_js_where_the_passes_are_close(k):
    """And more than twice where they are not: passes = common logits + noise of standard deviation s."""
    base = random_logits(1, 500, 50)

    def ratio(s):
        lprobs = lprobs_of(base + random_logits(k, 500, 50, scale=s, seed=1))
        return (x_divergence(lprobs).sum() / js_divergence(lprobs).sum()).item()

    assert ratio(1e-3) == pytest.approx(2, abs=1e-5)
    assert ratio(0.1) == pytest.approx(2, abs=0.02)
    if k == 3:  # the numbers of docs/method.md
        assert [ratio(s) for s in (0.5, 1.0, 2.0)] == pytest.approx([2.1, 2.3, 3.2], abs=0.1)
    assert 2.02 < ratio(0.5) < ratio(1.0) < ratio(2.0)


def every_draw(k, masks=4, scale=1.0):
    """The logits of all masks^K equally probable outcomes of K independent passes, K x masks^K x V.

    A pass draws one of a few dropout masks, each with its own distribution. The mean over all outcomes is the
    expectation, exactly.
    """
    of_mask = random_logits(masks, 11, scale=scale)
    draws = torch.tensor(list(itertools.product(range(masks), repeat=k)))  # masks^K x K
    return of_mask[draws.T], of_mask


def expected_kl_of_two_passes(of_mask):
    return sum(kl(a, b) for a, b in itertools.product(lprobs_of(of_mask), repeat=2)).item() / len(of_mask) ** 2


@pytest.mark.parametrize("k", [2, 3, 6])
def test_the_expectation_of_x_grows_with_k(k):
    """E[X] = (K - 1) / K * E[KL between two passes], exactly and however far the passes are apart."""
    logits, of_mask = every_draw(k)
    expected = (k - 1) / k * expected_kl_of_two_passes(of_mask)
    assert x_divergence(lprobs_of(logits)).mean().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("divergence", "scale", "per_kappa", "tolerance"), [("x", 1.0, 1.0, 1e-12), ("js", 0.02, 0.5, 1e-3)]
)
@pytest.mark.parametrize("k", [2, 3, 6])
def test_unbiased_scale_takes_k_out_of_the_expectation(k, divergence, scale, per_kappa, tolerance):
    """In the criterion: the divergence's share of the loss, per token, is the same for every K; id_loss is plain."""
    logits, of_mask = every_draw(k, scale=scale)
    target = torch.full((logits.size(1), 1), 4)  # masks^K sentences of one token
    kappa = expected_kl_of_two_passes(of_mask)
    shares = {}
    for id_scale in ("published", "unbiased"):
        criterion = IntraDistillationCriterion(
            TASK, False, 0.1, id_num_passes=k, id_divergence=divergence, id_alpha=3.0, id_alpha_schedule="constant",
            id_scale=id_scale,
        )  # fmt: skip
        loss, _, tokens, log = loss_and_gradient(criterion, logits.reshape(-1, 1, 11), target)
        shares[id_scale] = (loss - log["ls_loss"].item()) / 3.0 / tokens
        plain = DIVERGENCES[divergence](lprobs_of(logits)).sum().item()
        assert log["id_loss"].item() == pytest.approx(plain, rel=1e-12)
    assert shares["unbiased"] == pytest.approx(per_kappa * kappa, rel=tolerance)
    assert shares["published"] == pytest.approx((k - 1) / k * per_kappa * kappa, rel=tolerance)


@pytest.mark.parametrize("alpha", [5.0, 0.7])
def test_fairseqs_r_drop_is_twice_this_loss_with_two_passes_and_constant_alpha(alpha):
    """fairseq's own criterion, run as it is, against ours: loss and gradient, padding and smoothing included."""
    target = torch.tensor([[4, 9, 3, 2], [7, 2, PAD, PAD], [5, 12, 2, PAD]])
    logits = random_logits(2 * 3, 4, 13)
    rdrop = RdropLabelSmoothedCrossEntropyCriterion(TASK, False, 0.1, rdrop_alpha=alpha)
    ours = IntraDistillationCriterion(TASK, False, 0.1, id_num_passes=2, id_alpha=alpha, id_alpha_schedule="constant")
    theirs, got = (loss_and_gradient(criterion, logits, target) for criterion in (rdrop, ours))
    assert theirs[0] == pytest.approx(2 * got[0], rel=1e-13)
    torch.testing.assert_close(theirs[1], 2 * got[1], rtol=1e-12, atol=1e-14)
    assert theirs[2] == got[2] == 9
    padding = target.eq(PAD).repeat(2, 1)
    assert (got[1][padding] == 0).all()
    assert (got[1][~padding] != 0).all()


def test_adam_does_not_see_a_factor_of_two_except_through_its_eps():
    """Why R-Drop's doubled loss trains as the plain one does, when gradients are not clipped."""

    def after(factor, eps):
        parameter = nn.Parameter(random_logits(50))
        optimizer = Adam([parameter], lr=0.01, eps=eps, weight_decay=0.1)
        for seed in range(5):
            parameter.grad = factor * 1e-5 * random_logits(50, seed=seed)
            optimizer.step()
        return parameter.detach()

    torch.testing.assert_close(after(1, 1e-30), after(2, 1e-30), rtol=1e-13, atol=0)
    assert not torch.allclose(after(1, 1e-6), after(2, 1e-6), rtol=1e-4, atol=0)
