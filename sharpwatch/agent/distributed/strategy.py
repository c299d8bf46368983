"""How the processes that train one model act as one run: a strategy for each way of spreading a model over them.

`SingleProcess` needs no communication. `Replicated`: every rank has the whole model, and rank 0 reports for all.
`DeepSpeed`: every rank has all weights, but steps fragments of them, so that taps are summed. `Sharded`: no rank has
the whole model, so that taps are summed and all ranks probe together. `PipelineParallel`: each rank has a stage of
the model.

A new backend is a subclass of `Strategy`, or of one of these, and a line in `connect`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from sharpwatch.agent.distributed.aggregator import RecordAggregator
from sharpwatch.agent.distributed.channel import RankProgress, StepMessage
from sharpwatch.agent.distributed.commit import COMMIT_DELAY_STEPS
from sharpwatch.agent.distributed.rendezvous import Rendezvous
from sharpwatch.agent.distributed.topology import Topology, gather_topology
from sharpwatch.agent.losses import StepLoss
from sharpwatch.agent.optimizers.split_check import PresentState
from sharpwatch.agent.optimizers.support import interval_refusal, layout_of, lr_refusal
from sharpwatch.agent.options import Options, require_placed
from sharpwatch.agent.probes.context import ShardReduction
from sharpwatch.agent.reporting import StepRecord
from sharpwatch.agent.safety import ExceptionBarrier
from sharpwatch.agent.statistics.tap import Tap
from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.parameters.fsdp import DataRank
from sharpwatch.v1 import types_pb2

_CLOSING_SECONDS = 1.0  # that `close` waits for the last messages
_NOT_IN_LOCK_STEP = (
    "the ranks of this run are not in lock step: a step message was not received by all of them in time, "
    "so that they can't apply a command at the same step"
)
_ANOTHER_OBJECTS = "the optimizer of another rank does not allow it; that rank's log says why"


class DueCommand(NamedTuple):
    """A command to apply now, or to refuse where there is a `refusal`."""

    command: types_pb2.Command
    refusal: str = ""


class EndOfStep(NamedTuple):
    """What is known at the end of a step: the records that are complete, and the commands to receive now."""

    records: Sequence[StepRecord] = ()
    commands: Sequence[types_pb2.Command] = ()


class Strategy:
    """What a watched run asks about the processes that train its model; the answers here are those of one process.

    A run calls `begin` once, for each step `forward`, `begin_step` and `end_step`, and `close` at its end.
    """

    is_rank_zero = True  # whether this process speaks to the daemon
    several_ranks: ClassVar[bool] = False
    may_probe: ClassVar[bool] = True
    probes_from_start: ClassVar[bool] = True  # whether a probe may be due at the first step
    all_ranks_probe: ClassVar[bool] = False  # whether all ranks run a probe at once, on the model that they share
    shard_reduction: ShardReduction | None = None  # how probes that run together add up

    def __init__(
        self, options: Options, block_map: BlockMap, run: str, *, shares: Mapping[str, float], lr_refusal: str
    ) -> None:
        self.run = run
        self.block_map = block_map  # of the whole model
        self.lr_refusal = lr_refusal  # why no learning rate of the run can be changed; empty where they can
        self.interval_refusal = interval_refusal(options.optimizers)  # why no block can be left out of a step
        self.present_state = PresentState(options.optimizers if options.control != "none" else ())
        self.layout = layout_of(options.optimizers)
        parameters = dict(options.model.named_parameters())
        self.tap = Tap(block_map, parameters, options.optimizers, shares, self.layout)
        self._newest: StepRecord | None = None

    @property
    def expects_command(self) -> bool:
        """Whether a command may be committed right before the next step."""
        return False

    def check_lr(self) -> str:
        """As `lr_refusal`, by what the optimizers hold before rates are changed; the same on all ranks."""
        return self.lr_refusal or self.present_state.check()

    def wait_for_start(self) -> None:
        """Wait until every rank can be watched. Raises `AttachError` where one can't."""

    def agree_on_state(self, state: Mapping[str, Any]) -> bool:
        """Whether there is a state to load, and every rank is given the same."""
        return bool(state)

    def begin(self) -> None:
        """The run begins: no state is loaded any more."""

    def forward(self) -> None:
        """The model is called in training."""

    def begin_step(self) -> Sequence[DueCommand]:
        """The commands that are decided for before the step to come: the same on all ranks."""
        return ()

    def end_step(
        self, record: StepRecord, commands: Sequence[types_pb2.Command], *, due_probes: int, swallowed_errors: int
    ) -> EndOfStep:
        """A step is over. `commands` have come from the daemon; `due_probes` has a bit for each probe found due."""
        del due_probes, swallowed_errors
        self._newest = record
        return EndOfStep([record], commands)

    def late_loss(self, loss: StepLoss) -> None:
        """The loss of the newest step has come after it."""
        if self._newest is not None:
            self._newest.late_loss(loss)

    def close(self, step: int) -> Sequence[StepRecord]:
        """End the run after `step`; returns the pending records."""
        del step
        return ()

    def clock(self) -> int:
        """The time that commands expire by, the same on all ranks; unix ns."""
        return time.time_ns()

    def swallowed_errors(self, own: int) -> int:
        """The swallowed errors of all ranks, where this one has `own`."""
        return own

    def due_probes(self, planned: tuple[str, ...], names: Sequence[str]) -> tuple[str, ...]:
        """Those of `names` to run after the next step, where this rank has `planned` some."""
        del names
        return planned

    def all_ready(self, step: int, has_batch: bool, has_room: Callable[[], bool]) -> bool:
        """Whether every rank that takes part in a probe after `step` has seen a batch, and has memory for it."""
        del step, has_room
        return has_batch


class SingleProcess(Strategy):
    """One process trains the model: it knows everything at once."""

    def __init__(self, options: Options, block_map: BlockMap, run: str) -> None:
        reason = lr_refusal(options.optimizers, check_split=options.control != "none")
        super().__init__(options, block_map, run, shares={}, lr_refusal=reason)


class Replicated(Strategy):
    """Several processes, each with the whole model: rank 0's tap is everyone's, and rank 0 probes alone."""

    sums_taps: ClassVar[bool] = False
    probes_from_start = False
    several_ranks = True
    # Whether all ranks call one model together, so that no step of theirs is over before it has begun on all.
    lock_step: ClassVar[bool] = False

    def __init__(self, options: Options, topology: Topology, rendezvous: Rendezvous, barrier: ExceptionBarrier) -> None:
        shares, reason = topology.shares, topology.lr_refusal
        super().__init__(options, topology.block_map, topology.run, shares=shares, lr_refusal=reason)
        self.interval_refusal = topology.interval_refusal
        self.ranks = topology.ranks
        self.is_rank_zero = self.ranks.is_rank_zero
        self.ranks.object_to(self._objects_to)
        self._rendezvous = rendezvous
        # A loss may come late, and an accelerator's numbers are a step further behind.
        lag = 1 if next(options.model.parameters()).device.type == "cpu" else 2
        self._records = RecordAggregator(
            self.tap, barrier, summed=self.sums_taps, is_rank_zero=self.is_rank_zero, lag=lag
        )
        self._forwards = 0
        self._objection = ""  # of this rank to the command under way
        self._clock = 0  # rank 0's in the message that committed the newest command
        self._swallowed_errors = 0

    @property
    def expects_command(self) -> bool:
        """As `Strategy.expects_command`."""
        return self.ranks.expecting

    def check_lr(self) -> str:
        """As `Strategy.check_lr`: what they hold is checked as ranks commit a command."""
        return self.lr_refusal

    def wait_for_start(self) -> None:
        """As `Strategy.wait_for_start`."""
        self._rendezvous.wait_for_all("the start")

    def agree_on_state(self, state: Mapping[str, Any]) -> bool:
        """As `Strategy.agree_on_state`; the same in what must be alike on all ranks."""
        # Costs are measured by each rank's own clock, so the sampler's state differs between ranks that agree.
        own = {"sampler"} if self.all_ranks_probe else {"sampler", "probes"}  # what this rank alone has run
        try:
            objection = self.present_state.check() if state else ""
            alike = [sorted(state), {key: value for key, value in state.items() if key not in own}, bool(objection)]
            text = json.dumps(alike, sort_keys=True) if state else ""
        except (TypeError, ValueError):
            text = ""  # not made by this agent
        agreed = self._rendezvous.agree(hashlib.sha256(text.encode()).hexdigest() if text else "")
        if agreed and text:
            self.lr_refusal = self.lr_refusal or objection
        return agreed

    def begin(self) -> None:
        """As `Strategy.begin`; the other ranks need not wait for a state."""
        self._rendezvous.agree("")

    def forward(self) -> None:
        """As `Strategy.forward`."""
        self._forwards += self.lock_step  # else ranks may differ in it

    def begin_step(self) -> Sequence[DueCommand]:
        """As `Strategy.begin_step`."""
        due = []
        for each in self.ranks.committed():
            # Rank 0's clock for all, or a command might expire on one rank and be applied on another.
            self._clock = each.clock_unix_ns
            refusal = f"learning rates can't be changed: {self._objection or _ANOTHER_OBJECTS}"
            due += [
                DueCommand(command, refusal if each.objected and command.HasField("set_multipliers") else "")
                for command in _unpacked(each.command)
            ]
        for packed in self.ranks.refused():
            due += [DueCommand(command, _NOT_IN_LOCK_STEP) for command in _unpacked(packed)]
        return due

    def end_step(
        self, record: StepRecord, commands: Sequence[types_pb2.Command], *, due_probes: int, swallowed_errors: int
    ) -> EndOfStep:
        """As `Strategy.end_step`."""
        if commands:
            self.ranks.propose(_packed(commands))
        self._records.add(record)
        progress = RankProgress(record.step, self._forwards)
        own = StepMessage(progress, time.time_ns(), due_probes, swallowed_errors=swallowed_errors)
        return EndOfStep(self._exchange(self._records.fill(own), lock_step=self.lock_step))

    def late_loss(self, loss: StepLoss) -> None:
        """As `Strategy.late_loss`."""
        self._records.late_loss(loss)

    def close(self, step: int) -> Sequence[StepRecord]:
        """As `Strategy.close`: records that are complete within a second, then the others as this rank knows them."""
        records = []
        # As many messages as records still wait for their turn; each message carries one.
        for _ in range(self._records.lag):
            own = StepMessage(RankProgress(step, self._forwards), time.time_ns())
            records += self._exchange(self._records.fill(own, closing=True))
        for message in self.ranks.drain(_CLOSING_SECONDS):
            records += self._completed(message)
        return [*records, *self._records.remaining()]

    def clock(self) -> int:
        """As `Strategy.clock`."""
        return self._clock

    def swallowed_errors(self, own: int) -> int:
        """As `Strategy.swallowed_errors`; as of the newest message."""
        del own
        return self._swallowed_errors

    def due_probes(self, planned: tuple[str, ...], names: Sequence[str]) -> tuple[str, ...]:
        """As `Strategy.due_probes`: rank 0's."""
        del names
        return planned if self.is_rank_zero else ()

    def _objects_to(self, packed: bytes) -> bool:
        """Whether this rank can't apply one of the commands in `packed`."""
        scales = any(command.HasField("set_multipliers") for command in _unpacked(packed))
        # What was refused at attach is refused on all ranks without this.
        self._objection = self.present_state.check() if scales and not self.lr_refusal else ""
        return bool(self._objection)

    def _exchange(self, own: StepMessage, *, lock_step: bool = False) -> list[StepRecord]:
        records = []
        for message in self.ranks.exchange(own, lock_step=lock_step):
            records += self._completed(message)
        return records + self._records.remaining() if self.ranks.lost else records

    def _completed(self, message: StepMessage) -> list[StepRecord]:
        self._swallowed_errors = message.swallowed_errors
        return self._records.complete(message, self.ranks.size)


class DeepSpeed(Replicated):
    """DeepSpeed's ZeRO 1 or 2 on several processes: each steps fragments of the parameters, whose sums add up."""

    sums_taps = True
    lock_step = True  # floors of a sum must be alike on all


class Sharded(Replicated):
    """FSDP2, tensor parallelism, or FSDP1: ranks hold the model together, and probe it together."""

    sums_taps = True
    lock_step = True
    all_ranks_probe = True

    def __init__(self, options: Options, topology: Topology, rendezvous: Rendezvous, barrier: ExceptionBarrier) -> None:
        super().__init__(options, topology, rendezvous, barrier)
        self.shard_reduction = ShardReduction(self.ranks.sum, topology.shares, DataRank.of(options.model).number)
        # At the first steps no message has been read yet, and every end of a step takes one entry.
        self._due: deque[int] = deque([0] * (COMMIT_DELAY_STEPS - 1))  # rank 0's probes in the newest messages
        self._due_now = 0

    def end_step(
        self, record: StepRecord, commands: Sequence[types_pb2.Command], *, due_probes: int, swallowed_errors: int
    ) -> EndOfStep:
        """As `Strategy.end_step`."""
        ended = super().end_step(record, commands, due_probes=due_probes, swallowed_errors=swallowed_errors)
        self._due_now = 0 if self.ranks.lost else self._due.popleft()
        return ended

    def due_probes(self, planned: tuple[str, ...], names: Sequence[str]) -> tuple[str, ...]:
        """As `Strategy.due_probes`: those that rank 0 found due at an earlier step, on all ranks alike."""
        del planned
        return tuple(name for i, name in enumerate(names) if self._due_now >> i & 1)

    def all_ready(self, step: int, has_batch: bool, has_room: Callable[[], bool]) -> bool:
        """As `Strategy.all_ready`; all ranks get the same answer."""
        return self.ranks.vote(has_batch and has_room(), RankProgress(step, self._forwards))

    def _completed(self, message: StepMessage) -> list[StepRecord]:
        self._due.append(message.due_probes)
        return super()._completed(message)


class PipelineParallel(Replicated):
    """Each process has a stage of the model, with parameters of its own; it is not probed."""

    sums_taps = True
    may_probe = False


def connect(
    rendezvous: Rendezvous,
    options: Options,
    classified: tuple[BlockMap, Mapping[str, str]],
    run: str,
    barrier: ExceptionBarrier,
) -> Strategy:
    """Meet the other processes that train the model, if any; every rank calls this.

    Args:
        rendezvous: where ranks meet.
        options: those of `attach`.
        classified: the blocks of this rank's part of the model, and the user's rules that place nothing in it, with the
            reason.
        run: the name of the run, where this is rank 0.
        barrier: swallows what fails within a step.

    Raises:
        AttachError: on all ranks, where one refuses, or differs in what must be alike.
    """
    block_map, idle_rules = classified
    if rendezvous.alone:
        require_placed([idle_rules], options.rules_source)
        return SingleProcess(options, block_map, run)
    topology = gather_topology(rendezvous, options, block_map, idle_rules, run)
    kind: type[Replicated] = Replicated
    # In this order: staged implies sharded, and sharded implies summed.
    if topology.staged:
        kind = PipelineParallel
    elif topology.sharded:
        kind = Sharded
    elif topology.summed:
        kind = DeepSpeed
    return kind(options, topology, rendezvous, barrier)


def _packed(commands: Sequence[types_pb2.Command]) -> bytes:
    messages = [command.SerializeToString() for command in commands]
    return b"".join(len(each).to_bytes(4, "little") + each for each in messages)


def _unpacked(packed: bytes) -> list[types_pb2.Command]:
    commands = []
    while packed:
        size = int.from_bytes(packed[:4], "little")
        commands.append(types_pb2.Command.FromString(packed[4 : 4 + size]))
        packed = packed[4 + size :]
    return commands
