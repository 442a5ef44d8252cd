"""What fairseq needs on today's Python and PyTorch, in one place.

Each function is one mend for which fairseq has no extension point. P1, P3, ... are the entries of docs/fairseq.md,
which says for all of them what goes wrong and where it is mended; each has a test that fails without it.
"""

from intra_distillation_fairseq.compat.batches import count_batches_beside_an_empty_one, keep_last_batch
from intra_distillation_fairseq.compat.boards import start_wandb_once
from intra_distillation_fairseq.compat.checkpoints import (
    allow_fairseq_checkpoints,
    refuse_strangers_checkpoints,
)
from intra_distillation_fairseq.compat.master_weights import keep_count_of_loss_scale, keep_master_weights
from intra_distillation_fairseq.compat.messages import end_with_one_line
from intra_distillation_fairseq.compat.overflow import let_updates_be_skipped
from intra_distillation_fairseq.compat.precision import let_bf16_mean_bf16
from intra_distillation_fairseq.compat.processes import let_ddp_run_on_cpu, refuse_launches_that_do_not_train
from intra_distillation_fairseq.compat.restoring import go_on_from_newest_whole_checkpoint
from intra_distillation_fairseq.compat.saving import (
    copy_checkpoints_atomically,
    let_no_bad_validation_be_best,
    write_checkpoints_whole,
)
from intra_distillation_fairseq.compat.stopping import end_prefetching_at_exit, pass_signals_on, stop_when_asked


def install() -> None:
    """Put every mend in place, once."""
    allow_fairseq_checkpoints()
    refuse_strangers_checkpoints()
    end_with_one_line()
    keep_last_batch()
    let_updates_be_skipped()  # the first around Trainer.train_step
    count_batches_beside_an_empty_one()
    write_checkpoints_whole()
    copy_checkpoints_atomically()
    let_no_bad_validation_be_best()
    keep_master_weights()
    keep_count_of_loss_scale()
    go_on_from_newest_whole_checkpoint()
    stop_when_asked()
    pass_signals_on()
    end_prefetching_at_exit()
    let_bf16_mean_bf16()
    let_ddp_run_on_cpu()
    refuse_launches_that_do_not_train()
    start_wandb_once()
