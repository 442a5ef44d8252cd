"""What fairseq needs on today's Python and PyTorch, in one place.

Each function is one mend for which fairseq has no extension point. P1, P3, ... are the entries of docs/fairseq.md,
which says for all of them what goes wrong and where it is mended; each has a test that fails without it.
"""

from intra_distillation_fairseq.compat.batches import keep_last_batch
from intra_distillation_fairseq.compat.checkpoints import (
    allow_fairseq_checkpoints,
    copy_checkpoints_atomically,
    explain_refused_checkpoints,
)
from intra_distillation_fairseq.compat.precision import let_bf16_mean_bf16
from intra_distillation_fairseq.compat.processes import let_ddp_run_on_cpu, refuse_launches_that_do_not_train


def install() -> None:
    """Put every mend in place, once."""
    allow_fairseq_checkpoints()
    explain_refused_checkpoints()
    keep_last_batch()
    copy_checkpoints_atomically()
    let_bf16_mean_bf16()
    let_ddp_run_on_cpu()
    refuse_launches_that_do_not_train()
