"""A trained model that a student learns from: loaded, checked against the student's dictionaries, frozen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, models
from fairseq.data import Dictionary, data_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import FairseqEncoderDecoderModel
from fairseq.tasks import FairseqTask
from omegaconf import DictConfig
from torch import Tensor, nn

from intra_distillation_fairseq import checkpoints
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.experiments.prepared import open_prepared
from intra_distillation_fairseq.experiments.runs import RunFolder

logger = logging.getLogger(__name__)


class Teacher:
    """A frozen model in evaluation mode.

    Not an nn.Module, so that a criterion that holds one does not own its parameters: fairseq's trainer optimises, saves
    and wraps for data parallelism whatever is registered in the criterion, and train() would switch its dropout on.

    Args:
        checkpoint: any fairseq encoder-decoder with the student's dictionaries, of whatever size.
        task: the student's task.
    Raises:
        UserError: the file is missing, damaged or no such model, or its dictionaries are others.
    """

    def __init__(self, checkpoint: Path, task: FairseqTask):
        try:
            state, config = _read(checkpoint)
            _check_dictionaries(checkpoint, config.task, task)
            self.model = _build(checkpoint, state["model"], config.model, task).eval().requires_grad_(False)
        except UserError:
            raise
        except Exception as error:  # fairseq raises many kinds for a configuration that it did not write
            raise UserError(
                f"--teacher '{checkpoint}' cannot be opened ({checkpoints.cause(error)}): is it made by fairseq?"
            ) from error

    def logits(self, net_input: Mapping[str, Any], student: nn.Module) -> Tensor:
        """What the teacher says about a batch, given the reference's beginning as the student is. No gradient.

        Args:
            net_input: src_tokens (B, S), src_lengths (B,), prev_output_tokens (B, T).
            student: on whose device, and in whose floating type (half, say), the teacher computes.
        Returns:
            (B, T, V).
        """
        place = next(student.parameters())
        self.model.to(device=place.device, dtype=place.dtype)  # does nothing but the first time
        with torch.no_grad():  # not inference_mode: its tensors cannot be kept for the student's backward
            return self.model(**net_input)[0]


def _read(path: Path) -> tuple[dict[str, Any], DictConfig]:
    """The checkpoint and fairseq's configuration of its training."""
    if path.is_dir():
        raise UserError(f"--teacher '{path}' is a folder: give a checkpoint in it, as in {path / 'checkpoint_best.pt'}")
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(str(path))  # vetted, as compat has it
    except UserError as error:
        raise UserError(f"--teacher: {error}") from None
    config = convert_namespace_to_omegaconf(state["args"]) if state.get("args") else state.get("cfg")
    if not config:
        raise UserError(f"--teacher '{path}' has no configuration, neither 'cfg' nor 'args': take one saved by fairseq")
    return state, config


def _build(path: Path, parameters: dict[str, Tensor], config: DictConfig, task: FairseqTask) -> nn.Module:
    name = getattr(config, "_name", None) or getattr(config, "arch", None)
    if name not in models.ARCH_MODEL_REGISTRY and name not in models.MODEL_REGISTRY:
        raise UserError(f"--teacher '{path}' is a '{name}', an architecture that neither fairseq nor this plugin has")
    try:
        # Not task.build_model: under --eval-bleu the student's task would from then on translate with the teacher. The
        # random numbers of the initialisation are given back, so that the student's do not depend on the teacher.
        with torch.random.fork_rng(devices=[]):
            model = models.build_model(config, task, from_checkpoint=True)
        model.load_state_dict(parameters, model_cfg=config)
    except (AssertionError, RuntimeError) as error:  # as where parameters have other names or shapes
        reason = " ".join(str(error).split())
        ours = f"{len(task.source_dictionary)} and {len(task.target_dictionary)} types"
        raise UserError(
            f"--teacher '{path}' cannot be built over the dictionaries of this training ({ours}): {reason[:300]}; give "
            "a model that was trained with these dictionaries"
        ) from None
    if not isinstance(model, FairseqEncoderDecoderModel):
        raise UserError(f"--teacher '{path}' is a {type(model).__name__}: needed is an encoder-decoder model")
    if getattr(model.decoder, "adaptive_softmax", None) is not None:
        raise UserError(
            f"--teacher '{path}' has an adaptive softmax, which gives no distribution over the whole vocabulary: train "
            "one without it"
        )
    return model


def _check_dictionaries(path: Path, teacher: DictConfig, task: FairseqTask) -> None:
    """A teacher's distribution means nothing to a student that numbers its types in another way.

    Compared are the dictionaries that the teacher was trained with: those in its data folder, or else their checksum in
    its run folder. Where neither is left, only the numbers of types can be, as the parameters are loaded.
    """
    theirs, ours = Path(_first(teacher.data)), Path(_first(task.cfg.data))
    record = _record(path)
    known = record["dictionary_digest"] if record else None
    same = None
    if theirs.is_dir() and (known is None or _digest(theirs) in (None, known)):  # else it was prepared again since
        languages = teacher.source_lang, teacher.target_lang
        if None in languages:  # fairseq found them in the names of the files
            languages = data_utils.infer_language_pair(str(theirs))
        files = [theirs / f"dict.{language}.txt" for language in languages]
        if all(file.is_file() for file in files):
            dictionaries = (task.source_dictionary, task.target_dictionary)
            same = all(Dictionary.load(str(file)) == mine for file, mine in zip(files, dictionaries))
    if same is None and known and (digest := _digest(ours)):
        same = known == digest
    if same is None:
        logger.warning(
            "the dictionaries of the teacher '%s' are not in '%s' any more, and no run.json beside it tells their "
            "checksum: only their sizes are compared with those of '%s'",
            path,
            theirs,
            ours,
        )
    elif not same:
        raise UserError(
            f"--teacher '{path}' was trained with other dictionaries (those of '{theirs}') than this training has "
            f"(those of '{ours}'): train the student on the teacher's data, or give a teacher trained on this one"
        )


def _first(data: str) -> str:
    """Of fairseq's several folders of binarised data, the one with the dictionaries."""
    return str(data).split(":")[0]


def _record(checkpoint: Path) -> dict[str, Any] | None:
    try:
        return RunFolder(checkpoint.parent).read()
    except UserError:  # not one of ours
        return None


def _digest(binarised: Path) -> str | None:
    """The checksum of its dictionaries, if it is the bin/ of a prepared data folder."""
    try:
        return open_prepared(binarised.parent, ()).dictionary_digest
    except UserError:
        return None
