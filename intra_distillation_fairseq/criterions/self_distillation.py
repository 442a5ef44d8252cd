"""`--criterion self_distillation`: cross-entropy + KL to the distribution of a trained model (paper, sec. 2, eq. 3)."""

# No `from __future__ import annotations` here: fairseq reads the types of a configuration's fields when it is imported.
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from fairseq.criterions import register_criterion
from torch import Tensor

from intra_distillation_fairseq import passes
from intra_distillation_fairseq.criterions.intra_distillation import (
    IntraDistillationCriterion,
    IntraDistillationCriterionConfig,
)
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.losses.distillation import distillation_kl
from intra_distillation_fairseq.teacher import Teacher


@dataclass
class SelfDistillationCriterionConfig(IntraDistillationCriterionConfig):
    """All flags of intra_distillation, and the teacher."""

    teacher: Optional[str] = field(
        default=None,
        metadata={
            "help": "checkpoint of the trained model to learn from: any encoder-decoder with the same dictionaries"
        },
    )
    id_num_passes: int = field(
        default=1,
        metadata={
            "help": "K: how often the student runs on each batch; 1: plain self-distillation; from 2 on the divergence "
            "between the passes counts as in intra_distillation"
        },
    )


@register_criterion("self_distillation", dataclass=SelfDistillationCriterionConfig)
class SelfDistillationCriterion(IntraDistillationCriterion):
    """Label-smoothed cross-entropy + KL(p_t || p_s), 1:1, at temperature 1.

    With K passes of the student: cross-entropy and KL are means over the passes, and alpha' times the divergence
    between the passes is added. With one there is no divergence, and the --id flags of it have no say.

    Two losses read the student's logits, so these exist as a whole (--id-loss-input features is refused) and the first
    loss's gradient does not take their memory. The teacher runs once per batch, and is no part of this module: it is
    neither trained nor saved with the student, so a training resumes with the file it began with.
    """

    name = "self_distillation"
    fewest_passes = 1
    why_logits = "the divergence from the teacher needs the logits"
    logged_terms = {**IntraDistillationCriterion.logged_terms, "kd_loss": 3}

    @classmethod
    def build_criterion(cls, cfg, task):
        """As of intra_distillation, with the teacher; a wrong one ends the program with one line before it trains."""
        criterion = super().build_criterion(cfg, task)
        try:
            if not cfg.teacher:
                raise UserError("--teacher is missing: self_distillation needs the checkpoint of a trained model")
            criterion.teacher = Teacher(Path(cfg.teacher), task)
        except UserError as error:
            raise SystemExit(f"error: {error}") from error
        return criterion

    def further_terms(self, model, sample, logits, target) -> dict[str, Tensor]:
        """kd_loss: KL(p_t || p_s), mean over the passes."""
        taught = self.teacher.logits(sample["net_input"], model)  # B x T x V
        (taught,) = passes.flatten_tokens([taught], skip=self.ignore_prefix_size)  # N x V
        keep = target.ne(self.padding_idx)
        return {"kd_loss": sum(distillation_kl(z, taught, keep) for z in logits) / self.num_passes}
