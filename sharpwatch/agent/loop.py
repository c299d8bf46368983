"""The agent's side of the training loop: hooks around the forward and the step, and a step's life between them."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sharpwatch.agent import messages
from sharpwatch.agent.closures import Arguments, Closure, through
from sharpwatch.agent.control import RollbackRequest, effective
from sharpwatch.agent.hooks import Hook
from sharpwatch.agent.kinds import MOVING
from sharpwatch.agent.noise import GradientNoise, MicroBatches, averaged_over
from sharpwatch.agent.outbox import Losses, StepRecord
from sharpwatch.agent.overlay import Overlay
from sharpwatch.agent.parts import Parts
from sharpwatch.agent.partsums import GRADIENT
from sharpwatch.agent.probes import Captured, ProbeRun
from sharpwatch.agent.samples import Samples
from sharpwatch.agent.shared import Heard, Shared
from sharpwatch.agent.subject import Before
from sharpwatch.agent.tap import PendingTap
from sharpwatch.v1 import types_pb2

_STATE_VERSION = 1
_LOG = logging.getLogger("sharpwatch")


@dataclass(slots=True)
class _Round:
    """One step under way: complete when every optimizer has stepped."""

    step: int
    tap: PendingTap
    kinds: tuple[str, ...]  # where all ranks probe together, whether a batch was seen is asked of all
    prepared: bool = False
    micro_batches: MicroBatches | None = None
    before: Before = field(default_factory=Before)
    awaited: set[int] = field(default_factory=set)  # optimizers whose gradients their closure has yet to bring
    read: set[int] = field(default_factory=set)  # optimizers whose tap succeeded
    stepped: set[int] = field(default_factory=set)


class Loop:
    """The watched loop: hooks around the forward and the step, and a step's life between them."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.run = parts.identity.run
        self.step = parts.identity.initial_step  # optimizer steps that took effect
        self._closed = True  # until everything stands
        self.border = parts.border
        self._pid = os.getpid()
        self._losses = Losses()
        self._samples = Samples(parts)
        self._begun = False  # whether there was a forward or a step
        self._round: _Round | None = None
        self._shared = parts.shared
        self._kinds = self._planned() if self._shared is None else ()
        self._captured: Captured | None = None
        self._noise = GradientNoise(parts.block_map, parts.model, parts.border, ranks=_averaged(parts))
        self._request: RollbackRequest | None = None
        self._probing = False
        self._again = False  # in a closure that its step has evaluated before
        self._skipped: set[int] = set()  # optimizers in a step() that GradScaler makes void
        self.agent_seconds = 0.0  # since the last complete step, probes apart
        self._mark: float | None = None  # when the last step was complete
        self._laid: tuple[Mapping[str, float], Mapping[int, float]] = ({}, {})
        self._overlays = [Overlay(optimizer) for optimizer in parts.optimizers]
        self._number = {id(optimizer): i for i, optimizer in enumerate(parts.optimizers)}
        self._handles = [
            parts.model.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True),
            parts.model.register_forward_hook(Hook(self._after_forward), with_kwargs=True),
            *(optimizer.register_step_pre_hook(Hook(self._before_step)) for optimizer in parts.optimizers),
            *(optimizer.register_step_post_hook(Hook(self._after_step)) for optimizer in parts.optimizers),
        ]
        self._at_exit = _close_at_exit(self)
        atexit.register(self._at_exit)
        self._closed = False

    # What the loop calls.

    def observe(self, loss: float | Tensor) -> None:
        """The step's loss."""
        if self._again:
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
        if self._shared is not None:
            self._hear(self._shared.rest(self.step))
        self._samples.restored()
        self.step = step
        self._round = self._captured = None
        self._noise.take()
        self._mark = None  # restoring is no part of a step
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
        if state["version"] != _STATE_VERSION:
            raise ValueError(f"an agent's state of version {state['version']}: this agent reads {_STATE_VERSION}")
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
        self._kinds = self._planned() if self._shared is None else ()
        self._guard_overlays()

    def close(self, *, in_order: bool) -> None:
        """Take every hook away and let the courier finish; a goodbye is said only to a loop that ended in order."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        with self.border.guard("removing the gradients' hooks"):
            self._noise.remove()
        for handle in self._handles:
            with self.border.guard("removing a hook"):
                handle.remove()
        for overlay in self._overlays:
            with self.border.guard("removing an overlay"):
                overlay.remove()
                overlay.unguard()
        if os.getpid() != self._pid:
            return  # a fork's copy: the courier is its parent's
        with self.border.guard("sending the last samples"):
            if self._shared is not None:
                self._hear(self._shared.leave(self.step))
            self._samples.outbox.flush(wait=True)
            if in_order:
                self._samples.send_news(self.step, closing=True)
        with self.border.guard("closing the courier's pipe"):
            self.parts.pipe.close()

    def __del__(self) -> None:
        self.close(in_order=True)  # model and optimizers went away, and this with them

    # Hooks.

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._listens(module):
            return
        with self.border.guard("watching a forward"), self._timed():
            self._begun = True
            self._mark = self._mark or time.perf_counter()
            self._losses.forward()
            self._samples.outbox.begin()
            if self._kinds:
                self._captured = self.parts.probes.capture(args, kwargs)
            if "gnb" in self._kinds:
                self._noise.forward()

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        del args, kwargs
        if not self._listens(module):
            return
        with self.border.guard("reading the model's loss"), self._timed():
            loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
            if isinstance(loss, Tensor) and loss.numel() == 1:
                self._losses.output(loss)

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        if self._idle():
            return None
        which, given = self._number[id(optimizer)], None
        with self.border.guard("reading the tap"), self._timed():
            self._skipped.discard(which)
            if _void(optimizer):
                self._skipped.add(which)
                return None
            now = self._begin(which)
            given = through(partial(self._evaluate, which), args, kwargs)
            if given is None:
                self._read(now, which)
            else:
                now.awaited.add(which)
        with self.border.guard("laying learning rates"), self._timed():
            self._overlays[which].lay(self._parameter_multipliers())
        return given

    def _evaluate(self, which: int, closure: Closure, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the closure of a `step()`, which sees the optimizer's own groups.

        The gradients that the first evaluation leaves are the step's; later ones look at other weights.
        """
        if self._idle():
            return closure(*args, **kwargs)
        overlay = self._overlays[which]
        laid = overlay.laid
        with self.border.guard("taking learning rates away"), self._timed():
            overlay.remove()
        again, self._again = self._again, self._awaiting(which) is None
        try:
            result = closure(*args, **kwargs)
        finally:
            self._again = again
        if self._idle():
            return result
        with self.border.guard("reading the tap"), self._timed():
            now = self._awaiting(which)
            if now is not None:
                self._read(now, which)
        with self.border.guard("laying learning rates"), self._timed():
            if laid is not None:
                overlay.lay(laid)
        return result

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        if self._idle():
            return
        which = self._number[id(optimizer)]
        with self.border.guard("taking learning rates away"), self._timed():
            self._overlays[which].remove()
        with self.border.guard("ending a step"):
            if which in self._skipped or self._round is None:
                return
            self._round.stepped.add(which)
            if len(self._round.stepped) == len(self._overlays):
                self._complete(self._round)
        request, self._request = self._request, None
        if request is not None and self.parts.on_rollback is not None:
            self._roll_back(request, self.parts.on_rollback)

    # A step's life.

    def _begin(self, which: int) -> _Round:
        """The round that optimizer `which` steps in.

        A round is over when all optimizers have stepped, or when one of them steps again: it then was a step that
        not all took part in (a generator and a discriminator in turn, one optimizer's warm-up).
        """
        if self._round is not None and which in self._round.stepped:
            for other in set(range(len(self._overlays))) - self._round.stepped - self._round.read:
                with self.border.guard("reading the tap"):
                    self._read(self._round, other)
            self._complete(self._round)
        if self._round is None:
            self._begun = True
            control = self.parts.control
            self._samples.outbox.begin()
            step = self.step + 1
            control.begin(step, self._clock())
            kinds = self._kinds if self.parts.together else ()
            self._round = _Round(step, self.parts.tap.start(self._parameter_multipliers()), kinds)
        return self._round

    def _read(self, now: _Round, which: int) -> None:
        """The gradients stand that optimizer `which` is about to step on."""
        now.awaited.discard(which)
        if not now.prepared:
            self._prepare(now)
        if which in now.read:  # its step() raised, or calls another: the newest reading counts, once
            now.tap, now.read = self.parts.tap.start(self._parameter_multipliers()), set()
        self.parts.tap.read(now.tap, which)
        now.read.add(which)

    def _prepare(self, now: _Round) -> None:
        """Keep of the time before the step what its probes need."""
        now.prepared = True
        now.micro_batches = self._noise.take()
        if self._captured is not None:
            now.kinds = self._kinds
        probes, before = self.parts.probes, now.before
        moving = next((kind for kind in now.kinds if kind in MOVING), None)
        if moving is not None:
            with self.border.guard("copying the weights"), before.spending(moving):
                before.weights = probes.copy_weights()
        if "gnb" in now.kinds:
            with self.border.guard("sketching the gradient"), before.spending("gnb"):
                before.gradient_sketch = probes.sketch_gradient()

    def _complete(self, done: _Round) -> None:
        started = time.perf_counter()
        self._round = None
        self.step = done.step
        tap = done.tap if len(done.read) == len(self._overlays) else None  # half a reading would show false zeros
        if done.micro_batches is not None and tap is not None:
            with self.border.guard("working out the gradient noise"), done.before.spending("gnb"):
                self._work_out_noise(done.micro_batches, tap, done.before)
        probes = self._run_probes(done)
        losses = self._losses.take()
        record = StepRecord(done.step, time.time_ns(), tap, probes, losses)
        commands = [response.command for response in self.parts.pipe.receive() if response.HasField("command")]
        self._account(started, probes.seconds)
        with self._timed():
            if self._shared is None:
                self._receive(commands)
                self._samples.outbox.add(record, wait_for_loss=not losses or self._losses.comes_after_step)
            else:
                self._share(self._shared, record, commands)
            self._request = self.parts.control.end(done.step, self._clock()) or self._request
            self._guard_overlays()

    def _work_out_noise(self, heard: MicroBatches, tap: PendingTap, before: Before) -> None:
        before.seconds["gnb"] = before.seconds.get("gnb", 0.0) + heard.seconds
        before.gradient_noise = heard.noise(self.parts.block_map, self.parts.tap.local(tap)[:, GRADIENT])

    def _receive(self, commands: Iterable[types_pb2.Command]) -> None:
        for command in commands:
            self.parts.control.receive(messages.command(command), self.step + 1)

    def _guard_overlays(self) -> None:
        for overlay in self._overlays:
            overlay.guard() if self.parts.control.armed else overlay.unguard()

    def _share(self, shared: Shared, record: StepRecord, commands: Sequence[types_pb2.Command]) -> None:
        """Say what this step brought, and hear what all have said of an earlier one: the same on every rank."""
        kinds = self.parts.probes.kinds
        heard = shared.end(
            record,
            messages=[command.SerializeToString() for command in commands],
            kinds=sum(1 << kinds.index(kind) for kind in self._kinds),
            swallowed_errors=self.border.swallowed,
        )
        self._hear(heard)
        if shared.sharded:  # all probe together, when rank 0 has said so; else it probes alone
            given_up = self.parts.probes.disabled()  # since it was said, on all ranks alike
            self._kinds = tuple(kind for i, kind in enumerate(kinds) if heard.kinds >> i & 1 and kind not in given_up)
        elif not shared.ranks.leads:
            self._kinds = ()

    def _hear(self, heard: Heard) -> None:
        self._receive(types_pb2.Command.FromString(each) for each in heard.messages)
        for record in heard.records:
            self._samples.outbox.add(record, wait_for_loss=False)

    def _run_probes(self, done: _Round) -> ProbeRun:
        captured, self._captured = self._captured, None
        if not done.kinds or not self._all_ready(captured) or captured is None:
            return ProbeRun()
        self._probing = True
        try:
            probes = self.parts.probes.run(done.kinds, captured, done.before)
        finally:
            self._probing = False
        for kind in self.parts.probes.disabled():
            self.parts.sampler.disable(kind)
        return probes

    def _all_ready(self, captured: Captured | None) -> bool:
        """Whether every rank that is to take part in a probe can."""
        if self._shared is None or not self._shared.sharded:
            return captured is not None
        ready = self._shared.ranks.all(captured is not None and self.parts.probes.has_room())
        if not ready:
            self.parts.sampler.missed()
        return ready

    def _account(self, started: float, probe_seconds: Mapping[str, float]) -> None:
        """Tell the sampler what the step and the agent took, and ask what is due at the next."""
        now = time.perf_counter()
        probing = sum(probe_seconds.values())
        tap_seconds = self.agent_seconds + (now - started) - probing
        if self._mark is not None:
            own = max(0.0, now - self._mark - tap_seconds - probing)
            self.parts.sampler.record(own, max(0.0, tap_seconds), probe_seconds)
        self._mark, self.agent_seconds = now, 0.0
        self._kinds = self._planned()

    def _planned(self) -> tuple[str, ...]:
        """What the sampler wants at the next step; where ranks are told first, at a later one."""
        kinds = self.parts.sampler.plan()
        if self.parts.together:
            self.parts.sampler.started(kinds)
        return kinds

    def _roll_back(self, request: RollbackRequest, on_rollback: Callable[[RollbackRequest], object]) -> None:
        try:
            on_rollback(request)
        except BaseException as error:
            with self.border.guard("telling of a failed rollback"):
                self.parts.control.rollback_failed(self.step, f"{type(error).__name__}: {error}")
                self._samples.outbox.flush(wait=True)
                self._samples.send_news(self.step)
            raise
        with self.border.guard("ending a rollback"):
            if self.parts.control.pending_rollback is not None:
                self.restored(request.step)

    # Small questions.

    def _idle(self) -> bool:
        """Whether this call is none of ours: a probe's own forward, a forked child's, or after the end."""
        return self._closed or self._probing or os.getpid() != self._pid

    def _listens(self, module: nn.Module) -> bool:
        """Whether a forward of `module` is the step's own."""
        return not (self._again or self._idle()) and module.training and torch.is_grad_enabled()

    def _awaiting(self, which: int) -> _Round | None:
        """The round to which the closure of optimizer `which` has yet to bring gradients."""
        return self._round if self._round is not None and which in self._round.awaited else None

    def _clock(self) -> int:
        """The time that commands expire by: the same on all ranks."""
        return time.time_ns() if self._shared is None else self._shared.clock

    def _parameter_multipliers(self) -> Mapping[int, float]:
        """By parameter id, only those that differ from 1."""
        multipliers = self.parts.control.multipliers
        if multipliers != self._laid[0]:
            types = self.parts.parameter_types
            each = {key: effective(kinds, multipliers) for key, kinds in types.items()}
            self._laid = (dict(multipliers), {key: value for key, value in each.items() if value != 1.0})
        return self._laid[1]

    def _timed(self) -> AbstractContextManager[None]:
        return _Stopwatch(self)


class _Stopwatch(AbstractContextManager[None]):
    """Adds the body's seconds to the agent's own."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._loop.agent_seconds += time.perf_counter() - self._started


def _averaged(parts: Parts) -> int:
    """How many ranks' gradients are averaged into each that the optimizer sees; 0 where that can't be told."""
    if parts.shared is None:
        return 1
    return 0 if parts.shared.sharded else averaged_over(parts.model)


def _void(optimizer: torch.optim.Optimizer) -> bool:
    """Whether GradScaler leaves it to a fused `step()` to skip itself; it reads the flag, as GradScaler else would."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item())


def _close_at_exit(loop: Loop) -> Callable[[], None]:
    reference = weakref.ref(loop)

    def close() -> None:
        alive = reference()
        if alive is not None:
            # The interpreter leaves an error that ended the program in sys.last_value.
            alive.close(in_order=getattr(sys, "last_value", None) is None)

    return close
