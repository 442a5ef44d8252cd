"""`--criterion intra_distillation`: mean cross-entropy of K passes + alpha' times their divergence."""

# No `from __future__ import annotations` here: fairseq reads the types of a configuration's fields when it is imported.
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor

from intra_distillation_fairseq import passes
from intra_distillation_fairseq.errors import UserError
from intra_distillation_fairseq.losses import backends
from intra_distillation_fairseq.losses.divergence import DIVERGENCES
from intra_distillation_fairseq.losses.objective import Objective
from intra_distillation_fairseq.projection import why_not_apart, why_not_plain
from intra_distillation_fairseq.schedule import SCHEDULES, AlphaSchedule

logger = logging.getLogger(__name__)

# By what the divergence of K passes is multiplied in the loss. Its expectation over the dropout masks is (K - 1) / K
# times something that K has no part in (docs/method.md, "Fair comparison"); the paper leaves that in.
SCALES: dict[str, Callable[[int], float]] = {
    "published": lambda num_passes: 1.0,
    "unbiased": lambda num_passes: num_passes / (num_passes - 1),
}

# What the loss is computed from.
LOSS_INPUTS = ["auto", "logits", "features"]


@dataclass
class IntraDistillationCriterionConfig(LabelSmoothedCrossEntropyCriterionConfig):
    """Flags of the criterion. One prefix for all: fairseq drops a flag that another component already has, silently."""

    id_num_passes: int = field(
        default=3, metadata={"help": "K: how often the model runs on each batch, with other dropout masks; at least 2"}
    )
    id_divergence: ChoiceEnum(list(DIVERGENCES)) = field(
        default="x", metadata={"help": "divergence between the K output distributions: X-divergence or Jensen-Shannon"}
    )
    id_alpha: float = field(
        default=5.0, metadata={"help": "final weight of the divergence, at least 0; constant if at most 1"}
    )
    id_alpha_schedule: ChoiceEnum(list(SCHEDULES)) = field(
        default="adaptive",
        metadata={"help": "adaptive: the weight grows from 0 through 1 at max-update/q to alpha at max-update/p"},
    )
    id_p: float = field(
        default=5.0, metadata={"help": "p: the weight reaches alpha after max-update/p updates; 0 < p < q"}
    )
    id_q: float = field(
        default=10.0, metadata={"help": "q: the weight reaches 1 after max-update/q updates; 0 < p < q"}
    )
    id_scale: ChoiceEnum(list(SCALES)) = field(
        default="published",
        metadata={
            "help": "unbiased: the divergence counts K/(K-1) times in the loss, so that its strength does not grow "
            "with K; id_loss in the log stays the plain divergence"
        },
    )
    id_pass_mode: ChoiceEnum(list(passes.PASS_MODES)) = field(
        default="stacked",
        metadata={
            "help": "stacked: one forward over the batch repeated K times; sequential: K forwards; "
            "recompute: K forwards that keep the activations of one (least memory)"
        },
    )
    id_loss_backend: ChoiceEnum(["auto", *backends.BACKENDS]) = field(
        default="auto",
        metadata={
            "help": "how the loss is computed; reference: the definition under autograd; auto: triton on CUDA where it "
            "runs, else chunked"
        },
    )
    id_loss_input: ChoiceEnum(LOSS_INPUTS) = field(
        default="auto",
        metadata={
            "help": "features: the loss takes the decoder's features and projects them itself, chunk by chunk, so that "
            "the logits of the K passes never exist as a whole; auto: features for chunked where the model allows it"
        },
    )
    max_update: int = II("optimization.max_update")  # N of the schedule: no second flag that could disagree


@register_criterion("intra_distillation", dataclass=IntraDistillationCriterionConfig)
class IntraDistillationCriterion(LabelSmoothedCrossEntropyCriterion):
    """Token sums, with the single batch's token count (or sentence count under --sentence-avg) as sample size.

    Validation is fairseq's own: one pass, label-smoothed cross-entropy, nothing else.

    A subclass may add a term that reads the logits (`further_terms`), and allow a single pass: then nothing is
    compared, and --id-alpha and its schedule have no say.
    """

    name = "intra_distillation"
    fewest_passes = 2
    logged_terms = {"ls_loss": 3, "id_loss": 5}  # name of a sum over the tokens -> digits in the log
    why_logits = None  # text: what else reads the logits: they are then given as such, and not overwritten

    def __init__(
        self,
        task,
        sentence_avg,
        label_smoothing,
        ignore_prefix_size=0,
        report_accuracy=False,
        id_num_passes=3,
        id_divergence="x",
        id_alpha=5.0,
        id_alpha_schedule="adaptive",
        id_p=5.0,
        id_q=10.0,
        id_scale="published",
        id_pass_mode="stacked",
        id_loss_backend="auto",
        id_loss_input="auto",
        max_update=0,
    ):
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        if id_num_passes < self.fewest_passes:
            why = ", since passes are compared" if self.fewest_passes > 1 else ""
            raise UserError(f"--id-num-passes is {id_num_passes}: allowed is at least {self.fewest_passes}{why}")
        self.num_passes = id_num_passes
        self.alpha_schedule = None  # of a single pass, which is compared with nothing
        if self.num_passes > 1:
            # fairseq's enumerations compare equal to strings; the tables of functions are looked up by plain ones.
            self.alpha_schedule = AlphaSchedule(id_alpha, str(id_alpha_schedule), id_p, id_q, max_update)
            if self.alpha_schedule.is_adaptive and not getattr(task, "hands_on_update_number", False):
                raise UserError(
                    f"--task is one that does not tell the criterion the update number ({type(task).__name__}), which "
                    "--id-alpha-schedule adaptive needs; use --task translation_intra_distillation, or the constant one"
                )
            self.scale = SCALES[str(id_scale)](id_num_passes)
        self.divergence = str(id_divergence)
        self.pass_mode = str(id_pass_mode)
        self.loss_backend = str(id_loss_backend)
        self.loss_input = str(id_loss_input)
        self.num_updates = 0
        self.backend = None  # chosen with the first batch, when the model's device is known
        self.takes_features = self.overwrites_logits = False

    @classmethod
    def build_criterion(cls, cfg, task):
        """fairseq's constructor of criterions; a wrong flag ends the program with one line instead of a stack trace."""
        try:
            return super().build_criterion(cfg, task)
        except UserError as error:
            raise SystemExit(f"error: {error}") from error

    def set_num_updates(self, num_updates: int) -> None:
        """Told by the task before each step: the number of completed updates, x of eq. 11-12."""
        self.num_updates = num_updates

    def forward(self, model, sample, reduce=True):
        """Loss of one batch; see fairseq's criterions for the three values returned.

        Raises:
            SystemExit: the model does not return logits over the whole vocabulary (adaptive softmax).
        """
        if not model.training:
            return super().forward(model, sample, reduce=reduce)
        if self.backend is None:
            self._prepare(model)
        alpha = self.alpha_schedule(self.num_updates) if self.alpha_schedule else None
        weight = 0.0 if alpha is None else alpha * self.scale
        objective = Objective(self.divergence, weight, self.eps, self.padding_idx)
        net_input = {**sample["net_input"], "features_only": True} if self.takes_features else sample["net_input"]
        results = passes.run(model, net_input, self.num_passes, self.pass_mode)
        target = model.get_targets(sample, (results[0],))[:, self.ignore_prefix_size :].reshape(-1)  # N
        results = passes.flatten_tokens(results, skip=self.ignore_prefix_size)  # K x N x V, or K x N x H
        if self.takes_features:
            projection = passes.unwrapped(model).decoder.output_projection
            losses = self.backend.from_features(results, projection.weight, projection.bias, target, objective)
        else:
            losses = self.backend.from_logits(results, target, objective, self.overwrites_logits)
        terms = self.further_terms(model, sample, results, target)
        loss = losses.loss + sum(terms.values()) if terms else losses.loss
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        compared = {"id_loss": losses.divergence_sum, "id_alpha": alpha, "id_batches": 1} if self.alpha_schedule else {}
        logging_output = {
            "loss": loss.data,
            "ls_loss": losses.ls_sum,
            "nll_loss": losses.nll_sum,
            **compared,
            **{name: term.data for name, term in terms.items()},
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        if self.report_accuracy:
            real = target.ne(self.padding_idx)
            correct = sum(z.argmax(-1).eq(target).logical_and(real).sum() for z in results)
            logging_output["n_correct"] = correct.data / self.num_passes
            logging_output["total"] = real.sum().data
        return loss, sample_size, logging_output

    def further_terms(self, model, sample, logits, target) -> dict[str, Tensor]:
        """What a subclass adds to the loss; each term is logged under its name.

        Args:
            model: the model in training, with its data-parallel wrappers.
            sample: the batch.
            logits: of the K passes, (K, N, V) or K tensors (N, V), without --ignore-prefix-size; features where
                `why_logits` is not set.
            target: (N,) token ids.
        Returns:
            Name -> sum over the tokens, a scalar in nats.
        """
        return {}

    def _prepare(self, model) -> None:
        """Once, before the first step: what depends on the model and on where it is."""
        if getattr(getattr(passes.unwrapped(model), "decoder", None), "adaptive_softmax", None) is not None:
            raise SystemExit(
                f"error: --adaptive-softmax-cutoff is set: {self.name} compares distributions over the whole "
                "vocabulary, which an adaptive softmax does not compute; train without it"
            )
        if self.num_passes > 1 and not passes.is_stochastic(model):
            logger.warning(
                "every dropout of the model is 0: the %d passes are identical, the divergence is 0 and the training "
                "equals label_smoothed_cross_entropy at %d times its cost; set --dropout above 0",
                self.num_passes,
                self.num_passes,
            )
        try:
            name = backends.choose(self.loss_backend, next(model.parameters()).device, self.num_passes, self.divergence)
            self.takes_features = self._choose_input(model, name)
        except UserError as error:
            raise SystemExit(f"error: {error}") from error
        self.overwrites_logits = self.why_logits is None and why_not_plain(model) is None
        self.backend = backends.BACKENDS[name]

    def _choose_input(self, model, backend: str) -> bool:
        """Whether the loss takes features. auto: with chunked, faster and leaner on a CPU (docs/results.md)."""
        hindrance = "--report-accuracy needs the logits" if self.report_accuracy else self.why_logits
        hindrance = hindrance or why_not_apart(model)
        if self.loss_input == "features" and hindrance:
            raise UserError(f"--id-loss-input is 'features', but {hindrance}: use auto or logits")
        takes_features = self.loss_input == "features" or (
            self.loss_input == "auto" and backend == "chunked" and not hindrance
        )
        logger.info("the loss takes %s", "features and projects them itself" if takes_features else "logits")
        return takes_features

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Scalars for the log, per token and base 2 as fairseq does."""
        super().reduce_metrics(logging_outputs)
        if not any("ls_loss" in log for log in logging_outputs):
            return  # validation: plain label-smoothed cross-entropy
        ntokens = sum(log["ntokens"] for log in logging_outputs)
        for name, digits in cls.logged_terms.items():
            if any(name in log for log in logging_outputs):
                value = sum(log[name] for log in logging_outputs)
                metrics.log_scalar(name, value / ntokens / math.log(2), ntokens, round=digits)
        if batches := sum(log.get("id_batches", 0) for log in logging_outputs):
            # Weight 0 makes fairseq show the last value, alpha' in force at this update, and not a mean over updates.
            metrics.log_scalar("id_alpha", sum(log["id_alpha"] for log in logging_outputs) / batches, weight=0, round=6)
