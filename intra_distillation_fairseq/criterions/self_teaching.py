"""`--criterion self_teaching`: cross-entropy + KL between the model and itself cut to its first layers."""

# No `from __future__ import annotations` here: fairseq reads the types of a configuration's fields when it is imported.
import contextlib
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.losses.distillation import distillation_kl
from intra_distillation_fairseq.models.depth import cut_in_place, depth, first_layers
from intra_distillation_fairseq.passes import unwrapped


@dataclass
class SelfTeachingCriterionConfig(LabelSmoothedCrossEntropyCriterionConfig):
    """Flags of the criterion."""

    student_layers: str = field(
        default="",
        metadata={
            "help": "n: the model's first n encoder and n decoder layers are the student of the whole model; several, "
            "as in 6,5,4,3: stages of equal numbers of updates of --max-update, each one the teacher of the next"
        },
    )
    self_teaching_alpha: float = field(
        default=1.0,
        metadata={"help": "weight of KL(teacher || student) beside the teacher's cross-entropy, at least 0"},
    )
    max_update: int = II("optimization.max_update")  # of the stages: no second flag that could disagree


class Stage(NamedTuple):
    """Who teaches whom, in layers a side; teacher None: the whole model."""

    teacher: Optional[int]
    student: int


def parse_student_layers(text: str) -> list[int]:
    """Value of --student-layers as numbers.

    Raises:
        UserError: not whole numbers from 1 that get smaller.
    """
    parts = [part.strip() for part in str(text).split(",")]
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit()]
    falling = all(above > below for above, below in zip(numbers, numbers[1:]))
    if len(numbers) != len(parts) or not falling or numbers[-1] < 1:
        raise UserError(
            f"--student-layers is '{text}': allowed is a number of layers from 1, or several that get smaller, as in "
            "6,5,4,3"
        )
    return numbers


def stages_of(numbers: list[int], encoder_layers: int, decoder_layers: int) -> list[Stage]:
    """The stages that --student-layers means for a model; its full depth may be left out or come first.

    Raises:
        UserError: a number is larger than the model, or no student is left.
    """
    shown, whole = ",".join(map(str, numbers)), min(encoder_layers, decoder_layers)
    model = f"the model has {encoder_layers} encoder and {decoder_layers} decoder layers"
    if numbers[0] > whole:
        raise UserError(f"--student-layers is '{shown}': {model}, allowed is 1 to {whole}")
    if numbers[0] == encoder_layers == decoder_layers:
        numbers = numbers[1:]
    if not numbers:
        raise UserError(f"--student-layers is '{shown}': {model}, a student needs fewer of them")
    return [Stage(teacher, student) for teacher, student in zip([None, *numbers], numbers)]


@register_criterion("self_teaching", dataclass=SelfTeachingCriterionConfig)
class SelfTeachingCriterion(LabelSmoothedCrossEntropyCriterion):
    """CE(y, f) + alpha KL(f || f^n), f^n being the first n layers of f, in one run and without a second model.

    The student costs one pass through n decoder layers: it attends to the state after encoder layer n of the teacher's
    own pass. The teacher's distribution counts as given; so the second term trains the first n layers, the embeddings
    and the projection.

    Validation is fairseq's own cross-entropy: with one stage of the whole model; with several of the last student, the
    one that is used in the end, so that its best checkpoint is kept and the values of all stages can be compared.
    """

    def __init__(
        self,
        task,
        sentence_avg,
        label_smoothing,
        ignore_prefix_size=0,
        report_accuracy=False,
        student_layers="",
        self_teaching_alpha=1.0,
        max_update=0,
    ):
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        if not 0 <= self_teaching_alpha < math.inf:
            raise UserError(f"--self-teaching-alpha is {self_teaching_alpha}: allowed is a number from 0")
        self.student_layers = parse_student_layers(student_layers)
        self.alpha = self_teaching_alpha
        self.max_update = max_update
        self.is_told_updates = getattr(task, "hands_on_update_number", False)
        self.task_name = type(task).__name__
        self.num_updates = 0
        self.stages = None  # known with the first batch, when the model is

    @classmethod
    def build_criterion(cls, cfg, task):
        """fairseq's constructor of criterions; a wrong flag ends the program with one line instead of a stack trace."""
        try:
            return super().build_criterion(cfg, task)
        except UserError as error:
            raise SystemExit(f"error: {error}") from error

    def set_num_updates(self, num_updates: int) -> None:
        """Told by the task before each step: the number of completed updates, on which alone the stage depends."""
        self.num_updates = num_updates

    @property
    def stage(self) -> Stage:
        """Stage t of T covers the updates from t * max_update / T to (t + 1) * max_update / T."""
        number = len(self.stages)
        if number == 1:
            return self.stages[0]
        return self.stages[min(self.num_updates * number // self.max_update, number - 1)]

    def forward(self, model, sample, reduce=True):
        """Loss of one batch; see fairseq's criterions for the three values returned.

        Raises:
            SystemExit: the model, its wrapper or --max-update does not go with the flags.
        """
        if self.stages is None:
            try:
                self.stages = self._prepare(model)
            except UserError as error:
                raise SystemExit(f"error: {error}") from error
        stage = self.stage
        net_output, encoder_out = self._teacher_pass(model, sample["net_input"], stage.teacher)
        student_output = self._student_pass(model, sample["net_input"], encoder_out, stage.student)
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
            "student_nll_loss": self._nll_sum(model, student_output, sample),
            "student_layers": stage.student,
            "teacher_layers": stage.teacher or max(depth(unwrapped(model))),
            "st_batches": 1,
        }
        if not model.training and len(self.stages) > 1:
            logging_output["teacher_nll_loss"] = self._nll_sum(model, net_output, sample)
            last = self.stages[-1].student
            net_output = self._student_pass(model, sample["net_input"], encoder_out, last)
        loss, nll_loss = self.compute_loss(model, net_output, sample, reduce=reduce)
        logging_output["nll_loss"] = nll_loss.data
        if model.training:
            divergence = self._divergence(student_output[0], net_output[0], sample["target"])
            logging_output["ls_loss"] = loss.data
            logging_output["st_loss"] = divergence.data
            loss = loss + self.alpha * divergence
        logging_output["loss"] = loss.data
        if self.report_accuracy:
            logging_output["n_correct"], logging_output["total"] = (
                count.data for count in self.compute_accuracy(model, net_output, sample)
            )
        return loss, sample_size, logging_output

    def _prepare(self, model: nn.Module) -> list[Stage]:
        """Once, before the first step: what depends on the model and its wrappers."""
        inner = unwrapped(model)
        stages = stages_of(self.student_layers, *depth(inner))
        if getattr(inner.decoder, "adaptive_softmax", None) is not None:
            raise UserError(
                "--adaptive-softmax-cutoff is set: self_teaching compares distributions over the whole vocabulary, "
                "which an adaptive softmax does not compute; train without it"
            )
        if getattr(inner.encoder.layers, "p", 0) > 0:
            raise UserError(
                "--encoder-layerdrop is above 0: self_teaching needs the state after encoder layer n in every pass; "
                "train without it"
            )
        if len(stages) > 1:
            self._check_stages(len(stages))
        while model is not inner:
            if "FullyShardedDataParallel" in type(model).__name__:
                raise UserError(
                    "--ddp-backend is fully_sharded, which holds the parameters only within the model's forward: "
                    "self_teaching needs them once more; use legacy_ddp or pytorch_ddp"
                )
            if len(stages) > 1 and isinstance(model, DistributedDataParallel) and not model.find_unused_parameters:
                raise UserError(
                    f"--student-layers has {len(stages)} stages, in which layers stay without a gradient: with "
                    "--ddp-backend pytorch_ddp (c10d) give --find-unused-parameters, or use --ddp-backend legacy_ddp"
                )
            model = model.module
        return stages

    def _check_stages(self, number: int) -> None:
        if self.max_update < number:
            raise UserError(
                f"--student-layers has {number} stages of equal numbers of updates, --max-update is "
                f"{self.max_update}: allowed is at least {number}"
            )
        if not self.is_told_updates:
            raise UserError(
                f"--task is one that does not tell the criterion the update number ({self.task_name}), which several "
                "stages of --student-layers need; use --task translation_intra_distillation, or one stage"
            )

    def _teacher_pass(
        self, model: nn.Module, net_input: dict[str, Any], layers: Optional[int]
    ) -> tuple[Any, dict[str, Any]]:
        """The model's output and, of the same pass, its encoder's; through the model itself, so wrappers see it."""
        inner, seen = unwrapped(model), []
        hook = inner.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            with cut_in_place(inner, layers) if layers else contextlib.nullcontext():
                net_output = model(**net_input)
        finally:
            hook.remove()
        return net_output, seen[0]

    def _student_pass(
        self, model: nn.Module, net_input: dict[str, Any], encoder_out: dict[str, Any], n: int
    ) -> tuple[Tensor, Any]:
        """The output of the first n layers, as of a model that has no others."""
        states = encoder_out.get("encoder_states") or []  # embeddings, then after each layer: S x B x H
        if len(states) <= n:
            raise SystemExit(
                f"error: {type(unwrapped(model)).__name__} does not return its encoder's state after each layer, which "
                "self_teaching needs; use a transformer"
            )
        student = first_layers(unwrapped(model), n)
        norm = student.encoder.layer_norm  # of a pre-norm model; its states are those before it
        state = states[n] if norm is None else norm(states[n])
        return student.decoder(
            net_input["prev_output_tokens"],
            encoder_out={**encoder_out, "encoder_out": [state], "encoder_states": states[: n + 1]},
            src_lengths=net_input.get("src_lengths"),
        )

    def _divergence(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        """Sum of KL(teacher || student) over the tokens that the cross-entropy counts; (B, T, V) logits."""
        skip, vocabulary = self.ignore_prefix_size, teacher_logits.size(-1)
        student, teacher = (z[:, skip:].reshape(-1, vocabulary) for z in (student_logits, teacher_logits))  # N x V
        return distillation_kl(student, teacher, target[:, skip:].reshape(-1).ne(self.padding_idx))

    @torch.no_grad()
    def _nll_sum(self, model: nn.Module, net_output: Any, sample: dict[str, Any]) -> Tensor:
        lprobs, target = self.get_lprobs_and_target(model, net_output, sample)
        return F.nll_loss(lprobs, target, ignore_index=self.padding_idx, reduction="sum")

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Scalars for the log, per token and base 2 as fairseq does."""
        super().reduce_metrics(logging_outputs)
        ntokens = sum(log["ntokens"] for log in logging_outputs)
        for name in ("ls_loss", "st_loss", "student_nll_loss", "teacher_nll_loss"):
            if any(name in log for log in logging_outputs):
                value = sum(log.get(name, 0) for log in logging_outputs)
                metrics.log_scalar(name, value / ntokens / math.log(2), ntokens, round=5 if name == "st_loss" else 3)
        batches = sum(log.get("st_batches", 0) for log in logging_outputs)
        for name in ("student_layers", "teacher_layers"):
            # Weight 0 makes fairseq show the last value, the stage in force at this update, and not a mean.
            metrics.log_scalar(name, sum(log.get(name, 0) for log in logging_outputs) / max(batches, 1), weight=0)
