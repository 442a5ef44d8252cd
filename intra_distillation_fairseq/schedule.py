"""The weight alpha' of the divergence as a function of the update number (paper, eq. 11-12). No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from intra_distillation_fairseq.errors import UserError

SCHEDULES = ("adaptive", "constant")


@dataclass(frozen=True)
class AlphaSchedule:
    """alpha'(x) for x completed updates of N in all.

    Adaptive: alpha' = alpha * (p * x / N) ** gamma up to x = N / p and alpha from there on, where
    gamma = ln(1 / alpha) / ln(p / q), so that alpha' is 0 at the start, 1 at N / q and alpha at N / p. A final alpha of
    at most 1 leaves nothing to grow through 1: the weight is then constant, as in the authors' code.

    Args:
        alpha: final weight of the divergence, at least 0.
        kind: "adaptive" or "constant".
        p: alpha' reaches alpha after max_update / p updates.
        q: alpha' reaches 1 after max_update / q updates; larger than p.
        max_update: N, the number of updates of the whole training (`--max-update`).

    Raises:
        UserError: one line with the flag, what was given and what is allowed.
    """

    alpha: float = 5.0
    kind: str = "adaptive"
    p: float = 5.0
    q: float = 10.0
    max_update: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise UserError(f"--id-alpha is {self.alpha}: allowed is a number of at least 0")
        if self.kind not in SCHEDULES:
            raise UserError(f"--id-alpha-schedule is '{self.kind}': allowed are {', '.join(SCHEDULES)}")
        if self.kind == "constant":
            return
        if not 0 < self.p < self.q < math.inf:
            raise UserError(
                f"--id-p is {self.p} and --id-q is {self.q}: allowed is 0 < p < q, "
                "since alpha' reaches 1 at max-update/q and alpha at max-update/p"
            )
        if self.alpha > 1 and self.max_update <= 0:
            raise UserError(
                f"--max-update is {self.max_update}: allowed is a number above 0, since the adaptive schedule grows "
                "over it; set --max-update, or choose --id-alpha-schedule constant"
            )

    @property
    def is_adaptive(self) -> bool:
        """Whether alpha' changes during training at all."""
        return self.kind == "adaptive" and self.alpha > 1

    def __call__(self, num_updates: int) -> float:
        """alpha' after num_updates completed updates (0 for the first step)."""
        if not self.is_adaptive or num_updates * self.p >= self.max_update:
            return float(self.alpha)
        gamma = math.log(1 / self.alpha) / math.log(self.p / self.q)
        return self.alpha * (self.p * num_updates / self.max_update) ** gamma
