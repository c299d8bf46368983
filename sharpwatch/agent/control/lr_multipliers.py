"""The learning rates of each step: those of the loop's own groups, under the multipliers in force."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from sharpwatch.agent.control.controller import Controller, effective
from sharpwatch.agent.control.param_group_override import ParamGroupOverride
from sharpwatch.agent.safety.exception_barrier import ExceptionBarrier
from sharpwatch.blocks import BlockMap


class LrMultipliers:
    """Lays the multipliers that `control` has in force over optimizers, by their number.

    `parameter_types`: the block types that a parameter shares its learning rate with, by its id.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        parameter_types: Mapping[int, frozenset[str]],
        control: Controller,
    ) -> None:
        self._overlays = [ParamGroupOverride(optimizer) for optimizer in optimizers]
        self._parameter_types = parameter_types
        self._control = control
        self._known: tuple[Mapping[str, float], Mapping[int, float]] = ({}, {})

    def multipliers(self) -> Mapping[int, float]:
        """By parameter id, only those that differ from 1."""
        multipliers = self._control.multipliers
        if multipliers != self._known[0]:
            each = {key: effective(kinds, multipliers) for key, kinds in self._parameter_types.items()}
            self._known = (dict(multipliers), {key: value for key, value in each.items() if value != 1.0})
        return self._known[1]

    def lay(self, which: int, multipliers: Mapping[int, float]) -> None:
        """Split the groups of optimizer `which` by `multipliers`."""
        self._overlays[which].lay(multipliers)

    def remove(self, which: int) -> Mapping[int, float]:
        """Put the groups of optimizer `which` back as the loop has them; the multipliers that were laid over them."""
        laid = self._overlays[which].laid
        self._overlays[which].remove()
        return laid

    def guard(self, before: Callable[[int], None], *, expecting: bool = False) -> None:
        """See to it that they are put back also when the next `step()` raises, where one may be laid over.

        `before(which)` is called right before such a step. `expecting`: a command may come before it.
        """
        for which, overlay in enumerate(self._overlays):
            overlay.guard(partial(before, which)) if expecting or self._control.armed else overlay.unguard()

    def close(self, border: ExceptionBarrier) -> None:
        """Leave every optimizer as it was."""
        for overlay in self._overlays:
            with border.guard("removing an overlay"):
                overlay.remove()
                overlay.unguard()


def parameter_types(
    model: nn.Module, block_map: BlockMap, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[int, frozenset[str]]:
    """The block types that each parameter shares its learning rate with, by its id."""
    types: dict[str, set[str]] = defaultdict(set)
    for part in block_map.parts:
        types[part.parameter].add(part.type)
    found = {id(parameter): frozenset(types[name]) for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):  # it refuses more than one group
            held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
            every = frozenset().union(*(found.get(key, frozenset()) for key in held))
            found |= dict.fromkeys(held, every)
    return found
