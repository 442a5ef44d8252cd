"""`--optimizer sage_adam`: Adam with a learning rate for each parameter that follows its sensitivity (SAGE).

Liang et al., "No Parameters Left Behind", ICLR 2022. A parameter's sensitivity I = |theta * dL/dtheta| estimates how
much the loss changes without it; Ih is its moving average. Adam's step is multiplied, parameter by parameter, by

    (|I - Ih| + eps) / (Ih + eps)

so that parameters whose sensitivity has settled move less and those whose sensitivity still changes move more.
"""

# No `from __future__ import annotations` here: fairseq reads the types of a configuration's fields when it is imported.
import ast
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, List, Optional  # noqa: UP035  fairseq's parser of configurations knows typing's names only

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II
from torch import Tensor

from intra_distillation_fairseq.errors import UserError

# eps of the ratio. It must lie far below the sensitivities, or the ratio is 1 everywhere and SAGE is Adam. Those are
# small, since fairseq divides gradients by the number of tokens: in a transformer of 1.6M parameters, after 2,500
# updates on Multi30k, half of them lie below 2e-5 and one in twenty below 3e-7, and a larger model's are smaller still.
# 1e-12 is above 1% of them, parameters that hardly ever get a gradient. The authors' code adds as much: its eps is
# 1e-6, and squared.
SAGE_EPS = 1e-12

# Below this an eps gets lost in float32, and 0 / 0 is not a number.
SMALLEST_EPS = 1e-30

ALLOWED_BETAS = "allowed are two numbers of at least 0 and below 1, as in '(0.9, 0.98)'"

AVERAGES = ("exp_avg", "exp_avg_sq", "exp_avg_sensitivity")


def working_dtype(parameter: Tensor) -> torch.dtype:
    """The type in which a parameter's averages are kept: its own, but float32 for the 16-bit ones."""
    return torch.float32 if parameter.dtype in (torch.float16, torch.bfloat16) else parameter.dtype


class SageAdam(torch.optim.Optimizer):
    """Adam with bias correction and decoupled weight decay, each parameter's step scaled by its sensitivity.

    With g the gradient, theta the parameter before the step, t = 1, 2, ... the step:

        m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2                     Adam's averages
        I = |theta g|;   S = b0 S + (1 - b0) I;   Ih = S / (1 - b0^t)        sensitivity and its corrected average
        r = (|I - Ih| + eps) / (Ih + eps) for t > 1,   r = 1 for t = 1
        theta = theta - lr wd theta - lr r sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + adam_eps)

    Weight decay is fairseq's Adam's: it takes part in neither m, v, I nor r. r lies between 0 and the larger of 1 and
    b0 / (1 - b0), 3 for the default; multiplying the loss by a constant does not change it, except through eps.

    Two traps, and what is done about them:

    - A parameter that is exactly 0 (biases and LayerNorm's shift after fairseq's initialisation) has I = 0. The
      authors' code, |I - Ih| / (Ih + eps), would not move it; the form used here has r = eps / eps = 1.
    - In the first step the corrected average is the only sample itself, so |I - Ih| = 0 and nothing would move. One
      sample says nothing about how uncertain it is, so the first step is Adam's: r = 1. From the second on r is the
      formula's. b0 = 0 would make every step such a first one, and is refused.

    Everything is elementwise: one flat buffer of all parameters gives what the separate tensors give. Beside Adam's two
    averages a third is kept, 4 bytes more per parameter; 16-bit parameters have their averages in float32.

    Args:
        params: parameters or groups of them, as torch's optimisers take them.
        lr: learning rate.
        betas: b1 and b2.
        eps: adam_eps.
        weight_decay: wd, multiplied by the learning rate of the moment.
        sage_beta: b0, beta_0 of the SAGE paper, between 0 and 1.
        sage_eps: eps of the ratio, above 0.

    Raises:
        UserError: a value is out of range; the message has the flag of fairseq-train.
    """

    supports_memory_efficient_fp16 = True  # fairseq asks for both
    supports_flat_params = True

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        sage_beta: float = 0.75,
        sage_eps: float = SAGE_EPS,
    ):
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"--adam-betas is '{tuple(betas)}': {ALLOWED_BETAS}")
        if not 0 < sage_beta < 1:
            raise UserError(
                f"--sage-beta is '{sage_beta}': allowed is a number above 0 and below 1; with 0 the average is the "
                "sensitivity itself and nothing moves, for training without SAGE use --optimizer adam"
            )
        for flag, value in (("--adam-eps", eps), ("--sage-eps", sage_eps)):
            if not SMALLEST_EPS <= value < math.inf:
                raise UserError(f"{flag} is '{value}': allowed is a number of at least {SMALLEST_EPS}")
        if not 0 <= weight_decay < math.inf:
            raise UserError(f"--weight-decay is '{weight_decay}': allowed is a number of at least 0")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": tuple(betas),
                "eps": eps,
                "weight_decay": weight_decay,
                "sage_beta": sage_beta,
                "sage_eps": sage_eps,
            },
        )

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Tensor]] = None) -> Optional[Tensor]:
        """One step on every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients; torch's optimisers may be given one.

        Returns:
            What the closure returned.

        Raises:
            UserError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if parameter.grad.is_sparse:
            raise UserError("a gradient is sparse: sage_adam needs dense ones, build embeddings with sparse=False")
        dtype = working_dtype(parameter)
        theta, gradient = parameter.to(dtype), parameter.grad.to(dtype)  # themselves, unless they are 16-bit
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state.update((name, torch.zeros_like(theta)) for name in AVERAGES)
        state["step"] += 1
        step = state["step"]
        exp_avg, exp_avg_sq, exp_avg_sensitivity = (state[name] for name in AVERAGES)
        (beta1, beta2), beta0 = group["betas"], group["sage_beta"]

        exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        sensitivity = (theta * gradient).abs_()
        exp_avg_sensitivity.mul_(beta0).add_(sensitivity, alpha=1 - beta0)

        scaled = exp_avg
        if step > 1:
            corrected = exp_avg_sensitivity / (1 - beta0**step)
            ratio = sensitivity.sub_(corrected).abs_().add_(group["sage_eps"]).div_(corrected.add_(group["sage_eps"]))
            scaled = ratio.mul_(exp_avg)
            del corrected  # a buffer as large as the model: at most two of them are alive at once
        denominator = exp_avg_sq.sqrt().add_(group["eps"])
        step_size = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        theta.add_(theta, alpha=-group["weight_decay"] * group["lr"])
        theta.addcdiv_(scaled, denominator, value=-step_size)
        if dtype != parameter.dtype:
            parameter.copy_(theta)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the averages of 16-bit parameters stay float32: torch would round them to 16 bits."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, parameter in zip(saved, ours):
            for name, value in state_dict["state"].get(index, {}).items():
                if name in AVERAGES:
                    self.state[parameter][name] = value.to(device=parameter.device, dtype=working_dtype(parameter))


@dataclass
class SageAdamConfig(FairseqDataclass):
    """Flags of the optimiser; those that fairseq's Adam has too bear its names and defaults."""

    adam_betas: Any = field(default=(0.9, 0.999), metadata={"help": "betas of Adam, as in '(0.9, 0.98)'"})
    adam_eps: float = field(default=1e-8, metadata={"help": "epsilon of Adam"})
    weight_decay: float = field(default=0.0, metadata={"help": "decoupled weight decay"})
    sage_beta: float = field(
        default=0.75, metadata={"help": "beta_0: decay of the moving average of the sensitivity, between 0 and 1"}
    )
    sage_eps: float = field(
        default=SAGE_EPS,
        metadata={
            "help": "eps of the ratio (|I - Ih| + eps) / (Ih + eps); far below the sensitivities I, or SAGE is Adam"
        },
    )
    lr: List[float] = II("optimization.lr")  # noqa: UP006


def parse_betas(given: Any) -> tuple[float, ...]:
    """The betas as numbers, from a command line's text, a Hydra list or a tuple.

    Raises:
        UserError: they are not numbers.
    """
    try:
        return tuple(float(beta) for beta in (ast.literal_eval(given) if isinstance(given, str) else given))
    except (ValueError, TypeError, SyntaxError) as error:
        raise UserError(f"--adam-betas is '{given}': {ALLOWED_BETAS}") from error


@register_optimizer("sage_adam", dataclass=SageAdamConfig)
class FairseqSageAdam(FairseqOptimizer):
    """fairseq's side of SageAdam: flags in, and which of fairseq's ways to 16 bits it can take."""

    def __init__(self, cfg: SageAdamConfig, params: Iterable):
        super().__init__(cfg)
        self._optimizer = SageAdam(params, **self.optimizer_config)

    @classmethod
    def build_optimizer(cls, cfg: SageAdamConfig, params: Iterable) -> "FairseqSageAdam":
        """fairseq's constructor of optimisers; a wrong flag ends the program with one line instead of a stack trace."""
        try:
            return cls(cfg, params)
        except UserError as error:
            raise SystemExit(f"error: {error}") from error

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """The settings of SageAdam; fairseq also puts them over those of a checkpoint from which training resumes."""
        return {
            "lr": self.cfg.lr[0] if isinstance(self.cfg.lr, Sequence) else self.cfg.lr,
            "betas": parse_betas(self.cfg.adam_betas),
            "eps": self.cfg.adam_eps,
            "weight_decay": self.cfg.weight_decay,
            "sage_beta": self.cfg.sage_beta,
            "sage_eps": self.cfg.sage_eps,
        }
