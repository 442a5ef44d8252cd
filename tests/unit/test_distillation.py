"""KL(teacher || student): hand numbers, automatic differentiation, precisions, padding, memory."""

from __future__ import annotations

import math

import pytest
import torch

from intra_distillation_fairseq.losses.distillation import distillation_kl


def definition(student, teacher, keep):
    """Eq. 3's second term as it is written, under autograd."""
    log_s, log_t = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    return (log_t.exp() * (log_t - log_s)).sum(-1)[keep].sum()


def draw(tokens=23, vocabulary=31, dtype=torch.float64, scale=3.0):
    torch.manual_seed(0)
    student, teacher = (torch.randn(tokens, vocabulary, dtype=torch.float64) * scale for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.arange(tokens) % 4 != 0


def test_hand_numbers():
    """p_t = (3/4, 1/4), p_s = (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2; gradient p_s - p_t = (-1/4, 1/4)."""
    student = torch.tensor([[1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    loss = distillation_kl(student, teacher, torch.tensor([True]))
    loss.backward()
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12)
    torch.testing.assert_close(student.grad, torch.tensor([[-0.25, 0.25]], dtype=torch.float64))


@pytest.fixture(params=[None, 1, 5])
def block(request, monkeypatch):
    """Tokens per block: as usual (all of a small case), one, and a number that does not divide 23."""
    if request.param:
        monkeypatch.setattr(
            "intra_distillation_fairseq.losses.distillation.chunk_tokens", lambda *args: request.param
        )  # fmt: skip


def test_equals_automatic_differentiation_in_blocks_of_any_size(block):
    student, teacher, keep = draw()
    gradients, losses = [], []
    for loss in (definition, distillation_kl):
        leaf = student.clone().requires_grad_()
        losses.append(loss(leaf, teacher, keep))
        (-2.5 * losses[-1]).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-14)
    assert gradients[1][~keep].eq(0).all()


def test_gradcheck():
    student, teacher, keep = draw(5, 7)
    assert torch.autograd.gradcheck(lambda z: 3 * distillation_kl(z, teacher, keep), student.requires_grad_())


def test_the_teacher_gets_no_gradient_and_nothing_is_overwritten():
    student, teacher, keep = (tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in draw())
    before = student.detach().clone(), teacher.detach().clone()
    distillation_kl(student, teacher, keep).backward()
    assert teacher.grad is None
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@pytest.mark.parametrize("teacher_type", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_short_types_are_computed_in_float32(dtype, teacher_type):
    """Only the given logits, and the gradient that goes back, are rounded; the upstream gradient comes before that."""
    student, teacher, keep = draw(dtype=dtype)
    teacher = teacher.to(teacher_type)
    exact = student.double().requires_grad_()
    expected = definition(exact, teacher.double(), keep)
    (expected * 256).backward()
    student.requires_grad_()
    loss = distillation_kl(student, teacher, keep)
    assert loss.dtype == torch.float32
    (loss * 256).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert student.grad.dtype == dtype
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=tolerance, atol=1e-5)


def test_small_gradients_survive_in_float16():
    """p_s - p_t below float16's smallest number counts when the loss scale lifts it; rounded first, it would be 0."""
    student = torch.zeros(1, 4, dtype=torch.float16).requires_grad_()
    teacher = torch.tensor([[1e-8, 0.0, 0.0, 0.0]], dtype=torch.float64)
    (distillation_kl(student, teacher, torch.tensor([True])) * 2.0**20).backward()
    assert student.grad[0, 0].item() == pytest.approx(-0.25 * 0.75e-8 * 2**20, rel=0.01)


@pytest.mark.parametrize("largest", [60000.0, 1e30])
def test_extreme_logits_stay_finite(largest):
    dtype = torch.float16 if largest < 65504 else torch.float32
    student = torch.tensor([[largest, -largest, 0.0], [-largest, largest, 0.0]], dtype=dtype).requires_grad_()
    teacher = torch.tensor([[-largest, largest, 0.0], [-largest, largest, 0.0]], dtype=dtype)
    loss = distillation_kl(student, teacher, torch.tensor([True, True]))
    loss.backward()
    assert loss.item() == pytest.approx(2 * largest, rel=1e-3)
    assert student.grad.tolist() == [[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]


def test_nothing_kept_and_nothing_there_give_zero():
    student, teacher, keep = draw()
    student[0] = math.nan  # padding may hold anything
    student.requires_grad_()
    for rows in (slice(None), slice(0, 0)):
        loss = distillation_kl(student[rows], teacher[rows], torch.zeros_like(keep)[rows])
        assert loss.item() == 0.0
        loss.backward()
        assert student.grad.eq(0).all()


def test_equal_distributions_give_zero():
    student, _, keep = draw(dtype=torch.float32)
    assert distillation_kl(student, student, keep).item() == 0.0
