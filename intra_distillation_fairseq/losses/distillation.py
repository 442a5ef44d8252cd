"""KL(teacher || student) of output distributions, in blocks of tokens with the gradient in closed form. Torch only.

The second term of the paper's eq. 3 (self-distillation), at temperature 1. Automatic differentiation of the definition
keeps four tensors of the size of the logits alive; here forward keeps nothing but the logits, which exist anyway, and
backward allocates the gradient alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from intra_distillation_fairseq.losses.chunked import chunk_tokens
from intra_distillation_fairseq.losses.divergence import log_probabilities, working_type


def _blocks(student: Tensor, teacher: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, log p_s, log p_t), each (n, V) in the working type of both, block by block."""
    tokens, vocabulary = student.shape
    step = chunk_tokens(2, vocabulary, student.device)
    working = working_type(torch.promote_types(student.dtype, teacher.dtype))
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        yield rows, log_probabilities(student[rows].to(working)), log_probabilities(teacher[rows].to(working))


class _DistillationKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, keep):
        per_token = student.new_zeros(student.size(0), dtype=working_type(student.dtype))
        for rows, student_lprobs, teacher_lprobs in _blocks(student, teacher):
            per_token[rows] = (teacher_lprobs.exp() * (teacher_lprobs - student_lprobs)).sum(-1)
        ctx.save_for_backward(student, teacher, keep)
        return per_token.masked_fill_(~keep, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        student, teacher, keep = ctx.saved_tensors
        gradient = torch.empty_like(student)
        for rows, student_lprobs, teacher_lprobs in _blocks(student, teacher):
            difference = student_lprobs.exp_().sub_(teacher_lprobs.exp_())
            # The upstream gradient (fairseq's loss scale, say) multiplies before the values are rounded to the logits'
            # type: scaled after it, float16 would have lost the small ones.
            gradient[rows] = difference.mul_(upstream).masked_fill_(~keep[rows, None], 0.0)
        return gradient, None, None


def distillation_kl(student_logits: Tensor, teacher_logits: Tensor, keep: Tensor) -> Tensor:
    """Sum over tokens of KL(p_t || p_s) = sum_v p_t (log p_t - log p_s); the second term of the paper's eq. 3.

    The gradient with respect to the student's logits is p_s - p_t per token; the teacher gets none, whatever computed
    its logits. Computed in float32 for any floating type of the logits, in float64 if given that.

    Args:
        student_logits: (N, V). They are needed again in backward: nobody may overwrite them before.
        teacher_logits: (N, V), on the same device, of the same or another type.
        keep: (N,) booleans; a token with False counts nowhere and receives no gradient.

    Returns:
        A scalar in nats; 0 where no token is kept.
    """
    return _DistillationKL.apply(student_logits, teacher_logits.detach(), keep)
