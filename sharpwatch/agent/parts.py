"""What a watch is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sharpwatch.agent.control.commands import RollbackRequest
from sharpwatch.agent.control.controller import Controller
from sharpwatch.agent.distributed.aggregator import RecordAggregator
from sharpwatch.agent.distributed.rendezvous import Rendezvous
from sharpwatch.agent.probes.budget import OverheadBudget
from sharpwatch.agent.probes.runner import ProbeRunner
from sharpwatch.agent.reporting.messages import Identity
from sharpwatch.agent.safety.exception_barrier import ExceptionBarrier
from sharpwatch.agent.statistics.tap import Tap
from sharpwatch.agent.transport.base import Transport
from sharpwatch.blocks import BlockMap


@dataclass(frozen=True, slots=True)
class Parts:
    """What a watch is made of. `named`: the user gave the run its name."""

    identity: Identity
    named: bool
    block_map: BlockMap
    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    parameter_types: Mapping[int, frozenset[str]]  # by parameter id: the block types that it holds
    tap: Tap
    probes: ProbeRunner
    sampler: OverheadBudget
    control: Controller
    pipe: Transport
    border: ExceptionBarrier
    on_rollback: Callable[[RollbackRequest], object] | None = None
    shared: RecordAggregator | None = None  # where several ranks train
    meeting: Rendezvous | None = None  # there too

    @property
    def together(self) -> bool:
        """Whether ranks hold the model together, and so probe together."""
        return self.shared is not None and self.shared.sharded
