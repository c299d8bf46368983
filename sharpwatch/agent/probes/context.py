"""What a kind of probe is: the context it is given, the methods it provides, and how it is registered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from google.protobuf.message import Message
from torch import Tensor, nn

from sharpwatch.agent.probes.out_of_memory import copy_weights
from sharpwatch.agent.safety import ExceptionBarrier
from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.rows import RowLayout
from sharpwatch.curvature.parameters.trained import TrainingChange
from sharpwatch.curvature.state.isolation import Functional
from sharpwatch.curvature.statistics.sketch import CountSketch
from sharpwatch.errors import ProbeError, TrainingChangedError


@dataclass(frozen=True, slots=True, eq=False)
class ShardReduction:
    """How ranks that each hold shards of the model add up their results.

    Attributes:
        add: Sums a tensor over all ranks; every rank must call it.
        weights: This rank's weight in the sum, by parameter.
        data_rank: Which share of the batch this rank computes on.
    """

    add: Callable[[Tensor], Tensor]
    weights: Mapping[str, float]
    data_rank: int


def call_model(model: Functional, batch: Batch) -> Any:
    """Call a model on a batch."""
    return model(*batch.args, **batch.kwargs)


@dataclass(frozen=True, slots=True, eq=False)
class ProbeContext:
    """The run that is probed.

    Attributes:
        source: The generator that labels and signs are drawn from; it is seeded before each probe.
        call: Calls what the loop calls: the stand-in for the model, or one method of it.
        finds_loss: Whether `loss_fn` is not the user's, but takes the loss from the output of `call`.
        several_ranks: Whether other ranks train with this one.
        shards: Set where no rank holds whole parameters, so that all ranks probe at once.
    """

    model: nn.Module
    block_map: BlockMap
    optimizers: Sequence[torch.optim.Optimizer]
    sketcher: CountSketch
    source: torch.Generator
    loss_fn: Callable[..., Any] | None = None
    logits_fn: Callable[..., Any] | None = None
    barrier: ExceptionBarrier = field(default_factory=ExceptionBarrier)
    call: Callable[[Functional, Batch], Any] = call_model
    finds_loss: bool = False
    several_ranks: bool = False
    shards: ShardReduction | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, detached."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    @property
    def watched_weights(self) -> dict[str, Tensor]:
        """The parameters of the blocks by name, detached: frozen ones, which no step moves, are none of them."""
        return {name: weight for name, weight in self.weights.items() if name in self.block_map.shapes}

    @property
    def training_change(self) -> TrainingChange:
        """How what is trained differs from what the blocks are made of."""
        return TrainingChange.of(self.model, self.block_map)

    def require_same_training(self) -> None:
        """Raise `TrainingChangedError` where other parameters are trained than the blocks are made of."""
        change = self.training_change
        if change:
            raise TrainingChangedError(f"{change}: sharpness is over what was trained at attach; attach again")

    @property
    def blocks(self) -> tuple[str, ...]:
        """The block types with a trainable parameter."""
        training = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        types = {part.type for part in self.block_map.parts if part.parameter in training}
        return tuple(block for block in self.block_map.blocks if block in types)


@dataclass(slots=True, eq=False)
class ProbedStep:
    """One optimizer step that probes are due after. All of them share it, and with it one copy of the weights.

    Attributes:
        seconds: Time spent for each probe before the step and while it was listening.
        losses: Returns the losses that were observed in the step so far.
        batch_rows: Number of rows of the batch.
        rows: Int64 [n], those of them that the present probe has.
        layout: Where the rows are in what the model is called with, and in what it returns.
        own_loss: Whether the loss in the model's output, if there is any, is trained on.
        gradient_squares: Returns the squared norms [parts] of the gradient that was stepped on; None if it is unknown.
    """

    context: ProbeContext
    seconds: dict[str, float] = field(default_factory=dict)
    losses: Callable[[], Sequence[float]] = tuple
    batch_rows: int = 0
    rows: Tensor | None = None
    layout: RowLayout = field(default_factory=RowLayout)
    own_loss: bool = True
    gradient_squares: Callable[[], npt.NDArray[np.float64]] | None = None
    _asked: bool = False
    _weights: dict[str, Tensor] | None = None
    _displacement: dict[str, Tensor] | None = None

    def keep_weights(self) -> None:
        """Copies the weights before the step, for `displacement`.

        Raises:
            ProbeError: The step may need the memory that the copy would take.
        """
        if not self._asked:
            # Set first: where the copy failed, the next probe of the step must not try it again.
            self._asked = True
            self._weights = copy_weights(self.context.watched_weights, self.context.optimizers)

    @property
    def displacement(self) -> Mapping[str, Tensor]:
        """θ_t − θ_{t+1} by parameter name. It replaces the copy of θ_t, so there never are two."""
        if self._displacement is None:
            copies = self._weights
            if copies is None:
                raise RuntimeError("the weights could not be copied before the step")
            with torch.no_grad():
                self._displacement = {
                    name: copies.pop(name).sub_(weight) for name, weight in self.context.watched_weights.items()
                }
        return self._displacement


class Probe(ABC):
    """One kind of probe in one run: the base class of all of them.

    For each step that it is due after, `forward` and `output` are called with each forward of the model in training,
    `before_step` when the gradients are complete, and `run` after the step. Only `run` is needed. Where the step does
    not come, `discard` is called.

    Attributes:
        share: The probe gets one row in `share` of the batch; its cost grows with its rows.
        least_rows: It gets no fewer rows, if the batch has them.
        turn: How many times a block has had its turn.
        reason: Why the last run gave no estimate, where it raised no error; else empty.
    """

    share: ClassVar[int] = 8
    least_rows: int = 1
    turn: int = 0
    reason: str = ""

    def __init__(self, context: ProbeContext) -> None:
        self.context = context

    def forward(self) -> None:  # noqa: B027 - most probes have no use for it
        """The model is called in training."""

    def output(self, batch: Batch, output: Any) -> None:  # noqa: B027 - most probes have no use for it
        """The model returned `output` for `batch`, both as the loop has them."""

    def before_step(self, step: ProbedStep) -> None:  # noqa: B027 - most probes have no use for it
        """The gradients of `step` are complete, and no optimizer has stepped yet.

        An error is logged and counted; the probe runs all the same.
        """

    def discard(self) -> None:  # noqa: B027 - most probes have no use for it
        """Forget the step that was being prepared, and remove all hooks."""

    def backward_from_another_loss(self, step: ProbedStep) -> None:
        """The loop does not train on the loss in the model's output, and there is no `loss_fn`; called within `run`.

        Raises:
            ProbeError: This probe can't do without.
        """
        del step
        raise ProbeError("the loop does not train on the loss that the model returns: pass loss_fn")

    @abstractmethod
    def run(self, rows: AbstractContextManager[Batch], step: ProbedStep) -> Any:
        """Probe once, at the present weights.

        Args:
            rows: Enter it to get the rows of the batch. Within it the model may be called: its state, the random
                generators and the batch are restored at its end. A sharded probe enters it where a failure of one rank
                is raised on all.
            step: The step that was just taken.

        Returns:
            The report, which `ProbeSpec.encode` makes a message of. It must not hold memory of an accelerator.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSpec:
    """The registration of one kind of probe with the agent, in `sharpwatch.agent.probes.builtin.PROBES`.

    The daemon has its own: `sharpwatch.daemon.estimation.windows.ReadingSpec`.

    Attributes:
        name: The name in `attach(probes=...)`, which is that of the probe's field in a Sample.
        runner: Makes the probe.
        encode: Makes a message of a report and the seconds that the probe took.
        sharded_runner: Makes the probe where no rank holds whole parameters; None if it can't run there.
        check: Raises `ProbeError` for optimizers that the probe can't work with.
    """

    name: str
    runner: Callable[[ProbeContext], Probe]
    encode: Callable[[Any, float], Message]
    sharded_runner: Callable[[ProbeContext], Probe] | None = None
    check: Callable[[Sequence[torch.optim.Optimizer]], None] | None = None
