"""Gives each of several processes dropout masks of its own."""

from __future__ import annotations

import torch
from fairseq.distributed import utils as distributed_utils


class RankMasksMixin:
    """Put before any fairseq task class to let the processes of a data-parallel training drop different units.

    fairseq seeds the random numbers of every process alike, by the seed and the update number: the processes would drop
    the same units of their different batches, and the masks of a batch would not be independent of each other's, as
    they are with --update-freq on one process. Here process r goes on from the r-th number that it draws at each batch.
    Process 0, and a training on one, draw as fairseq does; everything still follows from seed, update and process
    alone, so a training that is resumed draws the same again. LayerDrop draws from the same numbers.
    """

    def train_step(self, *args, **kwargs):
        if rank := distributed_utils.get_global_rank():
            # Drawn on the CPU, whose numbers are alike in all processes until then; seeds every GPU as well.
            torch.manual_seed(torch.randint(2**63 - 1, (rank,))[-1].item())
        return super().train_step(*args, **kwargs)
