"""The Triton back end on a GPU: compiled kernels, large tensors, no waiting, the tensor's own device."""

import pytest
import torch

from intra_distillation_fairseq.losses.backends import BACKENDS
from intra_distillation_fairseq.losses.closed_form import CLOSED_FORMS
from intra_distillation_fairseq.losses.objective import Objective

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytest.importorskip("triton", reason="needs the package triton")

PAD = 1
reference, triton_loss = (BACKENDS[name].from_logits for name in ("reference", "triton"))


def objective(divergence="x", weight=5.0):
    return Objective(divergence, weight, 0.1, PAD)


def random_logits(k, n, v, dtype=torch.float64, scale=2.0, seed=0, device="cuda"):
    generator = torch.Generator(device).manual_seed(seed)
    return (scale * torch.randn(k, n, v, generator=generator, device=device, dtype=torch.float64)).to(dtype)


def random_target(n, v, device="cuda"):
    """n token ids, the second of them padding."""
    target = torch.randint(2, v, (n,), generator=torch.Generator().manual_seed(0))
    target[1:2] = PAD
    return target.to(device)


def with_gradient(loss, logits, target, objective, upstream=1.0, **options):
    leaf = logits.detach().clone().requires_grad_()
    result = loss(leaf, target, objective, **options)
    (gradient,) = torch.autograd.grad(result.loss * upstream, leaf)
    return *(value.detach() for value in result), gradient


@pytest.mark.parametrize("divergence", CLOSED_FORMS)
@pytest.mark.parametrize("v", [5, 1024, 12000, 12001])
@pytest.mark.parametrize("k", [2, 3, 4, 5, 6, 7, 8])
def test_equal_to_the_reference_in_float64(k, v, divergence):
    logits, target = random_logits(k, 17, v), random_target(17, v)
    for a, b in zip(*(with_gradient(f, logits, target, objective(divergence), -0.3) for f in (triton_loss, reference))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("divergence", CLOSED_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "v"), [(2, 262144), (3, 12000), (3, 12001), (8, 32001)])
def test_error_within_twice_that_of_plain_pytorch(k, v, dtype, divergence):
    logits, target = random_logits(k, 70, v, dtype), random_target(70, v)
    exact = with_gradient(reference, logits.double(), target, objective(divergence))
    plain = with_gradient(reference, logits, target, objective(divergence))
    found = with_gradient(triton_loss, logits, target, objective(divergence))
    for e, p, f in zip(exact[:4], plain[:4], found[:4]):
        # Two units in the last place of the sum, which plain PyTorch may hit by chance.
        assert abs(f.double() - e) <= 2 * abs(p.double() - e) + 2.4e-7 * abs(e)
    assert found[4].dtype == dtype
    errors = [(x[4].double() - exact[4]).pow(2).mean().sqrt() for x in (plain, found)]
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("divergence", CLOSED_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gap", [50.0, 100.0, 105.0, 200.0, 1000.0])
def test_finite_at_a_large_gap_of_logits(gap, dtype, divergence):
    logits = torch.zeros(3, 2, 5, dtype=dtype, device="cuda")
    logits[0, :, 0] = gap
    logits[1, :, 1] = gap
    logits[2, :, 2] = -gap
    target = torch.tensor([3, 4], device="cuda")
    *values, gradient = with_gradient(triton_loss, logits, target, objective(divergence))
    *expected, expected_gradient = with_gradient(reference, logits.double(), target, objective(divergence))
    assert [v.item() for v in values] == pytest.approx([v.item() for v in expected], rel=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_a_tiny_divergence_does_not_cancel(shift):
    constant = shift * torch.arange(3.0, dtype=torch.float64, device="cuda")[:, None, None]
    noise = random_logits(3, 1, 12001, scale=1e-3, seed=7)
    logits = (random_logits(1, 1, 12001, scale=6.0) + noise + constant).float()
    target = torch.tensor([5], device="cuda")
    exact = reference(logits.double(), target, objective()).divergence_sum.item()
    assert 1e-8 < exact < 1e-5
    assert triton_loss(logits, target, objective()).divergence_sum.item() == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("divergence", CLOSED_FORMS)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_only_padding_gives_zero(n, divergence):
    logits, target = torch.full((3, n, 7), float("nan"), device="cuda"), torch.full((n,), PAD, device="cuda")
    *values, gradient = with_gradient(triton_loss, logits, target, objective(divergence))
    assert [value.item() for value in values] == [0, 0, 0, 0]
    assert (gradient == 0).all()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("divergence", CLOSED_FORMS)
def test_passes_apart_in_float16_under_a_loss_scale(divergence, overwrite):
    """Gradients far below float16's range, lifted into it by the upstream gradient; also over the logits themselves."""
    logits, target = random_logits(3, 9, 2001, torch.float16), random_target(9, 2001)
    *_, exact = with_gradient(reference, logits.double(), target, objective(divergence), 1e-8 * 2.0**24)
    leaves = [z.clone().requires_grad_() for z in logits]
    given = [z * 1.0 for z in leaves]
    loss = triton_loss(given, target, objective(divergence), overwrite_logits=overwrite).loss
    gradients = torch.autograd.grad(loss * 1e-8 * 2.0**24, leaves, retain_graph=True)
    torch.testing.assert_close(torch.stack(gradients).double(), exact, rtol=1e-3, atol=1e-7)
    assert torch.equal(given[0], logits[0]) != overwrite
    if overwrite:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("divergence", CLOSED_FORMS)
@pytest.mark.parametrize("apart", [True, False])
def test_more_than_2_to_the_31_elements_per_pass(apart, divergence):
    k, v = 2, 32003
    n = 2**31 // v + 100
    if torch.cuda.mem_get_info()[0] < 8 * k * n * v:  # bytes: the logits and what autograd's views make of the gradient
        pytest.skip("needs 35 GB of free memory on the GPU")
    logits = torch.empty(k, n, v, dtype=torch.bfloat16, device="cuda")
    ends = [slice(0, 3), slice(n - 3, n)]
    logits.normal_(std=2.0)
    target = torch.full((n,), PAD, device="cuda")
    for rows in ends:
        target[rows] = torch.tensor([7, 8, v - 1], device="cuda")
    few, few_target = (torch.cat([x[..., s, :] for s in ends], -2) for x in (logits, target[:, None]))
    *expected, expected_gradient = with_gradient(reference, few.double(), few_target.squeeze(-1), objective(divergence))
    logits.requires_grad_()
    given = list(logits) if apart else logits
    result = triton_loss([z[:] for z in given] if apart else given[:], target, objective(divergence), True)
    assert [x.item() for x in result] == pytest.approx([x.item() for x in expected], rel=1e-5)
    (gradient,) = torch.autograd.grad(result.loss, logits)
    found = torch.cat([gradient[:, s] for s in ends], 1).double()
    torch.testing.assert_close(found, expected_gradient, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-5)
    assert (gradient[:, 3 : n - 3 : 1000] == 0).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_the_tensor():
    logits, target = random_logits(3, 9, 101, device="cuda:1"), random_target(9, 101, "cuda:1")
    with torch.cuda.device(0):
        found, expected = (with_gradient(loss, logits, target, objective()) for loss in (triton_loss, reference))
    for a, b in zip(found, expected):
        assert a.device == logits.device
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.fixture
def no_waiting():
    """Anything that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("divergence", CLOSED_FORMS)
def test_a_step_neither_waits_nor_compiles_again(divergence, request, monkeypatch):
    from intra_distillation_fairseq.losses import triton_kernels

    def step(n, weight):
        logits = torch.zeros(3, n, 1001, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        target = torch.full((n + 1,), 5, device="cuda")[1:]
        triton_loss(logits * 1.0, target, objective(divergence, weight), overwrite_logits=True).loss.backward()
        triton_kernels.loss_and_gradient_(logits.detach(), target, objective(divergence, weight), 2.0)

    step(16, 5.0)
    for kernel in (triton_kernels._statistics_kernel, triton_kernels._gradient_kernel):
        monkeypatch.setattr(kernel, "compile", None)  # what triton calls for a kernel it does not have yet
    request.getfixturevalue("no_waiting")
    for n, weight in ((16, 0.0), (17, 1.0), (1, 4.9)):
        step(n, weight)


@pytest.mark.parametrize("divergence", CLOSED_FORMS)
def test_memory_and_repeatability(divergence):
    """Over the logits: a few numbers per token beside them. The same bits in every run."""
    logits, target = random_logits(3, 512, 12001, torch.bfloat16), random_target(512, 12001)
    with_gradient(triton_loss, logits[:, :2], target[:2], objective(divergence))  # compiles
    gradients = []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        given = leaf[:]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = triton_loss(given, target, objective(divergence), overwrite_logits=True).loss
        gradients += torch.autograd.grad(loss, given)
        assert torch.cuda.max_memory_allocated() - before < 0.01 * logits.nbytes
    assert torch.equal(*gradients)
