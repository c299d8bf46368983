"""Helpers for testing a training loop that sharpwatch watches, without a daemon.

Example: a learning-rate change reaches the optimizer.

    >>> from collections import OrderedDict
    >>> import torch
    >>> import sharpwatch
    >>> from sharpwatch.testing import InMemoryTransport
    >>> model = torch.nn.Sequential(OrderedDict(wte=torch.nn.Embedding(11, 8), lm_head=torch.nn.Linear(8, 11)))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> transport = InMemoryTransport()
    >>> watch = sharpwatch.attach(model, optimizer, training_job="test", probes=(), transport=transport)
    >>> _ = transport.set_multipliers({"emb": 0.5}, apply_at_step=2)
    >>> for _ in range(3):
    ...     model(torch.tensor([1, 2, 3])).sum().backward()
    ...     optimizer.step()
    >>> watch.close()
    >>> [(result.outcome, result.step) for result in transport.results]
    [('applied', 2)]
    >>> transport.samples[-1].health.multipliers["emb"]
    0.5
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from sharpwatch.agent.control.commands import CommandResult
from sharpwatch.agent.transport.base import Connection
from sharpwatch.v1 import agent_pb2, types_pb2

__all__ = ["CommandResult", "InMemoryTransport"]


class InMemoryTransport:
    """Keeps what an agent sends, and gives it the commands of a test.

    Pass it as `attach(..., transport=...)`; no courier is started then and no daemon is needed. On several ranks pass
    one on each: that of rank 0 is used, the others stay empty.

    One transport may serve several watches, one after the other.

    Attributes:
        hellos: The Hello messages: one by `attach`, another where a checkpoint's state is taken up.
        samples: One message for each step, and one at `close`; `sharpwatch.wire.decode` reads their arrays.
        dropped: Samples to report as lost, by reason; a test may fill it.
        closed: Whether the watch was closed.
    """

    def __init__(self) -> None:
        self.hellos: list[agent_pb2.Hello] = []
        self.samples: list[agent_pb2.Sample] = []
        self.dropped: dict[str, int] = {}
        self.closed = False
        self._inbox: list[agent_pb2.SessionResponse] = []
        self._commands = 0

    # What a test reads.

    @property
    def hello(self) -> agent_pb2.Hello | None:
        """The newest Hello; None before `attach`, and on ranks other than 0."""
        return self.hellos[-1] if self.hellos else None

    @property
    def results(self) -> list[CommandResult]:
        """What became of the commands, in the order in which the agent answered."""
        return [_result(result) for sample in self.samples for result in sample.results]

    @property
    def connection(self) -> Connection:
        """Connected while a watch is open; every sample counts as acknowledged."""
        last = self.samples[-1].sequence if self.samples else 0
        return Connection("memory", bool(self.hellos) and not self.closed, acknowledged=last)

    # What a test sends.

    def set_multipliers(
        self,
        multipliers: Mapping[str, float],
        *,
        revision: int = 0,
        ramp_steps: int = 0,
        ttl_steps: int = 0,
        update_every: Mapping[str, int] | None = None,
        **bounds: Any,
    ) -> str:
        """Send a learning-rate change, as the daemon does.

        Args:
            multipliers: The complete set by block type; a block that is not named goes back to 1.
            revision: The number of this set, which the agent reports from then on.
            ramp_steps: Steps over which the multipliers move from the present ones; 0 sets them at once.
            ttl_steps: Steps after which multipliers above 1 return to 1; 0 keeps them.
            update_every: By block type, the number that must divide a step at which it is updated.
            **bounds: Other fields of the command: id, apply_at_step, expires_at_step, expires_at_unix_ns, reason.

        Returns:
            The command's id, by which its result is found in `results`.
        """
        chosen = types_pb2.MultiplierSet(
            multipliers=dict(multipliers),
            revision=revision,
            ramp_steps=ramp_steps,
            ttl_steps=ttl_steps,
            update_every=update_every,
        )
        return self.command(set_multipliers=chosen, **bounds)

    def roll_back(self, step: int, uri: str, *, skip: tuple[int, int] = (0, 0), **bounds: Any) -> str:
        """Send a rollback, as the daemon does.

        Args:
            step: The step of the checkpoint to restore.
            uri: Where that checkpoint is, as `Watch.saved_checkpoint` named it.
            skip: The steps [skip[0], skip[1]) whose batches are left out afterwards.
            **bounds: Other fields of the command: id, apply_at_step, expires_at_step, expires_at_unix_ns, reason.

        Returns:
            The command's id, by which its result is found in `results`.
        """
        rollback = types_pb2.Rollback(
            checkpoint=types_pb2.Checkpoint(step=step, uri=uri), skip_from_step=skip[0], skip_to_step=skip[1]
        )
        return self.command(rollback=rollback, **bounds)

    def command(self, **fields: Any) -> str:
        """Send any command, by the fields of the `Command` message; its id, made up where none is given."""
        self._commands += 1
        message = types_pb2.Command(**{"id": f"command-{self._commands}"} | fields)
        self._inbox.append(agent_pb2.SessionResponse(command=message))
        return message.id

    # What the agent calls.

    def send_hello(self, hello: agent_pb2.Hello, /) -> None:
        """Keep `hello`; a closed transport is open again."""
        self.hellos.append(hello)
        self.closed = False

    def send(self, request: agent_pb2.SessionRequest, /) -> None:
        """Keep the sample of `request`."""
        self.samples.append(request.sample)

    def receive(self) -> list[agent_pb2.SessionResponse]:
        """Return the commands that the test has sent since the last call."""
        commands, self._inbox = self._inbox, []
        return commands

    def close(self) -> None:
        """Note that the watch was closed."""
        self.closed = True


def _result(message: types_pb2.CommandResult) -> CommandResult:
    outcome = types_pb2.CommandOutcome.Name(message.outcome).removeprefix("COMMAND_OUTCOME_").lower()
    return CommandResult(
        command_id=message.command_id,
        outcome=cast("Any", outcome),
        step=message.step,
        detail=message.detail,
        unchanged_blocks=tuple(message.unchanged_blocks),
    )
