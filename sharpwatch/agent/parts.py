"""What a watch is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import nn

from sharpwatch.agent.border import Border
from sharpwatch.agent.control import Control, RollbackRequest
from sharpwatch.agent.meeting import Meeting
from sharpwatch.agent.messages import Identity
from sharpwatch.agent.probes import Probes
from sharpwatch.agent.sampler import Sampler
from sharpwatch.agent.shared import Shared
from sharpwatch.agent.tap import Tap
from sharpwatch.blocks import BlockMap
from sharpwatch.v1 import agent_pb2


class Pipe(Protocol):
    """The way to the courier: nothing here blocks or raises."""

    def greet(self, hello: agent_pb2.Hello, /) -> None:
        """Greet with `hello`; before the first use."""

    @property
    def dropped(self) -> Mapping[str, int]:
        """Samples lost so far, by reason."""

    def send(self, request: agent_pb2.SessionRequest, /) -> None:
        """Queue a message."""

    def receive(self) -> list[agent_pb2.SessionResponse]:
        """What has come in."""

    def close(self) -> None:
        """Let the courier finish; takes at most 2 s."""


class Silence:
    """The pipe of a rank that does not speak to the daemon: another does."""

    dropped: Mapping[str, int] = MappingProxyType({})

    def greet(self, hello: agent_pb2.Hello, /) -> None:
        """As `Pipe.greet`."""

    def send(self, request: agent_pb2.SessionRequest, /) -> None:
        """As `Pipe.send`."""

    def receive(self) -> list[agent_pb2.SessionResponse]:
        """As `Pipe.receive`."""
        return []

    def close(self) -> None:
        """As `Pipe.close`."""


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
    probes: Probes
    sampler: Sampler
    control: Control
    pipe: Pipe
    border: Border
    on_rollback: Callable[[RollbackRequest], object] | None = None
    shared: Shared | None = None  # where several ranks train
    meeting: Meeting | None = None  # there too

    @property
    def together(self) -> bool:
        """Whether ranks hold the model together, and so probe together."""
        return self.shared is not None and self.shared.sharded
