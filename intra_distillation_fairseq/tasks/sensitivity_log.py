"""Measures sensitivity every N updates of a training (Figure 2 of the paper) and changes nothing about the training."""

# No `from __future__ import annotations` here: fairseq reads the types of a configuration's fields when it is imported.
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from fairseq import utils
from fairseq.dataclass import FairseqDataclass
from fairseq.distributed import utils as distributed_utils
from omegaconf import II
from torch import nn

from intra_distillation_fairseq.analysis import balance, sensitivity
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.files import write_text
from intra_distillation_fairseq.passes import unwrapped

logger = logging.getLogger(__name__)

FILE = "sensitivity.jsonl"


@dataclass
class SensitivityLogConfig(FairseqDataclass):
    """Flags of the measurement, and what it has to know of the training."""

    sensitivity_interval: int = field(
        default=0,
        metadata={"help": "measure |theta * dL/dtheta| of every parameter after every N updates; 0: never"},
    )
    sensitivity_batches: int = field(
        default=10, metadata={"help": "random training batches to measure over, always the same ones; at least 1"}
    )
    sensitivity_seed: int = field(
        default=1, metadata={"help": "chooses these batches and their dropout masks; has no part in the training"}
    )
    save_dir: str = II("checkpoint.save_dir")
    max_tokens: Optional[int] = II("dataset.max_tokens")
    batch_size: Optional[int] = II("dataset.batch_size")
    required_batch_size_multiple: int = II("dataset.required_batch_size_multiple")
    ddp_backend: str = II("distributed_training.ddp_backend")


class SensitivityLogMixin:
    """Put before any fairseq task class whose configuration has the fields of `SensitivityLogConfig`.

    After every N-th update one line of <save-dir>/sensitivity.jsonl is written: "update", "loss", "summary" and
    "layers" as `analysis/balance.py` makes them, "settings" and "seconds". A training that is resumed replaces the
    lines of the updates it makes again, so that the file equals that of a training that never stopped. Of several
    processes the first one measures. The loss is the plain cross-entropy under every criterion.
    """

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any):
        super().__init__(cfg, *args, **kwargs)
        self._measured_batches: Optional[list] = None
        self._label_smoothing = 0.0
        interval, batches = getattr(cfg, "sensitivity_interval", 0), getattr(cfg, "sensitivity_batches", 1)
        if interval < 0:
            raise SystemExit(
                f"error: --sensitivity-interval is {interval}: allowed is a number of updates, or 0 for no measurement"
            )
        if batches < 1:
            raise SystemExit(f"error: --sensitivity-batches is {batches}: allowed is at least 1")
        seed = getattr(cfg, "sensitivity_seed", 0)
        if not 0 <= seed < 2**32:
            raise SystemExit(f"error: --sensitivity-seed is {seed}: allowed is 0 to {2**32 - 1}")
        if interval and cfg.ddp_backend == "fully_sharded":
            raise SystemExit(
                "error: --sensitivity-interval does not work with --ddp-backend fully_sharded, where no process has "
                "whole parameters: measure the checkpoints after the training, with intra-distillation sensitivity"
            )

    def build_criterion(self, cfg: Any, *args: Any, **kwargs: Any):
        self._label_smoothing = getattr(cfg, "label_smoothing", 0.0)
        return super().build_criterion(cfg, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, model: nn.Module, update_num: int) -> None:
        """Called once for each update, however many batches it has, and not after an overflow in float16."""
        super().optimizer_step(optimizer, model, update_num)
        interval = getattr(self.cfg, "sensitivity_interval", 0)
        if not interval or distributed_utils.get_global_rank() != 0:
            return
        path = Path(self.cfg.save_dir) / FILE
        if self._measured_batches is None:  # the first update since the training was started or resumed
            self._measured_batches = self._choose(unwrapped(model))
            _rewrite(path, up_to=update_num)
        if (update_num + 1) % interval == 0:
            line = self._measure(optimizer, unwrapped(model), update_num + 1)
            if line is not None:
                _rewrite(path, up_to=update_num, add=line)

    def _choose(self, model: nn.Module) -> list:
        if self.cfg.train_subset not in self.datasets:
            raise SystemExit(
                f"error: --sensitivity-interval needs the training data, but the task has no data set "
                f"'{self.cfg.train_subset}': train with it loaded, or without this flag"
            )
        try:
            return sensitivity.choose_batches(
                self.datasets[self.cfg.train_subset],
                self.cfg.sensitivity_batches,
                self.cfg.sensitivity_seed,
                max_tokens=self.cfg.max_tokens,
                max_sentences=self.cfg.batch_size,
                multiple=self.cfg.required_batch_size_multiple,
                max_positions=utils.resolve_max_positions(self.max_positions(), model.max_positions()),
            )
        except UserError as error:
            raise SystemExit(f"error: --sensitivity-interval: {error}") from error

    def _measure(self, optimizer: Any, model: nn.Module, update: int) -> Optional[dict[str, Any]]:
        started = time.monotonic()
        dataset = self.datasets[self.cfg.train_subset]
        device = next(model.parameters()).device
        try:
            measured = sensitivity.measure(
                model,
                sensitivity.cross_entropy(self, self._label_smoothing),
                sensitivity.collated(dataset, self._measured_batches, device),
                seed=self.cfg.sensitivity_seed,
                # Of an optimiser for float16. That of bfloat16 has no scaler; with --amp parameters are float32.
                loss_scale=getattr(getattr(optimizer, "scaler", None), "loss_scale", 1.0),
            )
        except UserError as error:
            logger.warning("update %d: %s", update, error)
            return None
        (layers,) = balance.groups(measured.arrays(), balance.layer_name)
        line = {
            "update": update,
            "loss": measured.loss,
            "summary": balance.summary(measured.in_order()),
            "layers": layers,
            "settings": {
                "split": str(self.cfg.train_subset),
                "batches": measured.batches,
                "tokens": measured.tokens,
                "seed": self.cfg.sensitivity_seed,
                "dropout": True,
                "average": "absolute",
                "objective": "cross_entropy",
                "normalised": False,
            },
            "skipped_batches": measured.skipped,
            "seconds": round(time.monotonic() - started, 2),
        }
        numbers = line["summary"]
        logger.info(
            "sensitivity after update %d: top 20%% %.3g, rest %.3g, std %.3g, Gini %.4f, %.1f s",
            *(update, numbers["top_mean"], numbers["rest_mean"], numbers["std"], numbers["gini"], line["seconds"]),
        )
        return line


def _rewrite(path: Path, up_to: int, add: Optional[dict[str, Any]] = None) -> None:
    """Keep the whole lines of updates up to one, add one: what a resumed training makes again is not there twice."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [line for line in old.split("\n") if _update_of(line) is not None and _update_of(line) <= up_to]
    lines += [json.dumps(add)] if add is not None else []
    text = "".join(f"{line}\n" for line in lines)
    if text != old:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def _update_of(line: str) -> Optional[int]:
    try:
        return json.loads(line)["update"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
