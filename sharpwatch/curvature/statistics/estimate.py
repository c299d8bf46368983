"""A value is nothing without its error, nor without what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """Passes over the data. A product through a kept graph of the gradient is one backward, about twice a loss's."""

    forwards: float = 0.0
    backwards: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forwards + other.forwards, self.backwards + other.backwards)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.forwards - other.forwards, self.backwards - other.backwards)


@dataclass(frozen=True, slots=True)
class Estimate:
    """One estimated quantity.

    `value`, `stderr` and `residual` share their unit; `draws` is the number of independent draws behind them;
    `estimator` says what was estimated how (`gnb`, `hutchinson`, `lanczos`, `direction`, ...); `step` is the newest
    optimizer step in it. `residual` is ‖Hu − λu‖ of an eigenvalue, which bounds its distance to a true one, or half the
    bracket of a line search. `method` is how the derivatives were got: "autograd", "gradient differences",
    "loss differences" or "losses".
    """

    value: float
    stderr: float
    draws: int
    estimator: str
    step: int = 0
    residual: float = math.nan
    method: str = ""
    cost: Cost = Cost()
