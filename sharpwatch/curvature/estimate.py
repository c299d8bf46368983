"""A value is nothing without its error."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """One estimated quantity.

    `value` and `stderr` share their unit; `draws` is the number of independent draws behind them; `estimator` says
    how it was made (`gnb`, `hutchinson`, `lanczos`, `direction`, ...); `step` is the newest optimizer step in it.
    """

    value: float
    stderr: float
    draws: int
    estimator: str
    step: int
