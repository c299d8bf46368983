"""A watched run, from `attach` to `close`: what the training loop calls, and how hook events drive each step."""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from sharpwatch.agent.calls import OtherCalls
from sharpwatch.agent.control.commands import RollbackRequest, describe_multipliers
from sharpwatch.agent.control.controller import Controller
from sharpwatch.agent.control.lr_multipliers import LrMultipliers
from sharpwatch.agent.distributed.strategy import Strategy
from sharpwatch.agent.forwards import Forwards
from sharpwatch.agent.hooks import CHECK_INTERVAL, Hooks, ParameterIdentity
from sharpwatch.agent.losses import LossTracker
from sharpwatch.agent.options import Options
from sharpwatch.agent.probes.observed import LATE
from sharpwatch.agent.probes.scheduler import DueProbes, ProbeScheduler
from sharpwatch.agent.reporting import Identity, Reporter, StepRecord, hello_message, read_command
from sharpwatch.agent.run_state import Part, load_run_state, run_state
from sharpwatch.agent.safety import ExceptionBarrier, OverheadTimer, agent_work, closed_at_exit, signals_held, warn
from sharpwatch.agent.statistics.clipping import AfterClip
from sharpwatch.agent.statistics.tap import PendingTap
from sharpwatch.agent.status import announcement, collect
from sharpwatch.agent.transport.base import Transport
from sharpwatch.curvature.parameters.trained import TrainingChange
from sharpwatch.v1 import types_pb2

_LOG = logging.getLogger("sharpwatch")


@dataclass(slots=True)
class _StepInProgress:
    """One step under way: complete when every optimizer has stepped."""

    step: int
    tap: PendingTap
    due: DueProbes | None = None  # until the first gradients are there
    read: set[int] = field(default_factory=set)  # optimizers whose tap succeeded
    stepped: set[int] = field(default_factory=set)


class WatchedRun:
    """A watched run, from `attach` to `close`.

    Args:
        options: those of `attach`.
        identity: the run and this attempt at it, as sent to the daemon.
        strategy: how the processes that train the model act as one run.
        control: takes commands.
        scheduler: runs probes.
        reporter: sends samples, over `transport`.
        rates: applies the multipliers of `control`.
        barrier: swallows what the agent raises.
    """

    def __init__(  # noqa: PLR0913 - the pieces of a run, each made by `attach`
        self,
        options: Options,
        identity: Identity,
        strategy: Strategy,
        *,
        control: Controller,
        scheduler: ProbeScheduler,
        reporter: Reporter,
        rates: LrMultipliers,
        transport: Transport,
        barrier: ExceptionBarrier,
    ) -> None:
        self._closed = True  # until everything is there
        self._pid = os.getpid()
        self.run = identity.run
        self.step = identity.initial_step  # optimizer steps that took effect
        self.strategy = strategy
        self.control = control
        self.scheduler = scheduler
        self.rates = rates
        self.transport = transport
        self.barrier = barrier
        self.timer = OverheadTimer()
        self.options = options
        self._identity = identity
        self._reporter = reporter
        self.losses = LossTracker(barrier)
        self.end_reason = ""  # why the watch ended by itself
        self._parameters = ParameterIdentity(options.model)
        self._announced = False
        self._begun = False  # whether there was a forward or a step
        self._restored = False  # since the last step, whose record says so
        self._current: _StepInProgress | None = None
        self._request: RollbackRequest | None = None
        self._hooks = Hooks(self, options.model, options.optimizers)
        self._calls = OtherCalls(options.model, self._hooks)
        self._forwards = Forwards(self.losses, scheduler, self._forward_begins)
        self._at_exit = closed_at_exit(self)
        atexit.register(self._at_exit)
        self._closed = False

    # What the loop calls.

    @property
    def closed(self) -> bool:
        """Whether nothing is watched any more."""
        return self._closed

    @property
    def training_change(self) -> TrainingChange:
        """What was frozen or unfrozen since `attach`."""
        return TrainingChange.of(self.options.model, self.strategy.block_map)

    def observe(
        self, loss: float | Tensor | None, batch: Any = None, gradient_norm: float | Tensor | None = None
    ) -> None:
        """The step's loss, batch and norm of all gradients before clipping; each may be None."""
        if self._hooks.repeating:
            return
        late = None if loss is None and gradient_norm is None else self.losses.observe(loss, gradient_norm)
        if late is not None:
            self.strategy.late_loss(late)
            self._reporter.next_step()
        if batch is not None:
            self._observe_batch(batch, late=late is not None)

    def _observe_batch(self, batch: Any, *, late: bool) -> None:
        if self.options.loss_fn is None and self.options.logits_fn is None:
            self.barrier.warn_once("observe(batch=...) needs attach(loss_fn=...): the batch is not looked at")
            return
        if late:
            self.barrier.warn_once(LATE)
        self.scheduler.observe(batch, late=late)

    def checkpoint(self, step: int, uri: str) -> None:
        """Record that a checkpoint of `step` was saved at `uri`, and which of the earlier ones are gone."""
        self._reporter.checkpoints.saved(step, uri, look=self.strategy.is_rank_zero)  # rank 0 reports for all

    def checkpoint_deleted(self, uri: str) -> None:
        """Record that there is no checkpoint at `uri` any more."""
        self._reporter.checkpoints.deleted(uri)

    def restored(self, step: int) -> None:
        """The run was put back to `step`."""
        self._restored = True
        self._reporter.checkpoints.restored(step)
        self.step = step
        self._current = None
        self.scheduler.forget()
        self.timer.stop()  # restoring is no part of a step
        self.control.rolled_back(step)

    def state_dict(self) -> dict[str, Any]:
        """The state of this run, as plain values."""
        return run_state(replace(self._identity, run=self.run), self.step, self._stateful_parts())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the run that made `state`, unless it is another's, or this one has begun.

        Raises `ValueError` where the agent that made it is too new, and what its parts raise where it is damaged.
        """
        if self._begun:
            return  # a rollback: what is in force now stays
        if not self.strategy.agree_on_state(state):
            if state:
                _LOG.warning("agent state not loaded: not all ranks were given the same state")
            return
        own, is_named = replace(self._identity, run=self.run), self.options.run is not None
        identity = load_run_state(state, own, self._stateful_parts(), is_named=is_named)
        if identity is None:
            return
        self.run, self.step = identity.run, identity.initial_step
        self._log_resumed(state["control"]["target"])
        # No sample has been sent yet, so no courier has opened a session under the old name.
        self.transport.send_hello(hello_message(identity, self.strategy.block_map))
        self.scheduler.begin()
        # The multipliers loaded are in force from the very first step.
        self.rates.wrap_steps(self._hooks.innermost)

    def _log_resumed(self, saved: Mapping[str, float]) -> None:
        """Log which multipliers the run goes on with, and which of the `saved` ones it does not."""
        if not self.strategy.is_rank_zero:
            return
        at = f"run {self.run} goes on from step {self.step}"
        in_force = self.control.targets
        if self.control.may_scale:
            warn("%s with multipliers in force: %s", at, describe_multipliers(in_force, self.control.update_every))
        lost = {block: value for block, value in saved.items() if in_force.get(block, 1.0) != value}
        if lost:
            warn(
                "%s without multipliers that were in force and are not allowed now: %s", at, describe_multipliers(lost)
            )

    def _stateful_parts(self) -> dict[str, Part]:
        return {"control": self.control, "sampler": self.scheduler.budget, "probes": self.scheduler.runner}

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self.strategy.begin()

    def close(self, *, in_order: bool) -> None:
        """Remove every hook and let the courier finish; the last sample says whether the loop ended `in_order`."""
        if self._closed:
            return
        with signals_held():  # Ctrl-C would leave hooks, or the courier, that nobody ends any more
            self._remove_hooks()
            if os.getpid() != self._pid:
                return  # a fork's copy: the courier is its parent's
            try:
                with self.barrier.guard("sending the last samples"):
                    self._send_last(in_order=in_order)
            finally:  # also after a second Ctrl-C
                with self.barrier.guard("closing the courier's pipe"):
                    self.transport.close()

    def _remove_hooks(self) -> None:
        """Leave model, optimizers and gradients as they were."""
        # First, so that a hook that can't be removed does nothing any more.
        self._closed = True
        atexit.unregister(self._at_exit)
        with self.barrier.guard("removing the gradients' hooks"):
            self.scheduler.close()
        for handle in self._hooks.handles:
            with self.barrier.guard("removing a hook"):
                handle.remove()
        with self.barrier.guard("removing a hook"):
            self._calls.close()
        self.rates.close(self.barrier)

    def _send_last(self, *, in_order: bool) -> None:
        self._report(self.strategy.close(self.step))
        if self._restored:
            self._reporter.restored()
        self._reporter.flush(wait=True)
        if in_order or self._reporter.has_events:
            self._reporter.send_events(self.step, closing=in_order)

    def __del__(self) -> None:
        self.close(in_order=True)  # model and optimizers went away, and this with them

    # A step's life, as hooks.Steps.

    def idle(self) -> bool:
        """Whether the run ignores what happens: a probe's own forward, a forked child's, or after the end."""
        return self._closed or self.scheduler.running or os.getpid() != self._pid

    def agent_work(self, doing: str) -> AbstractContextManager[None]:
        """As `safety.agent_work`, of this run."""
        return agent_work(doing, self.barrier, self.timer)

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model is called in training."""
        self._forwards.called(args, kwargs)

    def undecided(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[Any], Callable[[], None]]:
        """The model is called in evaluation mode."""
        return self._forwards.undecided(args, kwargs)

    def output(self, output: Any) -> None:
        """The call returned `output`, maybe with its loss."""
        self._forwards.output(output)

    def _forward_begins(self) -> None:
        self._begin()
        self.timer.start()
        self._reporter.next_step()
        self.strategy.forward()

    def clipping(self, parameters: Sequence[Tensor], max_norm: float, total_norm: Tensor) -> AfterClip | None:
        """Gradients are about to be scaled to a norm of at most `max_norm`."""
        return self.strategy.tap.clips.begin(parameters, max_norm, total_norm)

    def begin(self, which: int) -> None:
        """Optimizer `which` begins a `step()`.

        A step is over when all optimizers have stepped, or when one of them steps again: not all took part in it then
        (a generator and a discriminator in turn, one optimizer's warm-up).
        """
        if self._current is not None and which in self._current.stepped:
            # Those that took no part are read too: a reading without them would show false zeros.
            for other in set(range(len(self.options.optimizers))) - self._current.stepped - self._current.read:
                with self.barrier.guard("reading the tap"):
                    self.read(other)
            self._complete(self._current)
        if self._current is None:
            self._begin()
            if self._calls.active:
                self._calls.step_begins()
            self._reporter.next_step()
            step = self.step + 1
            for due in self.strategy.begin_step():
                self._receive(due.command, step, due.refusal)
            self.control.begin(step, self.strategy.clock())
            self._current = _StepInProgress(step, self.strategy.tap.start(self.rates.multipliers()))

    def read(self, which: int) -> None:
        """Called when the gradients for optimizer `which` are complete."""
        current, tap = self._current, self.strategy.tap
        if current is None:
            return
        if current.due is None:
            current.due = self.scheduler.prepare()
        if which in current.read:  # its step() raised, or calls another: the newest reading counts, once
            current.tap, current.read = tap.start(self.rates.multipliers()), set()
        tap.read(current.tap, which)
        current.read.add(which)

    def end(self, which: int) -> None:
        """The `step()` of optimizer `which` has ended."""
        if self._current is not None:
            self._current.stepped.add(which)
            self.strategy.present_state.stepped.add(which)
            if len(self._current.stepped) == len(self.options.optimizers):
                self._complete(self._current)

    def go_back(self) -> None:
        """Do the rollback that is due, by the user's callback; what that raises reaches the loop."""
        request, self._request = self._request, None
        if request is None or self.options.on_rollback is None:
            return
        try:
            self.options.on_rollback(request)
        # Also Ctrl-C: the daemon must not wait for a rollback that was given up.
        except BaseException as error:
            with self.barrier.guard("reporting a failed rollback"):
                self.control.rollback_failed(self.step, f"{type(error).__name__}: {error}")
                self._reporter.flush(wait=True)
                self._reporter.send_events(self.step)
            raise
        with self.barrier.guard("ending a rollback"):
            if self.control.pending_rollback is not None:
                self.restored(request.step)

    def _complete(self, done: _StepInProgress) -> None:
        """The step `done` was taken. A signal handler that raises in here costs its sample, and nothing else."""
        # First of all: a signal handler that raises further down then costs this step's sample, not its count.
        self.step = done.step
        self._current = None
        # Before probes, which parameters of other shapes would break; where ranks must keep step, at its end.
        if done.due and done.due.names and not self.strategy.several_ranks and self._ended_by_replacement():
            return
        # Half a reading would show false zeros.
        tap = done.tap if len(done.read) == len(self.options.optimizers) else None
        with self.barrier.guard("looking for the model's calls"):
            self.scheduler.look_for(self._calls)
        probes = self.scheduler.run(done.step, done.due or DueProbes(), tap, self.losses.present)
        loss = self.losses.take()
        record = StepRecord(
            done.step,
            time.time_ns(),
            tap,
            probes,
            loss,
            restored=self._restored,
            awaits_loss=not loss.terms or self.losses.comes_after_step,
            groups=tuple(done.tap.groups),
        )
        commands = [
            response.command
            for response in self.transport.receive()
            if response.HasField("command") and not self._is_answered(response.command)
        ]
        # After the probes, whose seconds are this step's, and before the next step is planned with them.
        self.scheduler.account(self.timer.lap(), probes.seconds)
        ended = self.strategy.end_step(
            record, commands, due_probes=self.scheduler.wanted, swallowed_errors=self.barrier.swallowed
        )
        self._restored = False
        for command in ended.commands:
            self._receive(command, self.step + 1)
        self._report(ended.records)
        self.scheduler.agree()
        if not self._announced:
            self._announce()
        self._request = self.control.end(done.step, self.strategy.clock()) or self._request
        self.rates.wrap_steps(self._hooks.innermost, command_expected=self.strategy.expects_command)
        if done.step % CHECK_INTERVAL == 0 and not self._ended_by_replacement():
            change = self.training_change
            if change:  # it stays as it is in what is watched
                self.barrier.warn_once(f"{change}: attach again to measure the curvature of what is trained now")

    def _ended_by_replacement(self) -> bool:
        """End the watch if a parameter was replaced, as it would go on with the old one; returns whether it was."""
        replaced = self._parameters.replaced()
        if replaced:
            self.end_reason = f"{replaced}; attach again"
            _LOG.warning("the watch of run %s ends: %s", self.run, self.end_reason)
            self.close(in_order=True)
        return bool(replaced)

    def _announce(self) -> None:
        """Log what is watched, once, after the first step; on several ranks rank 0 does."""
        self._announced = True
        if self.strategy.is_rank_zero:
            with self.barrier.guard("announcing the run"):
                _LOG.info("%s", announcement(collect(self)))

    def _report(self, records: Iterable[StepRecord]) -> None:
        for record in records:
            self._reporter.add(record)

    def _is_answered(self, command: types_pb2.Command) -> bool:
        """Whether `command` was answered without the other ranks, whose agreement only what is applied needs."""
        if command.refusal:
            self.control.refuse(read_command(command), self.step + 1, command.refusal)
            return True
        return self._fail_if_gone(command)

    def _fail_if_gone(self, command: types_pb2.Command) -> bool:
        """Whether `command` is a rollback to a checkpoint that was deleted, which then has failed on all ranks."""
        uri = command.rollback.checkpoint.uri
        if not uri or not self._reporter.checkpoints.is_gone(uri):
            return False
        self._reporter.checkpoints.deleted(uri)
        return self.control.refuse(read_command(command), self.step + 1, f"{uri} does not exist any more", "failed")

    def _receive(self, command: types_pb2.Command, step: int, refusal: str = "") -> None:
        """Take a command before `step`, or refuse it with a reason."""
        known = read_command(command)
        if refusal:
            self.control.refuse(known, step, refusal)
        else:
            self.control.receive(known, step)
