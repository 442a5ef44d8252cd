"""Divergences and the reference loss: hand-worked values, identities, gradients, precision, extreme logits."""

import itertools
import math
import sys

import pytest
import torch

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.losses import chunked as chunked_loss
from intra_distillation_fairseq.losses import projected as projected_loss
from intra_distillation_fairseq.losses.backends import BACKENDS, choose, reference
from intra_distillation_fairseq.losses.closed_form import CLOSED_FORMS
from intra_distillation_fairseq.losses.divergence import DIVERGENCES, js_divergence, x_divergence
from intra_distillation_fairseq.losses.objective import Objective

PAD = 1


def through_identity(logits, target, objective):
    """The variant from features, given the logits as features and the identity as projection: nothing is rounded."""
    v = logits[0].size(-1)
    weight = torch.eye(v, dtype=logits[0].dtype)
    return BACKENDS["chunked"].from_features(logits, weight, None, target, objective)


LOSSES = {
    "reference": BACKENDS["reference"].from_logits,
    "chunked": BACKENDS["chunked"].from_logits,
    "chunked_features": through_identity,
}


def objective(divergence="x", weight=5.0, smoothing=0.1):
    return Objective(divergence, weight, smoothing, PAD)


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


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
def test_gradcheck(name, divergence):
    logits = random_logits(3, 4, 6).requires_grad_()
    target = torch.tensor([2, 5, PAD, 3])
    assert torch.autograd.gradcheck(lambda z: 1.7 * LOSSES[name](z, target, objective(divergence, 2.5)).loss, (logits,))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck_of_the_projection(with_bias, divergence, backend):
    """Features apart, projection and bias."""
    features = [z.requires_grad_() for z in random_logits(3, 4, 5)]
    weight = random_logits(1, 7, 5, seed=3)[0].requires_grad_()
    bias = random_logits(1, 1, 7, seed=4)[0, 0].requires_grad_() if with_bias else None
    target = torch.tensor([2, 5, PAD, 3])

    def loss(weight, *rest):
        rest, b = (rest[:-1], rest[-1]) if with_bias else (rest, None)
        return 0.3 * BACKENDS[backend].from_features(rest, weight, b, target, objective(divergence)).loss

    inputs = (weight, *features, bias) if with_bias else (weight, *features)
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_loss_carries_gradient_and_is_the_weighted_sum(name):
    logits, target = random_logits(3, 9, 11).requires_grad_(), random_target(9, 11)
    result = LOSSES[name](logits, target, objective(weight=2.5))
    assert result.loss.item() == pytest.approx((result.ls_sum + 2.5 * result.divergence_sum).item(), rel=1e-12)
    assert [value.requires_grad for value in result] == [True, False, False, False]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "n", "v"), [(2, 1, 5), (3, 40, 101), (8, 9, 257)])
def test_error_at_most_twice_plain_pytorchs(k, n, v, dtype, divergence, name):
    """Against the float64 reference, where plain PyTorch is the reference back end in the same type."""
    low = random_logits(k, n, v, dtype)
    target = random_target(n, v).clamp(min=2)
    results = {}
    for case, function, z in (
        ("exact", LOSSES["reference"], low.double()),
        ("plain", LOSSES["reference"], low.clone()),
        ("own", LOSSES[name], low.clone()),
    ):
        result = function(z.requires_grad_(), target, objective(divergence))
        assert result.loss.dtype == (torch.float64 if case == "exact" else torch.float32)
        results[case] = (*result, torch.autograd.grad(37.0 * result.loss, z)[0])
    assert results["own"][-1].dtype == dtype
    for exact, plain, own in zip(*results.values()):
        # The errors of single numbers are a matter of luck: the largest of the tensor counts, and one unit in the last
        # place of the largest value (of the type in which it is returned) is always allowed.
        unit = torch.finfo(own.dtype).eps * exact.abs().max()
        errors = [(value.double() - exact).abs().max() for value in (own, plain)]
        assert errors[0] <= 2 * errors[1] + unit


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_from_features_at_most_twice_plain_pytorchs(dtype, with_bias):
    """Of the gradients of features, projection and bias, rounded logits included, summed over several inputs."""
    errors = {"plain": torch.zeros(3), "own": torch.zeros(3)}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        given = [torch.randn(*shape, generator=generator) for shape in ((3, 40, 32), (101, 32), (101,))]
        given = [x.to(dtype) for x in (given if with_bias else given[:2])]
        target = random_target(40, 101, seed)
        gradients = {}
        for case, backend in (("exact", "reference"), ("plain", "reference"), ("own", "chunked")):
            inputs = [(x.double() if case == "exact" else x.clone()).requires_grad_() for x in given]
            features, weight, *bias = inputs
            result = BACKENDS[backend].from_features(features, weight, *(bias or [None]), target, objective())
            gradients[case] = [g.double() for g in torch.autograd.grad(37.0 * result.loss, inputs)]
        for case, total in errors.items():
            for i, (exact, got) in enumerate(zip(gradients["exact"], gradients[case])):
                total[i] += (got - exact).abs().max() / exact.abs().max()
    assert (errors["own"] <= 1.5 * errors["plain"] + torch.finfo(torch.float32).eps).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("gap", [50.0, 100.0, 105.0, 200.0, 1000.0])
def test_finite_at_a_large_gap_of_logits(gap, dtype, divergence, name):
    logits = torch.zeros(3, 2, 5, dtype=dtype)
    logits[0, :, 0] = gap
    logits[1, :, 1] = gap
    logits[2, :, 2] = -gap
    logits.requires_grad_()
    result = LOSSES[name](logits, torch.tensor([3, 4]), objective(divergence))
    (gradient,) = torch.autograd.grad(result.loss, logits)
    assert all(value.isfinite() for value in result)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_a_tiny_divergence_does_not_cancel_in_float32(shift, name):
    """Nor where a pass differs from the others by a constant, which no divergence sees."""
    base = random_logits(1, 1, 12001, scale=3.0)
    logits = base + 1e-3 * random_logits(3, 1, 12001, seed=7) + shift * torch.arange(3.0).view(3, 1, 1)
    logits = logits.float().double()  # the rounding of the logits themselves is nobody's error
    target = torch.tensor([5])
    exact, own = (LOSSES[name](z, target, objective()).divergence_sum.item() for z in (logits, logits.float()))
    assert own == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
def test_padding_never_matters(divergence, name):
    logits, target = random_logits(3, 20, 11), random_target(20, 11)
    changed = logits.clone()
    changed[:, target.eq(PAD)] = 1e4 * random_logits(3, int(target.eq(PAD).sum()), 11, seed=5)
    real = logits[:, target.ne(PAD)]
    for z in (logits, changed, real):
        z.requires_grad_()
    results = [
        LOSSES[name](z, t, objective(divergence))
        for z, t in ((logits, target), (changed, target), (real, target[target.ne(PAD)]))
    ]
    for values in zip(*results):
        assert values[0].item() == pytest.approx(values[1].item(), rel=1e-12)
        assert values[0].item() == pytest.approx(values[2].item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(results[1].loss, changed)
    assert (gradient[:, target.eq(PAD)] == 0).all()
    assert (gradient[:, target.ne(PAD)] != 0).any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n", [0, 4])
def test_only_padding_or_nothing_gives_zero(n, name):
    logits = random_logits(3, n, 7).requires_grad_()
    result = LOSSES[name](logits, torch.full((n,), PAD), objective())
    assert [value.item() for value in result] == [0, 0, 0, 0]
    (gradient,) = torch.autograd.grad(result.loss, logits)
    assert (gradient == 0).all()


@pytest.mark.parametrize("divergence", CLOSED_FORMS)
@pytest.mark.parametrize(("k", "n", "v"), [(2, 1, 5), (3, 37, 101), (6, 50, 12), (8, 5, 33)])
@pytest.mark.parametrize("tokens_per_chunk", [1, 7, 1000])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("name", ["chunked", "chunked_features"])
def test_chunked_equals_reference(monkeypatch, name, k, n, v, tokens_per_chunk, divergence, apart):
    """Any number of tokens per chunk, random upstream gradients, non-contiguous passes, apart or in one tensor."""
    monkeypatch.setattr(chunked_loss, "chunk_tokens", lambda *_: tokens_per_chunk)
    monkeypatch.setattr(projected_loss, "chunk_tokens", lambda *_: tokens_per_chunk)
    monkeypatch.setitem(projected_loss.CHUNK_BYTES, "cpu", 3 * tokens_per_chunk * k * v * 8)
    target = random_target(n, v, seed=3)
    results = []
    for loss in (LOSSES["reference"], LOSSES[name]):
        leaf = random_logits(n, v, k).requires_grad_()
        logits = leaf.permute(2, 0, 1)
        result = loss(list(logits) if apart else logits, target, objective(divergence, 2.9))
        (gradient,) = torch.autograd.grad(-0.3 * result.loss, leaf)
        results.append((*(value.detach() for value in result), gradient))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("apart", [True, False])
def test_chunked_overwrites_the_logits_only_where_allowed(apart):
    target = random_target(20, 11)
    expected = None
    for overwrite in (False, True):
        leaf = random_logits(3, 20, 11).requires_grad_()
        logits = [2 * z for z in leaf] if apart else 2 * leaf
        before = torch.stack(list(logits)).detach().clone()
        loss = LOSSES["chunked"](logits, target, objective(), overwrite).loss
        loss.backward(retain_graph=True)
        after = torch.stack(list(logits)).detach()
        assert after.equal(before) != overwrite
        if overwrite:
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=0)
            torch.testing.assert_close(after, expected / 2, rtol=1e-12, atol=0)  # the gradient lies where they were
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        expected = leaf.grad.clone()


@pytest.mark.parametrize("name", ["chunked", "chunked_features"])
def test_scaled_before_rounded_to_float16(name):
    """A gradient below float16's range survives if the upstream gradient (fairseq's loss scale) lifts it into it."""
    logits = random_logits(3, 4, 2001, torch.float16).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    target = torch.tensor([5, 6, 7, 8])
    for function, z in ((LOSSES[name], logits), (LOSSES["reference"], exact)):
        (1e-7 * 2.0**20 * function(z, target, objective()).loss).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2e-3, atol=1e-7)


def test_the_gradient_of_a_float16_projection_does_not_overflow():
    """A sum over many tokens passes float16's range before the upstream gradient brings it back."""
    features = torch.ones(2, 3000, 4, dtype=torch.float16).requires_grad_()
    weight = torch.zeros(5, 4, dtype=torch.float16).requires_grad_()
    loss = BACKENDS["chunked"].from_features(features, weight, None, torch.full((3000,), 4), objective()).loss
    (1e-3 * loss).backward()
    # One gradient row per token and pass: (p - t) / K, with p = 1/5 and t = 0.9 on the target; K * N of them.
    assert weight.grad[4, 0].item() == pytest.approx(1e-3 * 3000 * (0.2 - 0.9), rel=1e-3)


def test_under_autocast_the_projection_is_in_autocasts_type():
    features, weight = random_logits(3, 6, 8, torch.float32), random_logits(1, 13, 8, torch.float32, seed=1)[0]
    target = random_target(6, 13)
    results = []
    for backend in ("reference", "chunked"):
        f, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = BACKENDS[backend].from_features(f, w, None, target, objective()).loss
        loss.backward()
        assert f.grad.dtype == w.grad.dtype == torch.float32
        results.append((loss.detach(), f.grad, w.grad))
    for plain, own in zip(*results):
        torch.testing.assert_close(own, plain, rtol=3e-2, atol=3e-2 * plain.abs().max().item())
    full = BACKENDS["reference"].from_features(features, weight, None, target, objective()).loss
    assert results[1][0].item() != full.item()  # it really was bfloat16


def test_sums_over_tokens_add_up():
    logits, target = random_logits(3, 20, 11), random_target(20, 11)
    whole = reference(logits, target, objective())
    parts = [reference(logits[:, s], target[s], objective()) for s in (slice(0, 7), slice(7, 20))]
    for value, a, b in zip(whole, *parts):
        assert value.item() == pytest.approx((a + b).item(), rel=1e-12)


def test_smoothing_is_fairseqs():
    from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

    logits, target = random_logits(3, 20, 11), random_target(20, 11)
    expected = [label_smoothed_nll_loss(torch.log_softmax(z, -1), target, 0.1, ignore_index=PAD) for z in logits]
    result = reference(logits, target, objective())
    assert result.ls_sum.item() == pytest.approx(sum(loss.item() for loss, _ in expected) / 3, rel=1e-12)
    assert result.nll_sum.item() == pytest.approx(sum(nll.item() for _, nll in expected) / 3, rel=1e-12)


def test_unknown_back_end_is_named():
    with pytest.raises(UserError, match="^--id-loss-backend is 'cuda': allowed are auto, reference, chunked, triton"):
        choose("cuda", torch.device("cpu"), 3)


def test_a_divergence_without_a_closed_form_is_for_the_reference(caplog):
    """The others would take it for another one."""
    cpu = torch.device("cpu")
    caplog.set_level("INFO", "intra_distillation_fairseq.losses.backends")
    assert [choose(name, cpu, 3, "new") for name in ("auto", "reference")] == ["reference", "reference"]
    assert caplog.messages[0] == "loss back end: reference (the divergence new has no closed form)"
    for name in ("chunked", "triton"):
        with pytest.raises(UserError, match=f"^--id-loss-backend is '{name}', but of --id-divergence 'new' there is "):
            choose(name, cpu, 3, "new")


def test_the_choice_of_the_back_end(monkeypatch, caplog):
    """auto takes triton on CUDA where it runs, else chunked; what is asked for and missing is named."""
    pytest.importorskip("triton", reason="triton is not installed")
    from intra_distillation_fairseq.losses import triton_kernels

    monkeypatch.setattr(triton_kernels, "try_out", lambda device: None)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    caplog.set_level("INFO", "intra_distillation_fairseq.losses.backends")
    cases = (("auto", cpu, 3), ("auto", cuda, 8), ("triton", cuda, 3), ("auto", cuda, 9))
    assert [choose(*case) for case in cases] == ["chunked", "triton", "triton", "chunked"]
    assert [record.getMessage() for record in caplog.records] == [
        "loss back end: chunked (chosen automatically)",
        "loss back end: triton (chosen automatically)",
        "loss back end: triton",
        "loss back end: chunked (chosen automatically; triton: it takes at most 8 passes and --id-num-passes is 9)",
    ]
    with pytest.raises(UserError, match="^--id-loss-backend is 'triton', but it needs a CUDA GPU and the model is on"):
        choose("triton", cpu, 3)
    with pytest.raises(UserError, match="but it takes at most 8 passes and --id-num-passes is 9: use auto or chunked$"):
        choose("triton", cuda, 9)

    def fails(device):
        raise RuntimeError("no C compiler\nand a long trace")

    monkeypatch.setattr(triton_kernels, "try_out", fails)
    assert choose("auto", cuda, 3) == "chunked"
    with pytest.raises(UserError, match=r"its kernels do not run on this machine \(RuntimeError: no C compiler\): use"):
        choose("triton", cuda, 3)


def test_without_triton_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it now fails
    monkeypatch.delitem(sys.modules, "intra_distillation_fairseq.losses.triton_kernels", raising=False)
    monkeypatch.delattr("intra_distillation_fairseq.losses.triton_kernels", raising=False)
    assert choose("auto", torch.device("cuda"), 3) == "chunked"
    with pytest.raises(UserError, match="but the package triton cannot be imported .*: use auto or chunked$"):
        choose("triton", torch.device("cuda"), 3)
