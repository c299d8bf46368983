"""What probes look at: the model, and the step that has just been taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.statistics.sketch import CountSketch


@dataclass(frozen=True, slots=True, eq=False)
class ShardReduction:
    """How ranks that hold a model together add up what they find.

    `add` sums tensors over all ranks, `weights` are this rank's shares by parameter, `data_rank` says which of a
    batch's shares it computes on.
    """

    add: Callable[[Tensor], Tensor]
    weights: Mapping[str, float]
    data_rank: int


@dataclass(frozen=True, slots=True, eq=False)
class ProbeContext:
    """What is probed, and what a probe needs to know of the run; `together` where ranks hold the model together."""

    model: nn.Module
    block_map: BlockMap
    optimizers: Sequence[torch.optim.Optimizer]
    sketcher: CountSketch
    source: torch.Generator  # of labels and signs
    loss_fn: Callable[..., Any] | None
    logits_fn: Callable[..., Any] | None
    together: ShardReduction | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """By parameter name, detached."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    @property
    def blocks(self) -> tuple[str, ...]:
        """The block types that train, which may change during a run."""
        training = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        types = {part.type for part in self.block_map.parts if part.parameter in training}
        return tuple(block for block in self.block_map.blocks if block in types)


@dataclass(slots=True)
class BeforeStep:
    """What is kept of the time before a step for the probes after it, and the seconds that took, by kind of probe."""

    weights: dict[str, Tensor] | None = None
    gradient_sketch: Tensor | None = None
    gradient_noise: npt.NDArray[np.float32] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """The body's seconds are the probe's."""
        started = perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] = self.seconds.get(kind, 0.0) + perf_counter() - started


class TakenStep:
    """The step that probes look at, once it is taken."""

    def __init__(self, subject: ProbeContext, before: BeforeStep) -> None:
        self._subject = subject
        self._before = before

    @cached_property
    def displacement(self) -> Mapping[str, Tensor]:
        """θ_t − θ_{t+1} by parameter name; takes the place of the copy of θ_t."""
        copies = self._before.weights
        if copies is None:
            raise RuntimeError("the weights could not be copied before the step")
        with torch.no_grad():
            return {name: copies.pop(name).sub_(weight) for name, weight in self._subject.weights.items()}

    @property
    def gradient_sketch(self) -> Tensor | None:
        """Of the gradient that was stepped on; on the CPU."""
        sketch = self._before.gradient_sketch
        return None if sketch is None else sketch.cpu()

    @property
    def gradient_noise(self) -> npt.NDArray[np.float32] | None:
        """Tr Cov [L] of the gradient that was stepped on; None where it was not got from several."""
        return self._before.gradient_noise
