"""What the daemon may change, decided on the trainer's own side: a pure state machine of commands."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

ControlMode = Literal["none", "lr", "rollback"]
CONTROL_MODES: tuple[ControlMode, ...] = ("none", "lr", "rollback")
_REMEMBERED_IDS = 1024
_WAITING_LIMIT = 64
_TOLD_AT_ONCE = 256  # results in one sample


@dataclass(frozen=True, slots=True)
class RollbackRequest:
    """Go back to the checkpoint of `step` at `uri`; leave out the batches of steps [skip[0], skip[1])."""

    step: int
    uri: str
    skip: tuple[int, int]
    reason: str


@dataclass(frozen=True, slots=True)
class SetMultipliers:
    """The complete set of multipliers by block type; a block that is not named goes to 1."""

    multipliers: Mapping[str, float]
    revision: int = 0
    ramp_steps: int = 0
    ttl_steps: int = 0


@dataclass(frozen=True, slots=True)
class RollBack:
    """Go back to the checkpoint of `step` at `uri`; leave out the batches of steps [skip[0], skip[1])."""

    step: int
    uri: str
    skip: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Command:
    """A decision on its way to the loop; 0 means no bound for the three that bound it."""

    id: str
    action: SetMultipliers | RollBack | None
    apply_at_step: int = 0
    expires_at_step: int = 0
    expires_at_unix_ns: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What became of a command; `step` is the first optimizer step that ran under it."""

    command_id: str
    outcome: Literal["applied", "refused", "expired", "failed"]
    step: int
    detail: str = ""
    unchanged_blocks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Ramp:
    """A geometric way from `start` to `target`, begun at tick `since`."""

    start: Mapping[str, float]
    target: Mapping[str, float]
    since: int
    steps: int

    def at(self, tick: int) -> dict[str, float]:
        done = tick - self.since + 1
        if done >= self.steps:
            return dict(self.target)
        share = done / self.steps
        return {block: a * (self.target[block] / a) ** share for block, a in self.start.items()}


class Controller:
    """Commands in, multipliers and rollback requests out.

    Time is the number of the step (it goes back on a rollback) for everything a command names, and a count of the
    steps really taken (it does not) for ramps and time-outs.
    """

    def __init__(  # noqa: PLR0913 - keyword-only, and what differs between runs
        self,
        mode: ControlMode,
        *,
        bounds: tuple[float, float],
        blocks: Collection[str],
        parameter_types: Collection[frozenset[str]] = (),
        has_callback: bool = False,
        uncontrolled: str = "",
        by_state: Callable[[], str] | None = None,
    ) -> None:
        self.mode = mode
        self.revision = 0
        self.multipliers = dict.fromkeys(blocks, 1.0)
        self.pending_rollback: RollbackRequest | None = None
        self._bounds = bounds
        self._parameter_types = parameter_types
        self._has_callback = has_callback
        self._uncontrolled = uncontrolled  # why no learning rate of this run can be changed
        self._by_state = by_state  # says the same from the optimizers' state, when a command comes
        self._ramp = _Ramp(self.multipliers, self.multipliers, 0, 0)
        self._fade: tuple[int, int] | None = None  # (tick at which raises begin to fade, steps they take)
        self._tick = 0
        self._seen: OrderedDict[str, CommandResult | None] = OrderedDict()
        self._waiting: list[Command] = []
        self._rolling: Command | None = None  # the command behind pending_rollback
        self._results: list[CommandResult] = []

    @property
    def armed(self) -> bool:
        """Whether the next step may run under a multiplier other than 1."""
        waiting = any(isinstance(command.action, SetMultipliers) for command in self._waiting)
        return waiting or any(value != 1.0 for value in (*self.multipliers.values(), *self._ramp.target.values()))

    @property
    def untold(self) -> bool:
        """Whether there are results that were not taken yet."""
        return bool(self._results)

    def receive(self, command: Command, next_step: int) -> None:
        """Take in a command before step `next_step`; an id seen before only has its result told again."""
        if command.id in self._seen:
            known = self._seen[command.id]
            if known is not None:
                self._results.append(known)
            return
        self._seen[command.id] = None
        while len(self._seen) > _REMEMBERED_IDS:
            self._seen.popitem(last=False)
        refusal = self._refusal(command)
        if refusal:
            self._settle(command, "refused", next_step, refusal)
        else:
            self._waiting.append(command)
            self._waiting.sort(key=lambda waiting: waiting.apply_at_step)

    def refuse(self, command: Command, next_step: int, reason: str) -> None:
        """Answer a command that can't be taken before step `next_step`, unless its id was seen before."""
        if command.id not in self._seen:
            self._settle(command, "refused", next_step, reason)

    def begin(self, step: int, now_unix_ns: int) -> Mapping[str, float]:
        """The multipliers of step `step`, which is about to be taken; asking twice gives the same."""
        for command in self._due(step, now_unix_ns, SetMultipliers):
            self._set(command, step)
        if self._fade is not None and self._tick >= self._fade[0]:
            self._start_fade(self._fade[1])
        self.multipliers = self._ramp.at(self._tick)
        return self.multipliers

    def end(self, step: int, now_unix_ns: int) -> RollbackRequest | None:
        """Step `step` was taken; the rollback that is due now, if any. It stays pending until it is settled."""
        self._tick += 1
        for command in self._due(step, now_unix_ns, RollBack):
            request = self._request(command, step)
            if request is not None:
                self.pending_rollback, self._rolling = request, command
                return request
        return None

    def rolled_back(self, step: int) -> None:
        """The loop stands at `step` again; the next step is `step` + 1."""
        if self._rolling is not None:
            self._settle(self._rolling, "applied", step + 1, f"restored to step {step}")
        self.pending_rollback = self._rolling = None

    def rollback_failed(self, step: int, reason: str) -> None:
        """The restore that was due after step `step` raised."""
        if self._rolling is not None:
            self._settle(self._rolling, "failed", step, reason)
        self.pending_rollback = self._rolling = None

    def state_dict(self) -> dict[str, Any]:
        """What is in force and what was answered, as plain values; commands that still wait are sent again."""
        return {
            "revision": self.revision,
            "start": dict(self._ramp.start),
            "target": dict(self._ramp.target),
            "ramp": [self._tick - self._ramp.since, self._ramp.steps],
            "fade": None if self._fade is None else [self._fade[0] - self._tick, self._fade[1]],
            "answered": [asdict(result) for result in self._seen.values() if result is not None],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was made; what the present bounds forbid is brought within them.

        Raises `KeyError`, `TypeError` or `ValueError` for what is no such state; nothing is changed then.
        """
        low, high = (1.0, 1.0) if self.mode == "none" or self._uncontrolled else self._bounds

        def bounded(values: Mapping[str, float]) -> dict[str, float]:
            return {block: min(max(float(values.get(block, 1.0)), low), high) for block in self.multipliers}

        (elapsed, steps), fade = state["ramp"], state["fade"]
        ramp = _Ramp(bounded(state["start"]), bounded(state["target"]), -int(elapsed), int(steps))
        answered = [
            CommandResult(**{**each, "unchanged_blocks": tuple(each["unchanged_blocks"])}) for each in state["answered"]
        ]
        self._fade = None if fade is None else (int(fade[0]), int(fade[1]))
        self._ramp, self._tick, self.revision = ramp, 0, int(state["revision"])
        self._seen = OrderedDict((result.command_id, result) for result in answered)
        self.multipliers = ramp.at(-1) if elapsed else dict(ramp.start)

    def take_results(self) -> tuple[CommandResult, ...]:
        """The next results not told yet; they are told once."""
        results, self._results = tuple(self._results[:_TOLD_AT_ONCE]), self._results[_TOLD_AT_ONCE:]
        return results

    def _due(self, step: int, now_unix_ns: int, kind: type[SetMultipliers | RollBack]) -> list[Command]:
        """Take from the waiting commands of `kind` those whose step has come, and settle those that expired."""
        due: list[Command] = []
        for command in tuple(self._waiting):
            if not isinstance(command.action, kind):
                continue
            if _expired(command, step, now_unix_ns):
                self._waiting.remove(command)
                self._settle(command, "expired", step, f"not applied before step {step}")
            elif command.apply_at_step <= step:
                self._waiting.remove(command)
                due.append(command)
        return due

    def _set(self, command: Command, step: int) -> None:
        action = command.action
        assert isinstance(action, SetMultipliers)  # noqa: S101 - narrowed by _due
        target = dict.fromkeys(self.multipliers, 1.0) | dict(action.multipliers)
        now = self._ramp.at(self._tick - 1) if self._tick > self._ramp.since else dict(self._ramp.start)
        self._ramp = _Ramp(now, target, self._tick, action.ramp_steps)
        self._fade = (self._tick + action.ttl_steps, action.ramp_steps) if action.ttl_steps else None
        self.revision = action.revision
        unchanged = _unchanged(action.multipliers, target, self._parameter_types)
        detail = f"shares every parameter with a smaller multiplier: {', '.join(unchanged)}" if unchanged else ""
        self._settle(command, "applied", step, detail, unchanged)

    def _start_fade(self, steps: int) -> None:
        """The daemon did not renew its raises in time: they return to 1; cuts stay."""
        now = self._ramp.at(self._tick - 1)
        target = {block: min(value, 1.0) for block, value in self._ramp.target.items()}
        self._ramp, self._fade = _Ramp(now, target, self._tick, steps), None

    def _request(self, command: Command, step: int) -> RollbackRequest | None:
        action = command.action
        assert isinstance(action, RollBack)  # noqa: S101 - narrowed by _due
        if self.pending_rollback is not None:
            self._settle(command, "refused", step, "another rollback is pending")
        elif action.step > step:
            self._settle(command, "refused", step, f"checkpoint step {action.step} lies ahead of step {step}")
        else:
            return RollbackRequest(action.step, action.uri, action.skip, command.reason)
        return None

    def _refusal(self, command: Command) -> str:
        """Why `command` can't be taken; empty if it can."""
        if self.mode == "none":
            return 'control="none" refuses every command'
        if len(self._waiting) >= _WAITING_LIMIT:
            return f"{_WAITING_LIMIT} commands wait already"
        match command.action:
            case SetMultipliers() as action:
                return self._multiplier_refusal(action)
            case RollBack() as action:
                return self._rollback_refusal(action)
        return "no action that this agent knows"

    def _multiplier_refusal(self, action: SetMultipliers) -> str:
        reason = self._uncontrolled or (self._by_state() if self._by_state is not None else "")
        if reason:
            return f"learning rates can't be changed: {reason}"
        low, high = self._bounds
        for block, value in action.multipliers.items():
            if block not in self.multipliers:
                return f"unknown block {block!r}; this model has {', '.join(self.multipliers)}"
            if not math.isfinite(value) or not low <= value <= high:
                return f"{block}={value:g} is outside lr_bounds [{low:g}, {high:g}]"
        if action.ramp_steps < 0 or action.ttl_steps < 0:
            return "ramp_steps and ttl_steps can't be negative"
        return ""

    def _rollback_refusal(self, action: RollBack) -> str:
        if self.mode != "rollback" and not self._has_callback:
            return f'control="{self.mode}" takes a rollback only with on_rollback=; control="rollback" does without'
        if action.step < 0 or not action.uri:
            return "a rollback needs a checkpoint: a step of 0 or more and a uri"
        if action.skip[1] < action.skip[0]:
            return f"skip ends before it begins: {action.skip}"
        return ""

    def _settle(
        self,
        command: Command,
        outcome: Literal["applied", "refused", "expired", "failed"],
        step: int,
        detail: str = "",
        unchanged_blocks: tuple[str, ...] = (),
    ) -> None:
        result = CommandResult(command.id, outcome, step, detail, unchanged_blocks)
        self._seen[command.id] = result
        self._results.append(result)


def effective(types: Collection[str], multipliers: Mapping[str, float]) -> float:
    """The multiplier of a parameter that holds blocks of `types`: it has one rate, so the smallest counts."""
    return min((multipliers[block] for block in types), default=1.0)


def _expired(command: Command, step: int, now_unix_ns: int) -> bool:
    late_step = 0 < command.expires_at_step < step
    return late_step or 0 < command.expires_at_unix_ns < now_unix_ns


def _unchanged(
    named: Collection[str], target: Mapping[str, float], parameter_types: Collection[frozenset[str]]
) -> tuple[str, ...]:
    """The named blocks none of whose parameters runs at the block's own multiplier."""
    return tuple(
        block
        for block in target
        if block in named
        and any(block in types for types in parameter_types)
        and all(effective(types, target) < target[block] for types in parameter_types if block in types)
    )
