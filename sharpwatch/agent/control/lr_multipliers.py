"""Applies multipliers and update intervals: gives optimizers other parameter groups for the duration of one `step()`.

A parameter with a multiplier is in a group of its own; one whose block is not updated at the step is in none, so that
neither it nor its state changes, as if its gradient were None.

Schedulers, checkpoints and the user's own code keep seeing the groups that the user made: the list in
`optimizer.param_groups` is replaced by another and restored, never edited.
"""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from sharpwatch.agent.control.controller import Controller, smallest_interval, smallest_multiplier
from sharpwatch.agent.safety import ExceptionBarrier
from sharpwatch.blocks import BlockMap

Group = dict[str, Any]


# By option of a group, the power p so that the option scales with multiplier ** p. Schedule-free optimizers weight
# their averages by past learning rates; those weights must stay the schedule's.
_POWERS: dict[str, Callable[[Group], float]] = {
    "lr": lambda _: 1.0,
    "scheduled_lr": lambda _: 1.0,
    "lr_max": lambda _: 1.0,
    "weight_sum": lambda group: group.get("weight_lr_power", 0.0),
}


_NO_PIECES: Mapping[int, int] = types.MappingProxyType({})
_NONE: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class InForce:
    """What a step runs under, by parameter id: multipliers, 1 where absent, and the parameters that are left out."""

    multipliers: Mapping[int, float] = field(default_factory=dict)
    left_out: frozenset[int] = _NONE


@dataclass(frozen=True, slots=True)
class _SplitGroup:
    """The parameters of a group that have one multiplier."""

    group: Group  # the user's
    multiplier: float
    applied: Group  # what the optimizer sees instead
    before: Group  # a copy of `applied` from before the step


class ParamGroupOverride:
    """Replaces the parameter groups of one optimizer by split ones, and restores them.

    Call `apply` before a step and `restore` after it. Torch runs no post-hook if `step()` raises, so `wrap_step` makes
    the instance's `step` a wrapper that restores the groups in any case.
    """

    applied = InForce()  # by which groups are split now

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._own: list[Group] | None = None
        self._splits: list[_SplitGroup] = []
        self._wrapper: Callable[..., Any] | None = None
        self._replaced: Any = None

    def apply(
        self,
        multipliers: Mapping[int, float],
        pieces: Mapping[int, int] = _NO_PIECES,
        left_out: frozenset[int] = _NONE,
    ) -> None:
        """Split the groups by `multipliers`, by parameter id and 1 where absent. If all are 1, nothing changes.

        `pieces`, by parameter id, divide groups further: parameters of one multiplier are together in a piece. The
        parameters of the ids `left_out` are in no group, and a group that has no others is left out with them.
        """
        self.restore()
        # Without multipliers the optimizer keeps its own list, so that a run without commands is a plain run.
        if not (pieces or left_out) and all(value == 1.0 for value in multipliers.values()):
            return
        own = self._optimizer.param_groups
        groups: list[Group] = []
        for group in own:
            stepped = [parameter for parameter in group["params"] if id(parameter) not in left_out]
            whole = len(stepped) == len(group["params"])
            splits = _split(group, stepped, multipliers, pieces)
            self._splits.extend(splits)
            groups.extend([split.applied for split in splits] or ([group] if whole else []))
        self._own = own
        self.applied = InForce(multipliers, left_out)
        self._optimizer.param_groups = groups

    def restore(self) -> None:
        """Restore the optimizer's own groups, with the options that `step()` changed, as a counter."""
        if self._own is None:
            return
        # The groups come back before options are copied: should copying fail, the loop still sees its own groups.
        self._optimizer.param_groups, self._own = self._own, None
        self.applied = ParamGroupOverride.applied
        splits, self._splits = self._splits, []
        # The multiplier nearest 1 comes last: where values differ, it wins, as nearest to those of an unsplit group.
        for split in sorted(splits, key=lambda split: -_distance(split.multiplier)):
            _copy_changes_back(split)

    def wrap_step(self, before: Callable[[], None]) -> None:
        """Wrap the instance's `step`, once: the wrapper calls `before` first, and restores the groups at last."""
        if self._wrapper is not None and _is_wrapped_by(self._optimizer.step, self._wrapper):
            return
        self._replaced = self._optimizer.__dict__.get("step")
        current = self._optimizer.step
        inner: Callable[..., Any] = getattr(current, "__func__", current)
        is_method = hasattr(current, "__func__")

        # Torch's schedulers mark their own wrapper, and functools.wraps copies the mark. A scheduler that is made after
        # this wrapper asks for `step.__func__`, so it must be a bound method.
        @functools.wraps(inner)
        def step(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                before()
                return inner(optimizer, *args, **kwargs) if is_method else inner(*args, **kwargs)
            finally:
                self.restore()

        self._wrapper = step
        self._optimizer.__dict__["step"] = types.MethodType(step, self._optimizer)

    def unwrap_step(self) -> None:
        """Remove the wrapper. If someone else has wrapped it since, it stays inside and changes nothing."""
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


def _split(
    group: Group, stepped: Sequence[Any], multipliers: Mapping[int, float], pieces: Mapping[int, int]
) -> list[_SplitGroup]:
    """Split a group into one for each multiplier and piece, with its parameters in their order.

    Args:
        group: The user's group.
        stepped: Those of its parameters that are not left out.
        multipliers: By parameter id.
        pieces: By parameter id.

    Returns:
        The splits; empty if nothing is stepped, or if the whole group is at a multiplier of 1.
    """
    shares: dict[tuple[float, int], list[Any]] = {}
    for parameter in stepped:
        key = multipliers.get(id(parameter), 1.0), pieces.get(id(parameter), 0)
        shares.setdefault(key, []).append(parameter)
    if not shares or (set(shares) == {(1.0, 0)} and len(stepped) == len(group["params"])):
        return []
    # One split keeps the group's own tensors, so that an increment in place reaches the user's group.
    nearest = min(shares, key=lambda share: _distance(share[0]))
    splits = []
    for (multiplier, piece), parameters in shares.items():
        values = group if (multiplier, piece) == nearest else _with_cloned_tensors(group)
        applied = {**values, "params": parameters, **_scaled(group, multiplier)}
        splits.append(_SplitGroup(group, multiplier, applied, dict(applied)))
    return splits


def _with_cloned_tensors(group: Group) -> Group:
    """The group with its own copies of tensors, so that `step()` increments a counter of the user's group only once."""
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in group.items()}


def _scaled(group: Group, multiplier: float) -> Group:
    factors = {key: multiplier ** power(group) for key, power in _POWERS.items() if key in group}
    return {key: group[key] * factor for key, factor in factors.items() if factor != 1.0}


def _copy_changes_back(split: _SplitGroup) -> None:
    for key, value in split.applied.items():
        # By identity: comparing the values of tensors would wait for their device.
        if key == "params" or (key in split.before and value is split.before[key]):
            continue
        factor = split.multiplier ** _POWERS[key](split.group) if key in _POWERS else 1.0
        split.group[key] = value if factor == 1.0 else value / factor


def _distance(multiplier: float) -> float:
    return abs(multiplier - 1.0)


def _is_wrapped_by(step: Any, wrapper: Callable[..., Any]) -> bool:
    """Whether `wrapper` is `step` itself or one of the functions that it wraps."""
    current = getattr(step, "__func__", step)
    while current is not None:
        if current is wrapper:
            return True
        current = getattr(current, "__wrapped__", None)
    return False


class LrMultipliers:
    """Scales the learning rates of each `step()` by the multipliers of `control`, and leaves out what is not updated.

    Args:
        optimizers: The optimizers of the run; the methods below name one by its index `which`.
        parameter_types: By parameter id, the block types that share its learning rate.
        control: Says which multipliers are in force.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        parameter_types: Mapping[int, frozenset[str]],
        control: Controller,
    ) -> None:
        self._overrides = [ParamGroupOverride(optimizer) for optimizer in optimizers]
        self._parameter_types = parameter_types
        self._control = control
        self._cache: tuple[Mapping[str, float], Mapping[int, float]] = ({}, {})  # by block type, by parameter id

    def multipliers(self) -> Mapping[int, float]:
        """The multipliers in force by parameter id, only those that differ from 1."""
        by_type = self._control.multipliers
        # Asked for at each step, while multipliers rarely change and parameters are many.
        if by_type != self._cache[0]:
            each = {key: smallest_multiplier(types, by_type) for key, types in self._parameter_types.items()}
            self._cache = (dict(by_type), {key: value for key, value in each.items() if value != 1.0})
        return self._cache[1]

    def in_force(self) -> InForce:
        """What the step that has begun runs under."""
        control = self._control
        if not control.update_every:
            return InForce(self.multipliers())
        rests = (key for key, types in self._parameter_types.items() if self._rests(types))
        return InForce(self.multipliers(), frozenset(rests))

    def _rests(self, types: frozenset[str]) -> bool:
        """Whether a parameter of blocks of `types` is not updated at this step."""
        return bool(self._control.step % smallest_interval(types, self._control.update_every))

    def apply(self, which: int, in_force: InForce) -> None:
        """Split the parameter groups of an optimizer by what is in force."""
        self._overrides[which].apply(in_force.multipliers, left_out=in_force.left_out)

    def restore(self, which: int) -> InForce:
        """Restore the optimizer's own groups; returns what was applied until now."""
        applied = self._overrides[which].applied
        self._overrides[which].restore()
        return applied

    def wrap_steps(self, before: Callable[[int], None], *, command_expected: bool = False) -> None:
        """Make sure that the groups are restored even if the next `step()` raises.

        Steps are wrapped only where groups may be split: the wrapper is visible to the user.

        Args:
            before: Called with the optimizer's index right before a wrapped step.
            command_expected: Whether a command may be received before the next step.
        """
        for which, override in enumerate(self._overrides):
            if command_expected or self._control.may_scale:
                override.wrap_step(partial(before, which))
            else:
                override.unwrap_step()

    def close(self, barrier: ExceptionBarrier) -> None:
        """Leave every optimizer as it was."""
        for override in self._overrides:
            with barrier.guard("restoring parameter groups"):
                override.restore()
                override.unwrap_step()


def own_rates(
    optimizers: Sequence[torch.optim.Optimizer], parameter_types: Mapping[int, frozenset[str]]
) -> dict[str, float]:
    """The largest learning rate of each block type by the optimizers' own groups; without those kept on a device."""
    found: dict[str, float] = {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        rate = group.get("lr")
        if not isinstance(rate, float | int):
            continue  # reading a tensor would wait for its device
        for block in frozenset().union(*(parameter_types.get(id(each), frozenset()) for each in group["params"])):
            found[block] = max(found.get(block, 0.0), float(rate))
    return found


def parameter_types(
    model: nn.Module, block_map: BlockMap, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[int, frozenset[str]]:
    """By parameter id, the block types that share the parameter's learning rate."""
    types: dict[str, set[str]] = defaultdict(set)
    for part in block_map.parts:
        types[part.parameter].add(part.type)
    found = {id(parameter): frozenset(types[name]) for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):  # it accepts only one group
            held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
            every = frozenset().union(*(found.get(key, frozenset()) for key in held))
            found |= dict.fromkeys(held, every)
    return found
