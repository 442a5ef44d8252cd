"""Registers everything with fairseq; importing it twice does no harm."""

from intra_distillation_fairseq import compat

compat.install()

from intra_distillation_fairseq.criterions import intra_distillation, self_distillation, self_teaching  # noqa: E402, F401
from intra_distillation_fairseq.models import architectures, switch_transformer  # noqa: E402, F401
from intra_distillation_fairseq.optim import sage_adam  # noqa: E402, F401
from intra_distillation_fairseq.tasks import translation_intra_distillation  # noqa: E402, F401
