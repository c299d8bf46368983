"""Applies the multipliers that a `Controller` has in force to the parameter groups of the optimizers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from sharpwatch.agent.control.controller import Controller, smallest_multiplier
from sharpwatch.agent.control.param_group_override import ParamGroupOverride
from sharpwatch.agent.safety import ExceptionBarrier
from sharpwatch.blocks import BlockMap


class LrMultipliers:
    """Scales the learning rates of each `step()` by the multipliers of `control`.

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
        if by_type != self._cache[0]:
            each = {key: smallest_multiplier(types, by_type) for key, types in self._parameter_types.items()}
            self._cache = (dict(by_type), {key: value for key, value in each.items() if value != 1.0})
        return self._cache[1]

    def apply(self, which: int, multipliers: Mapping[int, float]) -> None:
        """Split the parameter groups of an optimizer by `multipliers`."""
        self._overrides[which].apply(multipliers)

    def restore(self, which: int) -> Mapping[int, float]:
        """Restore the optimizer's own groups; returns the multipliers that were applied until now."""
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
