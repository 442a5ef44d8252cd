"""A training goes on from the newest whole checkpoint of its folder, and never starts again where there is one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager

from intra_distillation_fairseq import whole_checkpoints
from intra_distillation_fairseq.compat.saving import TEMPORARY_ENDING
from intra_distillation_fairseq.compat.wrapping import wrap
from intra_distillation_fairseq.whole_checkpoints import LAST

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """Attributes:
    restore_file: what to go on from, as --restore-file.
    warnings: for the log.
    error: why there is nothing to go on from, or "".
    """

    restore_file: str
    warnings: list[str]
    error: str = ""


def go_on_from_newest_whole_checkpoint() -> None:
    """P3: a checkpoint_last.pt that is not whole ends fairseq with an error, a missing one makes it start again.

    P10: one of a finished training makes it train one more update. All without --restore-file, and where all processes
    share a checkpoint, which only those with a sharded state do not.
    """

    def wrapper(load: Callable) -> Callable:
        def load_newest_whole(cfg: Any, trainer: Any, **kwargs: Any):
            if cfg.restore_file != LAST or trainer.checkpoint_suffix:
                return load(cfg, trainer, **kwargs)
            choice = _same_in_all_processes(trainer, lambda: choose(Path(cfg.save_dir)))
            for warning in choice.warnings:
                logger.warning(warning)
            if choice.error:
                raise SystemExit(f"error: {choice.error}")
            if choice.restore_file != LAST:
                cfg = copy.deepcopy(cfg)  # the trainer's own goes into every checkpoint
                cfg.restore_file = choice.restore_file
                cfg.finetune_from_model = None  # for the first start only, as fairseq has it with LAST
            loaded = load(cfg, trainer, **kwargs)
            if 0 < trainer.cfg.optimization.max_update <= trainer.get_num_updates():
                if choice.restore_file != LAST and trainer.data_parallel_rank == 0:
                    PathManager.copy(choice.restore_file, str(Path(cfg.save_dir, LAST)), overwrite=True)
                logger.info("done training in 0.0 seconds: the checkpoint has --max-update updates")
                raise SystemExit(0)
            return loaded

        return load_newest_whole

    wrap(checkpoint_utils, "load_checkpoint", wrapper)


def choose(folder: Path) -> Choice:
    """What to go on from in a run's folder. Half-written files of a kill are removed.

    A `checkpoint_last.pt` that is not whole is set aside, but only where another one takes its place: else the next
    start would find nothing and begin again.
    """
    for leftover in folder.glob(f"*.pt{TEMPORARY_ENDING}"):
        leftover.unlink()
    last = folder / LAST
    why = whole_checkpoints.damage(last) if last.exists() else "it is missing"
    if why is None:
        return Choice(LAST, [])
    found = whole_checkpoints.newest_whole(folder)
    warnings = [f"checkpoint '{path}' is not taken: {reason}" for path, reason in found.damaged.items()]
    if found.path is None:
        if not last.exists() and not found.damaged:
            return Choice(LAST, [])  # the first start
        return Choice(
            LAST,
            warnings,
            f"checkpoint '{last}' cannot be read ({why}), and there is no other whole one to go on from: put a copy in "
            "its place, or choose another --save-dir to train from the beginning",
        )
    aside = f"; set aside as '{whole_checkpoints.set_aside(last).name}'" if last.exists() else ""
    warnings.append(f"checkpoint '{last}' is not taken: {why}{aside}; going on from the newest whole one, {found.path}")
    return Choice(str(found.path), warnings)


def _same_in_all_processes(trainer: Any, decide: Callable[[], Choice]) -> Choice:
    if trainer.data_parallel_world_size == 1:
        return decide()
    chosen = tuple(_or_error(decide)) if trainer.data_parallel_rank == 0 else None
    group = trainer.data_parallel_process_group
    return Choice(*distributed_utils.broadcast_object(chosen, src_rank=0, group=group, dist_device=trainer.device))


def _or_error(decide: Callable[[], Choice]) -> Choice:
    """Where the first process fails, the others, which wait for its choice, have to be told."""
    try:
        return decide()
    except Exception as error:
        return Choice(LAST, [], f"the checkpoints of the run cannot be looked at: {error}")
