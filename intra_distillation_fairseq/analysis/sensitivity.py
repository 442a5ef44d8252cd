"""Measures how much each parameter contributes to the loss: I = |theta * dL/dtheta| (eq. 2 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fairseq import utils
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.data import FairseqDataset, data_utils
from torch import Tensor, nn

from intra_distillation_fairseq.analysis import balance
from intra_distillation_fairseq.errors import UserError

# absolute: the mean over batches of |theta * gradient|; gradient: |theta * mean gradient|. The paper says only that 100
# batches are used (App. B); the first is what its first author's later code does.
AVERAGES = ("absolute", "gradient")

Criterion = Callable[[nn.Module, dict[str, Any]], tuple[Tensor, Any, dict[str, Any]]]


@dataclass(frozen=True)
class Sensitivity:
    """A measurement.

    Attributes:
        values: for each parameter, by name, a tensor of its shape on its device; a shared one once, under the first of
            its names. float32 (float64 of a float64 parameter), in nats per token.
        loss: mean over the batches of the loss per target token, in nats.
        tokens: target tokens of these batches.
        batches: how many were measured.
        skipped: how many were not, their gradient not being finite.
    """

    values: dict[str, Tensor]
    loss: float
    tokens: int
    batches: int
    skipped: int

    def arrays(self) -> dict[str, np.ndarray]:
        """The values as float32 arrays."""
        return {name: value.float().cpu().numpy() for name, value in self.values.items()}

    def in_order(self) -> np.ndarray:
        """All values in one float32 array, ascending: `balance.summary` takes it.

        A GPU sorts 50 million of them sooner than numpy, if it has the memory for it.
        """
        first = next(iter(self.values.values()))
        if first.is_cuda:
            try:
                return torch.cat([value.flatten().float() for value in self.values.values()]).sort()[0].cpu().numpy()
            except torch.cuda.OutOfMemoryError:
                pass
        return balance.in_order(self.arrays())


def measure(
    model: nn.Module,
    criterion: Criterion,
    batches: Iterable[dict[str, Any]],
    *,
    seed: int = 1,
    dropout: bool = True,
    average: str = "absolute",
    normalise: bool = False,
    loss_scale: float = 1.0,
    done: Callable[[int, float], None] | None = None,
) -> Sensitivity:
    """Measure the sensitivity of every parameter, those that training would not change included.

    L is what the criterion returns, per target token. What a task adds to it while training is not part of L: of a
    switch transformer, the routers' balance loss. Experts are parameters like others.

    The gradients are taken without touching `.grad`, the random state and the modes of the modules are restored, and
    recomputation of activations is off meanwhile, so a training may be measured between two updates. Memory beyond the
    model: one gradient, one sum of float32, and the activations of one batch.

    Args:
        model: not wrapped for data-parallel training.
        criterion: fairseq's, or any function (model, sample) -> (sum of the losses, _, {"ntokens": target tokens}).
        batches: fairseq's samples, on the model's device; read one at a time.
        seed: of the dropout masks: batch i has those of seed + i, whichever batches there are besides.
        dropout: the model in training mode, as it is trained; otherwise in evaluation mode.
        average: one of AVERAGES.
        normalise: divide each batch's values by the batch's L, which gives the gradient of log L instead of L's.
        loss_scale: what a float16 model's loss is multiplied by, so that small gradients do not vanish; the products
            are float32 and divided by it again. Parameters of float16 are taken as they are, not their float32 copies.
        done: told after each batch how many are done and the batch's loss.
    Raises:
        UserError: there was no batch, or none with a finite gradient.
    """
    names, parameters = zip(*model.named_parameters())
    sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    losses, tokens, skipped = [], 0, 0
    devices = sorted({p.device.index for p in parameters if p.is_cuda})
    with _prepared(model, parameters, dropout), torch.random.fork_rng(devices), torch.enable_grad():
        for number, sample in enumerate(batches):
            torch.manual_seed(seed + number)
            loss, _, log = criterion(model, sample)
            per_token = float(loss.detach()) / log["ntokens"]
            gradients = list(torch.autograd.grad(loss * loss_scale, parameters, allow_unused=True))
            del loss  # and with it what is left of the graph
            if math.isfinite(per_token) and _all_finite(gradients):
                factor = 1 / (loss_scale * log["ntokens"] * (per_token if normalise else 1))
                _add(sums, parameters, gradients, factor, absolute=average == "absolute")
                losses.append(per_token)
                tokens += int(log["ntokens"])
            else:
                skipped += 1
            del gradients
            if done is not None:
                done(number + 1, per_token)
    if not losses:
        reason = f"of all {skipped} batches loss or gradient is not finite" if skipped else "there is no batch"
        raise UserError(f"the sensitivity cannot be measured: {reason}")
    values = {name: total.div_(len(losses)).abs_() for name, total in zip(names, sums)}
    return Sensitivity(values, sum(losses) / len(losses), tokens, len(losses), skipped)


def cross_entropy(task: Any, label_smoothing: float) -> LabelSmoothedCrossEntropyCriterion:
    """The loss that makes models comparable: the same for every method that they were trained with."""
    return LabelSmoothedCrossEntropyCriterion(task, sentence_avg=False, label_smoothing=label_smoothing)


def choose_batches(
    dataset: FairseqDataset,
    number: int,
    seed: int,
    *,
    max_tokens: int | None,
    max_sentences: int | None = None,
    multiple: int = 1,
    max_positions: Any = None,
) -> list[np.ndarray]:
    """Random batches of a data set, composed as fairseq composes them; the training's own iterator is left alone.

    Args:
        dataset: fairseq's.
        number: how many; all of them, in random order, where there are fewer.
        seed: of the choice.
        max_tokens, max_sentences, multiple: limits of a batch, as fairseq's --max-tokens, --batch-size and
            --required-batch-size-multiple.
        max_positions: longest sentences, as `task.max_positions()`; longer ones are left out.
    Returns:
        Indices of the sentences of each batch.
    Raises:
        UserError: no sentence is short enough.
    """
    with data_utils.numpy_seed(seed):
        indices = dataset.ordered_indices()
    limit = utils.resolve_max_positions(max_positions, max_tokens)
    if limit is not None:
        indices, _ = dataset.filter_indices_by_size(indices, limit)
    if len(indices) == 0:
        raise UserError(f"no sentence is short enough for batches of {max_tokens} tokens: allow more")
    batches = dataset.batch_by_size(
        indices, max_tokens=max_tokens, max_sentences=max_sentences, required_batch_size_multiple=multiple
    )
    chosen = np.random.default_rng(seed).permutation(len(batches))[:number]
    return [np.asarray(batches[place]) for place in chosen]


def collated(dataset: FairseqDataset, batches: Sequence[np.ndarray], device: torch.device) -> Iterator[dict[str, Any]]:
    """The samples of `choose_batches`, one at a time, on a device."""
    for indices in batches:
        sample = dataset.collater([dataset[int(index)] for index in indices])
        yield utils.apply_to_sample(lambda tensor: tensor.to(device), sample)


def _add(
    sums: list[Tensor],
    parameters: Sequence[Tensor],
    gradients: list[Tensor | None],
    factor: float,
    *,
    absolute: bool,
) -> None:
    """Add theta * gradient * factor of one batch; each gradient is given up as soon as it has been used."""
    for place, (total, parameter) in enumerate(zip(sums, parameters)):
        gradient, gradients[place] = gradients[place], None
        if gradient is None:  # the loss does not depend on this parameter
            continue
        product = parameter.detach().to(total.dtype) * gradient
        total.add_(product.abs_() if absolute else product, alpha=factor)


def _all_finite(gradients: Iterable[Tensor | None]) -> bool:
    return bool(torch.stack([g.isfinite().all() for g in gradients if g is not None]).all())


@contextmanager
def _prepared(model: nn.Module, parameters: Sequence[Tensor], training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    frozen = [p for p in parameters if not p.requires_grad]
    # --checkpoint-activations: its backward works for `.grad` alone. The values are the same without it.
    recomputing = [(m, m.forward) for m in model.modules() if hasattr(m, "precheckpoint_forward")]
    try:
        model.train(training)
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module, _ in recomputing:
            module.forward = module.precheckpoint_forward
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, forward in recomputing:
            module.forward = forward
