"""Where the tensors that an optimizer steps on are: with the parameters, or where a backend keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sharpwatch.blocks import Part
from sharpwatch.curvature.parameters.shards import Shard, local_gradient, local_tensor, needs_redistribution


class Holding(Protocol):
    """Which entries of a parameter this rank steps."""

    @property
    def numel(self) -> int:
        """How many."""

    @property
    def is_whole(self) -> bool:
        """Whether they are all of the parameter."""

    def views(self, part: Part, held: Tensor, /) -> Sequence[Tensor]:
        """Views of `held`, a tensor of these entries, that have each entry of `part` once."""


class StepTensors(NamedTuple):
    """The tensors of one parameter right before its step: what this rank holds of them, all of one shape.

    `scattered`: each rank has a sum of its own for the gradient, which only the optimizer adds up.
    """

    weight: Tensor
    gradient: Tensor | None
    group: Mapping[str, Any] | None
    state: Mapping[str, Any] | None
    like: Tensor  # has the shape of the optimizer's moments
    scattered: bool = False


class Layout:
    """The layout of torch's own optimizers: whole parameters or DTensors, with their gradients until the step.

    A backend that keeps gradients elsewhere overrides it.
    """

    unreadable = ""  # why gradient norms can't be read; empty where they can
    fragmented = False  # whether each rank steps a piece of every parameter that all ranks hold
    gradients_in_place = True  # whether `parameter.grad` is what the optimizer steps on

    def holdings(self, parameters: Mapping[str, Tensor]) -> dict[str, Holding]:
        """The entries of each parameter that this rank steps. Raises `BlockError` for a placement without entries."""
        return {name: Shard.of(parameter) for name, parameter in parameters.items()}

    def all_tensors(
        self, parameters: Iterable[tuple[Tensor, int | None]], optimizer: torch.optim.Optimizer
    ) -> list[StepTensors | None]:
        """`tensors` of each of `parameters`, given with the number of its group."""
        return [self.tensors(parameter, optimizer, group) for parameter, group in parameters]

    def tensors(self, parameter: Tensor, optimizer: torch.optim.Optimizer, group: int | None) -> StepTensors | None:
        """What `optimizer` steps `parameter` on, in its group of that number; None if this rank has none of it."""
        options = None if group is None else optimizer.param_groups[group]
        state = optimizer.state.get(parameter)  # `get`: the defaultdict must not grow
        gradient = parameter.grad
        if type(parameter) is nn.Parameter and (gradient is None or type(gradient) is Tensor):  # most are
            return StepTensors(parameter, gradient, options, state, parameter)
        scattered = needs_redistribution(parameter)
        gradient = None if scattered else local_gradient(parameter)
        return StepTensors(local_tensor(parameter), gradient, options, state, parameter, scattered)

    def is_hidden(self, which: int) -> bool:
        """Whether the gradients of optimizer `which` can't be read."""
        del which
        return False

    def clip_norms(self) -> Mapping[int, float]:
        """By optimizer: the norm to which it clips all its gradients together within its `step()`."""
        return {}
