"""A checkpoint of which parameters can be set to zero, and the sensitivities that belong to it. Needs torch."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from intra_distillation_fairseq import checkpoints
from intra_distillation_fairseq.analysis.pruning import Ranking, prunable_parameters, pruned
from intra_distillation_fairseq.analysis.run_files import read_record
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.export import for_plain_fairseq
from intra_distillation_fairseq.files import fingerprint, unchanged


class PrunableModel:
    """A checkpoint of which parameters can be set to zero.

    Args:
        checkpoint: the file.
        model: the same model, opened; only its modules are looked at.
    Attributes:
        sha256: of the file.
    Raises:
        UserError: the file is no checkpoint, names its parameters otherwise than the model, or was exchanged just now.
    """

    def __init__(self, checkpoint: Path, model: nn.Module):
        known = fingerprint(checkpoint)
        self.checkpoint, self.sha256 = checkpoint, known["sha256"]
        state = checkpoints.load(checkpoint)
        self._names = prunable_parameters(model)
        if missing := [name for name in self._names if name not in state["model"]]:
            raise UserError(
                f"'{checkpoint}' has no '{missing[0]}': it is of a fairseq that named parameters otherwise; train or "
                "save it again"
            )
        # The optimizer's state belongs to parameters that are not pruned. Copied: the file may be exchanged meanwhile.
        self._rest = {key: value for key, value in state.items() if key not in ("model", "last_optimizer_state")}
        self._state = {name: value.clone() for name, value in state["model"].items()}
        for name, aliases in self._names.items():
            self._state.update({alias: self._state[name] for alias in aliases if alias in self._state})
        if not unchanged(checkpoint, known):
            raise UserError(f"'{checkpoint}' was replaced while it was read, by a training that goes on: try again")

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that compete, each once."""
        return {name: self._state[name] for name in self._names}

    def __len__(self) -> int:
        return sum(value.numel() for value in self.parameters.values())

    def ranking(self, order: str, sensitivity: Mapping[str, Tensor], seed: int) -> Ranking:
        """All entries of the parameters that compete, those to be pruned first at the front.

        Args:
            order: sensitivity or magnitude, lowest first, or random.
            sensitivity: as `read_sensitivity` gives it.
            seed: of the random order.
        """
        if order == "random":
            return Ranking.at_random({name: value.shape for name, value in self.parameters.items()}, seed)
        if order == "magnitude":
            return Ranking.by_score({name: value.abs() for name, value in self.parameters.items()})
        return Ranking.by_score(sensitivity)

    def write(self, masks: Mapping[str, Tensor] | None, output: Path) -> None:
        """Write a fairseq checkpoint with the masked entries set to zero; None: with all as they are."""
        state = pruned(self._state, self._names, masks) if masks else self._state
        checkpoints.write(for_plain_fairseq({**self._rest, "model": state}), output)


def read_sensitivity(path: Path, model: PrunableModel) -> dict[str, Tensor]:
    """The sensitivities of the prunable parameters.

    Args:
        path: npz file with an array for each parameter; the JSON file beside it tells which checkpoint was measured.
        model: of which parameters.
    Raises:
        UserError: not such a file, one of another model or checkpoint, or one without its JSON file.
    """
    name = model.checkpoint.name
    chosen = {"checkpoint_best.pt": "", "checkpoint_last.pt": " --checkpoint last"}.get(name, f" --checkpoint {name}")
    how = f"make one with  intra-distillation sensitivity RUN_DIR{chosen}"
    if not path.is_file():
        raise UserError(f"sensitivity file '{path}' does not exist: {how}, or name one with --sensitivity")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            scores = {name: torch.from_numpy(arrays[name]) for name in model.parameters if name in arrays}
    except (ValueError, TypeError, OSError, EOFError, AttributeError, zipfile.BadZipFile):
        raise UserError(f"'{path}' is not a sensitivity file (npz with an array per parameter): {how}") from None
    _check_measured(path, model)
    for name, parameter in model.parameters.items():
        if name not in scores:
            raise UserError(f"'{path}' is of another model: it has no '{name}'; {how}")
        if scores[name].shape != parameter.shape:
            raise UserError(
                f"'{path}' is of another model: '{name}' has the shape {tuple(scores[name].shape)} there and "
                f"{tuple(parameter.shape)} in '{model.checkpoint}'; {how}"
            )
        if scores[name].isnan().any():
            raise UserError(f"'{path}' has values in '{name}' that are not numbers: measure again")
    return {name: scores[name] for name in model.parameters}


def _check_measured(path: Path, model: PrunableModel) -> None:
    """Without the record nobody knows which checkpoint was measured: that of another epoch has the same shapes."""
    record_file = path.with_suffix(".json")
    if not record_file.is_file():
        raise UserError(
            f"'{record_file}' is missing beside '{path}' and tells which checkpoint was measured: measure again, or "
            "copy both files"
        )
    record = read_record(record_file)
    sha256 = record["checkpoint_sha256"]
    if sha256 != model.sha256:
        raise UserError(
            f"'{path}' was measured on another checkpoint ({record['checkpoint']}, sha256 {str(sha256)[:12]}) than "
            f"'{model.checkpoint}' (sha256 {model.sha256[:12]}): measure this one first"
        )
