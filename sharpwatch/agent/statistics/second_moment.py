"""Reads the second moment of a parameter's gradient from the state of Adam and its relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sharpwatch.agent.optimizers.layout import StepTensors
from sharpwatch.curvature.parameters.shards import local_tensor


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
