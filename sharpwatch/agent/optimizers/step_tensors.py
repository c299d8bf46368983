"""The tensors that an optimizer steps on: weights, gradients, and the second moments in its state.

They are with the parameters, or where a backend keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sharpwatch.blocks import Part
from sharpwatch.curvature.parameters.shards import Shard, local_gradient, local_tensor, needs_redistribution


class LocalEntries(Protocol):
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

    def local_entries(self, parameters: Mapping[str, Tensor]) -> dict[str, LocalEntries]:
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
        # Plain tensors pass by what reads shards, which made the tap of a plain model an eighth slower.
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


@dataclass(slots=True)
class SecondMoments:
    """Reads v and its bias correction from optimizer states, without waiting for a device at every step."""

    # By parameter id: the step counter on a device, and its value.
    _steps: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def read_all(
        self, parameters: Sequence[Tensor], tensors: Sequence[StepTensors | None]
    ) -> list[tuple[Tensor | None, float]]:
        """`read` for each parameter that has a dense gradient, a state and a group; (None, 1.0) for the others."""
        return [
            self.read(parameter, held.group, held.state, held.like.shape)
            if held is not None
            and held.state
            and held.group is not None
            and held.gradient is not None
            and not held.gradient.is_sparse
            else (None, 1.0)
            for parameter, held in zip(parameters, tensors, strict=True)
        ]

    def read(
        self, parameter: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], shape: torch.Size
    ) -> tuple[Tensor | None, float]:
        """Read the second moment that the optimizer holds before its step t.

        It is `max_exp_avg_sq` or `exp_avg_sq` of Adam, and `square_avg` of RMSprop, which has no bias correction.

        Args:
            parameter: The parameter that is stepped.
            group: The options that it is stepped with.
            state: Its state.
            shape: The shape that a second moment by entry has.

        Returns:
            This rank's part of v of step t-1, or None if there is none by entry, and 1 - β₂^(t-1).
        """
        second, correction = state.get("square_avg"), 1.0
        # Adafactor's moment has no betas, Adan's has three; Prodigy's is in units of its d.
        if len(group.get("betas", ())) == 2 and "d" not in group:
            steps = self._step_of(parameter, state.get("step", group.get("k", 0)))  # schedule-free counts by group
            second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))  # AMSGrad divides by the maximum
            correction = 1.0 - float(group["betas"][1]) ** steps
        if not isinstance(second, Tensor) or second.shape != shape or correction <= 0:
            return None, 1.0
        own = second if type(second) is Tensor else local_tensor(second)
        return (own, correction) if type(own) is Tensor else (None, 1.0)  # a quantised one is a subclass

    def _step_of(self, parameter: Tensor, step: float | Tensor) -> int:
        """The step count of a state. One on a device is read once, and after a reload, and else incremented here."""
        if not isinstance(step, Tensor) or step.device.type == "cpu":
            return int(step)
        counter, count = self._steps.get(id(parameter), (None, 0))
        count = count + 1 if counter is step else int(step.item())
        self._steps[id(parameter)] = (step, count)
        return count
