"""Split parameter groups laid over an optimizer for the length of one `step()`.

A scheduler, a checkpoint and the user's own code keep seeing the groups they made: the list in
`optimizer.param_groups` is swapped for another and put back, never edited.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Group = dict[str, Any]


# The power of the learning rate that a group's value goes with. Schedule-free optimizers weigh their averages by the
# rates of the past: those weights stay the schedule's own.
_POWERS: dict[str, Callable[[Group], float]] = {
    "lr": lambda _: 1.0,
    "scheduled_lr": lambda _: 1.0,
    "lr_max": lambda _: 1.0,
    "weight_sum": lambda group: group.get("weight_lr_power", 0.0),
}


@dataclass(frozen=True, slots=True)
class _SplitGroup:
    """One multiplier's share of a group, and the values it was laid with."""

    group: Group
    multiplier: float
    laid: Group
    before: Group


class ParamGroupOverride:
    """The overlay of one optimizer.

    `guard()` makes sure that it is taken away when `step()` raises: torch then runs no post-hook, so while a
    multiplier differs from 1 the instance's `step` is a wrapper with `finally`.
    """

    laid: Mapping[int, float] = types.MappingProxyType({})  # the multipliers by which groups are split now

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._own: list[Group] | None = None
        self._pieces: list[_SplitGroup] = []
        self._wrapper: Callable[..., Any] | None = None
        self._replaced: Any = None

    def lay(self, multipliers: Mapping[int, float]) -> None:
        """Split the groups by `multipliers` (of parameters, by id; 1 where absent). Nothing to split: nothing laid."""
        self.remove()
        if all(value == 1.0 for value in multipliers.values()):
            return
        own = self._optimizer.param_groups
        laid: list[Group] = []
        for group in own:
            pieces = _split(group, multipliers)
            self._pieces.extend(pieces)
            laid.extend([piece.laid for piece in pieces] or [group])
        self._own = own
        self.laid = multipliers
        self._optimizer.param_groups = laid

    def remove(self) -> None:
        """Put the optimizer's own groups back; what `step()` changed in a group (a counter) is carried over."""
        if self._own is None:
            return
        self._optimizer.param_groups, self._own = self._own, None
        self.laid = ParamGroupOverride.laid
        pieces, self._pieces = self._pieces, []
        # The piece nearest 1 last: where pieces disagree, its value is the one an undivided group would hold.
        for piece in sorted(pieces, key=lambda piece: -_distance(piece.multiplier)):
            _carry_back(piece)

    def guard(self, before: Callable[[], None]) -> None:
        """Wrap the instance's `step`, once; `before` is called first."""
        if self._wrapper is not None and _stands_in(self._wrapper, self._optimizer.step):
            return
        self._replaced = self._optimizer.__dict__.get("step")
        current = self._optimizer.step
        inner: Callable[..., Any] = getattr(current, "__func__", current)
        is_method = hasattr(current, "__func__")

        # functools.wraps also copies the mark by which torch's schedulers know their own wrapper, and a bound method
        # is what they ask for (`step.__func__`) when they come after this one.
        @functools.wraps(inner)
        def step(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                before()
                return inner(optimizer, *args, **kwargs) if is_method else inner(*args, **kwargs)
            finally:
                self.remove()

        self._wrapper = step
        self._optimizer.__dict__["step"] = types.MethodType(step, self._optimizer)

    def unguard(self) -> None:
        """Take the wrapper off; where someone has wrapped it since, it stays inside and does nothing."""
        if self._wrapper is None:
            return
        current = self._optimizer.__dict__.get("step")
        if getattr(current, "__func__", None) is not self._wrapper:
            return
        if self._replaced is None:
            del self._optimizer.__dict__["step"]
        else:
            self._optimizer.__dict__["step"] = self._replaced
        self._wrapper = self._replaced = None


def _split(group: Group, multipliers: Mapping[int, float]) -> list[_SplitGroup]:
    """One piece for each multiplier in the group, parameters in their order; none where all are 1."""
    shares: dict[float, list[Any]] = {}
    for parameter in group["params"]:
        shares.setdefault(multipliers.get(id(parameter), 1.0), []).append(parameter)
    if set(shares) <= {1.0}:
        return []
    nearest = min(shares, key=_distance)
    pieces = []
    for multiplier, parameters in shares.items():
        values = group if multiplier == nearest else _apart(group)
        laid = {**values, "params": parameters, **_scaled(group, multiplier)}
        pieces.append(_SplitGroup(group, multiplier, laid, dict(laid)))
    return pieces


def _apart(group: Group) -> Group:
    """The group with tensors of its own: a counter that `step()` raises in place is raised once."""
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in group.items()}


def _scaled(group: Group, multiplier: float) -> Group:
    factors = {key: multiplier ** power(group) for key, power in _POWERS.items() if key in group}
    return {key: group[key] * factor for key, factor in factors.items() if factor != 1.0}


def _carry_back(piece: _SplitGroup) -> None:
    for key, value in piece.laid.items():
        if key == "params" or (key in piece.before and value is piece.before[key]):
            continue
        factor = piece.multiplier ** _POWERS[key](piece.group) if key in _POWERS else 1.0
        piece.group[key] = value if factor == 1.0 else value / factor


def _distance(multiplier: float) -> float:
    return abs(multiplier - 1.0)


def _stands_in(wrapper: Callable[..., Any], step: Any) -> bool:
    """Whether `wrapper` is somewhere in the chain of wrappers around `step`."""
    current = getattr(step, "__func__", step)
    while current is not None:
        if current is wrapper:
            return True
        current = getattr(current, "__wrapped__", None)
    return False
