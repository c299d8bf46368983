"""A watched run: what its loop calls, and a step's life as the hooks tell of it."""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from sharpwatch.agent.control.commands import RollbackRequest
from sharpwatch.agent.control.lr_multipliers import LrMultipliers
from sharpwatch.agent.distributed.aggregator import RecordAggregator
from sharpwatch.agent.instrumentation.hooks import Hooks
from sharpwatch.agent.optimizers.parameter_identity import ParameterIdentity
from sharpwatch.agent.parts import Parts
from sharpwatch.agent.probes.scheduler import DueProbes, ProbeScheduler
from sharpwatch.agent.reporting import messages
from sharpwatch.agent.reporting.pending import FORWARDS, Losses, StepRecord
from sharpwatch.agent.reporting.reporter import Reporter
from sharpwatch.agent.safety.overhead_timer import OverheadTimer
from sharpwatch.agent.safety.signals import signals_held
from sharpwatch.agent.statistics.tap import PendingTap
from sharpwatch.agent.status import announcement, collect
from sharpwatch.v1 import types_pb2

_STATE_VERSION = 1
_TOO_LATE = "a rank had not heard in time that all know of it, so none takes it"
_LOG = logging.getLogger("sharpwatch")


@dataclass(slots=True)
class _StepInProgress:
    """One step under way: complete when every optimizer has stepped."""

    step: int
    tap: PendingTap
    due: DueProbes | None = None  # until the first gradients stand
    read: set[int] = field(default_factory=set)  # optimizers whose tap succeeded
    stepped: set[int] = field(default_factory=set)


class WatchedRun:
    """A watched run, from `attach` to `close`."""

    def __init__(self, parts: Parts) -> None:
        self._closed = True  # until everything stands
        self._pid = os.getpid()
        self.parts = parts
        self.border = parts.border
        self.run = parts.identity.run
        self.step = parts.identity.initial_step  # optimizer steps that took effect
        self.stopwatch = OverheadTimer()
        self.rates = LrMultipliers(parts.optimizers, parts.parameter_types, parts.control)
        self._shared = parts.shared
        self._losses = Losses()
        self._roster = ParameterIdentity(parts.model)
        self._samples = Reporter(parts)
        self._probing = ProbeScheduler(parts)
        self._announced = False
        self._begun = False  # whether there was a forward or a step
        self._restored = False  # since the last step, where that is told with the next one's record
        self._round: _StepInProgress | None = None
        self._request: RollbackRequest | None = None
        self._hooks = Hooks(self, parts.model, parts.optimizers)
        self._at_exit = _close_at_exit(self)
        atexit.register(self._at_exit)
        self._closed = False

    # What the loop calls.

    @property
    def closed(self) -> bool:
        """Whether nothing is watched any more."""
        return self._closed

    @property
    def last_probe_steps(self) -> Mapping[str, int]:
        """The step at which each probe last ran, by its name."""
        return self._probing.last_steps

    def observe(self, loss: float | Tensor) -> None:
        """The step's loss."""
        if self._hooks.repeating:
            return
        late = self._losses.observe(loss)
        if late is None:
            return
        if self._shared is None:
            self._samples.outbox.late_loss(late)
        else:
            self._shared.late_loss(late)

    def checkpoint(self, step: int, uri: str) -> None:
        """A checkpoint of `step` stands at `uri`."""
        self._samples.checkpoint(step, uri)

    def restored(self, step: int) -> None:
        """The run stands at `step` again."""
        if self._shared is None:
            self._samples.restored()
        else:
            self._restored = True
        self.step = step
        self._round = None
        self._probing.forget()
        self.stopwatch.stop()  # restoring is no part of a step
        self.parts.control.rolled_back(step)

    def state_dict(self) -> dict[str, Any]:
        """Where this run stands, as plain values."""
        parts = self.parts
        return {
            "version": _STATE_VERSION,
            "training_job": parts.identity.training_job,
            "run": self.run,
            "step": self.step,
            "control": parts.control.state_dict(),
            "sampler": parts.sampler.state_dict(),
            "probes": parts.probes.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be the run that made `state`, unless it is another's or this one has begun."""
        parts, identity = self.parts, self.parts.identity
        if self._begun:
            return  # a rollback: what is in force now stays
        if not self._takes(state):
            if state:
                _LOG.warning("the agent's state is not taken up: not all ranks were given the same")
            return
        version = state.get("version")
        if version != _STATE_VERSION:
            raise ValueError(f"an agent's state of version {version}: this agent reads {_STATE_VERSION}")
        given = (identity.training_job, self.run if parts.named else state["run"])
        if given != (state["training_job"], state["run"]):
            _LOG.info("the state is of run %s of %s: this is another", state["run"], state["training_job"])
            return
        step = int(state["step"])
        parts.control.load_state_dict(state["control"])
        parts.sampler.load_state_dict(state["sampler"])
        parts.probes.load_state_dict(state["probes"])
        self.run, self.step = str(state["run"]), step
        parts.pipe.greet(messages.hello(replace(identity, run=self.run, initial_step=step), parts.block_map))
        self._probing.begin()
        self.rates.wrap_steps(self._hooks.innermost)

    def _takes(self, state: Mapping[str, Any]) -> bool:
        """Whether there is a state, and all ranks are given it, or its equal in what must be alike on them."""
        meeting = self.parts.meeting
        if meeting is None:
            return bool(state)
        own = {"sampler"} if self.parts.together else {"sampler", "probes"}  # what this rank alone has run
        try:
            alike = [sorted(state), {key: value for key, value in state.items() if key not in own}]
            text = json.dumps(alike, sort_keys=True) if state else ""
        except (TypeError, ValueError):
            text = ""  # not what this agent has made
        return meeting.takes(hashlib.sha256(text.encode()).hexdigest() if text else "")

    def _start(self) -> None:
        """The run begins: no state can be taken up any more, and other ranks need not wait for one."""
        if not self._begun:
            self._begun = True
            if self.parts.meeting is not None:
                self.parts.meeting.takes("")

    def close(self, *, in_order: bool) -> None:
        """Take every hook away and let the courier finish; a goodbye is said only to a loop that ended in order."""
        if self._closed:
            return
        with signals_held():  # Ctrl-C would leave hooks, or the courier, that nobody ends any more
            self._let_go()
            if os.getpid() != self._pid:
                return  # a fork's copy: the courier is its parent's
            try:
                with self.border.guard("sending the last samples"):
                    self._take_leave(in_order=in_order)
            finally:  # also for who insists
                with self.border.guard("closing the courier's pipe"):
                    self.parts.pipe.close()

    def _let_go(self) -> None:
        """Leave model, optimizers and gradients as they were."""
        self._closed = True
        atexit.unregister(self._at_exit)
        with self.border.guard("removing the gradients' hooks"):
            self._probing.close()
        for handle in self._hooks.handles:
            with self.border.guard("removing a hook"):
                handle.remove()
        self.rates.close(self.border)

    def _take_leave(self, *, in_order: bool) -> None:
        """Tell what has not been told."""
        if self._shared is not None:
            self._pass_on(self._shared.leave(self.step))
        if self._restored:
            self._samples.restored()
        self._samples.outbox.flush(wait=True)
        if in_order or self.parts.control.has_results:
            self._samples.send_news(self.step, closing=in_order)

    def __del__(self) -> None:
        self.close(in_order=True)  # model and optimizers went away, and this with them

    # A step's life, as hooks.Steps.

    def idle(self) -> bool:
        """Whether what happens is none of the run's: a probe's own forward, a forked child's, or after the end."""
        return self._closed or self._probing.running or os.getpid() != self._pid

    @contextmanager
    def ours(self, doing: str) -> Iterator[None]:
        """The body is the agent's own work: what it raises ends here, its seconds are counted."""
        with self.border.guard(doing), self.stopwatch.agent():
            yield

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model is called in training."""
        self._start()
        self.stopwatch.start()
        if self._losses.forward() == FORWARDS:
            _LOG.warning("%d forwards without a step of a watched optimizer: attach again where it is new", FORWARDS)
        self._samples.outbox.begin()
        if self._shared is not None:
            self._shared.forward()
        self._probing.forward(args, kwargs)

    def output(self, output: Any) -> None:
        """What it returned: maybe with its loss."""
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.output(loss)

    def begin(self, which: int) -> None:
        """Optimizer `which` begins a `step()`.

        A round is over when all optimizers have stepped, or when one of them steps again: it then was a step that
        not all took part in (a generator and a discriminator in turn, one optimizer's warm-up).
        """
        if self._round is not None and which in self._round.stepped:
            for other in set(range(len(self.parts.optimizers))) - self._round.stepped - self._round.read:
                with self.border.guard("reading the tap"):
                    self.read(other)
            self._complete(self._round)
        if self._round is None:
            self._start()
            self._samples.outbox.begin()
            step = self.step + 1
            if self._shared is not None:
                self._take(self._shared, step)
            self.parts.control.begin(step, self._clock())
            self._round = _StepInProgress(step, self.parts.tap.start(self.rates.multipliers()))

    def read(self, which: int) -> None:
        """The gradients stand that optimizer `which` steps on."""
        now = self._round
        if now is None:
            return
        if now.due is None:
            now.due = self._probing.prepare()
        if which in now.read:  # its step() raised, or calls another: the newest reading counts, once
            now.tap, now.read = self.parts.tap.start(self.rates.multipliers()), set()
        self.parts.tap.read(now.tap, which)
        now.read.add(which)

    def end(self, which: int) -> None:
        """The `step()` of optimizer `which` has ended."""
        if self._round is not None:
            self._round.stepped.add(which)
            if len(self._round.stepped) == len(self.parts.optimizers):
                self._complete(self._round)

    def go_back(self) -> None:
        """Do the rollback that is due, where the user said how; what that raises is the loop's."""
        request, self._request = self._request, None
        if request is None or self.parts.on_rollback is None:
            return
        try:
            self.parts.on_rollback(request)
        except BaseException as error:
            with self.border.guard("reporting a failed rollback"):
                self.parts.control.rollback_failed(self.step, f"{type(error).__name__}: {error}")
                self._samples.outbox.flush(wait=True)
                self._samples.send_news(self.step)
            raise
        with self.border.guard("ending a rollback"):
            if self.parts.control.pending_rollback is not None:
                self.restored(request.step)

    def _complete(self, done: _StepInProgress) -> None:
        with signals_held():  # one that raises would end this half-way, and a sample be lost
            self._conclude(done)

    def _conclude(self, done: _StepInProgress) -> None:
        self._round = None
        self.step = done.step
        tap = done.tap if len(done.read) == len(self.parts.optimizers) else None  # half a reading: false zeros
        probes = self._probing.run(done.step, done.due or DueProbes(), tap)
        losses = self._losses.take()
        record = StepRecord(done.step, time.time_ns(), tap, probes, losses, restored=self._restored)
        self._restored = False
        commands = [response.command for response in self.parts.pipe.receive() if response.HasField("command")]
        self._probing.account(self.stopwatch.lap(), probes.seconds)
        if self._shared is None:
            for command in commands:
                self.parts.control.receive(messages.command(command), self.step + 1)
            self._samples.outbox.add(record, wait_for_loss=not losses or self._losses.comes_after_step)
        else:
            self._share(self._shared, record, commands)
        if not self._announced:
            self._announce()
        self._request = self.parts.control.end(done.step, self._clock()) or self._request
        expecting = self._shared is not None and self._shared.ranks.expecting
        self.rates.wrap_steps(self._hooks.innermost, command_expected=expecting)
        replaced = self._roster.replaced(done.step)
        if replaced:
            _LOG.warning("%s was replaced: the watch ends, as it would go on with the old one; attach again", replaced)
            self.close(in_order=True)

    def _announce(self) -> None:
        """Log what is watched, once, after the first step; on several ranks the leading one does."""
        self._announced = True
        if self._shared is None or self._shared.ranks.leads:
            with self.border.guard("announcing the run"):
                _LOG.info("%s", announcement(collect(self)))

    def _share(self, shared: RecordAggregator, record: StepRecord, commands: Sequence[types_pb2.Command]) -> None:
        """Say what this step brought, and hear what all have said of earlier ones."""
        records = shared.end(
            record,
            messages=[command.SerializeToString() for command in commands],
            kinds=self._probing.wish,
            swallowed_errors=self.border.swallowed,
        )
        self._pass_on(records)
        self._probing.agree(shared.kinds, leads=shared.ranks.leads)

    def _pass_on(self, records: Iterable[StepRecord]) -> None:
        for record in records:
            if record.restored:
                self._samples.restored()
            self._samples.outbox.add(record, wait_for_loss=False)

    def _take(self, shared: RecordAggregator, step: int) -> None:
        """Commands that all ranks take before `step`, or none of them."""
        for each, taken in shared.take():
            command = messages.command(types_pb2.Command.FromString(each))
            if taken:
                self.parts.control.receive(command, step)
            else:
                self.parts.control.refuse(command, step, _TOO_LATE)

    def _clock(self) -> int:
        """The time that commands expire by: the same on all ranks."""
        return time.time_ns() if self._shared is None else self._shared.clock


def _close_at_exit(loop: WatchedRun) -> Callable[[], None]:
    reference = weakref.ref(loop)

    def close() -> None:
        alive = reference()
        if alive is not None:
            # The interpreter leaves an error that ended the program in sys.last_value.
            alive.close(in_order=getattr(sys, "last_value", None) is None)

    return close
