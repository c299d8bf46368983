"""The settings of an optimizer's parameter groups, and how many steps its state has seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpwatch.agent.statistics.host_copy import Number, copied, number

_NAMES = ("weight_decay", "eps", "momentum", "alpha")  # as torch's optimizers name them; betas by their number
_COUNTS = ("step", "k")  # of optimizers that count by group: Apex's and DeepSpeed's, schedule-free ones


class GroupSettings(NamedTuple):
    """One parameter group right before a step, without its learning rate.

    Attributes:
        optimizer: The number of its optimizer.
        group: Its number there.
        settings: By name; betas are "beta1", "beta2", ….
        steps: The steps that the state of its first parameter has seen; NaN without a state.
    """

    optimizer: int
    group: int
    settings: Mapping[str, float]
    steps: Number


def group_settings(optimizer: torch.optim.Optimizer, which: int, group: int) -> GroupSettings:
    """Read a group without waiting for a device."""
    options = optimizer.param_groups[group]
    settings = {name: float(options[name]) for name in _NAMES if _is_number(options.get(name))}
    betas = options.get("betas")
    if isinstance(betas, tuple | list):
        settings |= {f"beta{i}": float(beta) for i, beta in enumerate(betas, 1) if _is_number(beta)}
    return GroupSettings(which, group, settings, _steps(optimizer, options))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1
    )


def _steps(optimizer: torch.optim.Optimizer, options: Mapping[str, Any]) -> Number:
    for name in _COUNTS:
        if _is_number(options.get(name)):
            return float(options[name])
    for parameter in options["params"]:
        state = optimizer.state.get(parameter)  # `get`: the defaultdict must not grow
        if state:
            step = state.get("step")
            return copied(step) if isinstance(step, int | float | Tensor) else math.nan
    return math.nan


class ChangedSettings:
    """Tells which groups' settings are news; `REPEAT` steps later they are told again, as a sample may be lost."""

    REPEAT = 64

    def __init__(self) -> None:
        self._told: dict[tuple[int, int], tuple[Mapping[str, float], float]] = {}
        self._step = -self.REPEAT

    def news(self, step: int, groups: Iterable[GroupSettings]) -> Sequence[GroupSettings]:
        """All groups as of `step`, if one of them has changed otherwise than by counting its steps; else none."""
        read = [group._replace(steps=number(group.steps)) for group in groups]
        now = {
            (group.optimizer, group.group): (group.settings, _nothing_as_zero(number(group.steps) - step))
            for group in read
        }
        if now == self._told and step - self._step < self.REPEAT:
            return ()
        self._told, self._step = now, step
        return read


def _nothing_as_zero(lag: float) -> float:
    return 0.0 if math.isnan(lag) else lag
