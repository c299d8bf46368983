"""Decides, on the trainer's side, which of the daemon's commands are applied and when: a pure state machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sharpwatch.agent.control.commands import (
    Cancel,
    Command,
    CommandResult,
    Outcome,
    RollBack,
    RollbackRequest,
    SetMultipliers,
    describe_multipliers,
)
from sharpwatch.wire import MAX_INTERVAL

ControlMode = Literal["none", "lr", "rollback"]
CONTROL_MODES: tuple[ControlMode, ...] = ("none", "lr", "rollback")
# The daemon sends a command again until its result has come, so an id must outlive every resend of it. So many with a
# revision are remembered, and so many without.
_REMEMBERED_IDS = 1024
_MAX_WAITING = 64
_MAX_SHOWN = 300  # characters of a text in the log
_MAX_LOGGED = 100  # commands in a row that were not applied: a daemon gone mad must not fill the program's log
# The daemon's limit: it refuses a sample with more as a whole.
_MAX_RESULTS = 256  # in one sample
_FULL = f"{_REMEMBERED_IDS} commands without a revision were answered already: this run takes no more of them"


@dataclass(frozen=True, slots=True)
class _Ramp:
    """Multipliers that move geometrically from `start` to `target` within `steps` steps, after the first `since`."""

    start: Mapping[str, float]
    target: Mapping[str, float]
    since: int
    steps: int

    def at(self, taken: int) -> dict[str, float]:
        done = taken - self.since + 1
        if done >= self.steps:
            return dict(self.target)
        share = done / self.steps
        # Geometric, because rates act by their ratio: halving and doubling take equally many steps.
        return {block: a * (self.target[block] / a) ** share for block, a in self.start.items()}


class Controller:
    """Takes commands and gives multipliers and rollback requests.

    Commands name optimizer steps by their number, which goes back on a rollback. Ramps and time-outs count the
    steps that were really taken, a number that never goes back.

    Args:
        mode: Which kinds of commands are accepted.
        bounds: The smallest and the largest multiplier that is accepted.
        blocks: The block types of the model.
        parameter_types: For each parameter, the block types that share its learning rate.
        has_callback: Whether the user passed `on_rollback`.
        lr_refusal: Says why the learning rates of this run can't be changed, or nothing; asked when they are to be.
        interval_refusal: Why no block can be left out of a step, where rates can be changed; empty if it can. Update
            intervals are then ignored.
        log: Takes a line for each result of a command, and for each other change of the multipliers.
        own_rates: The learning rates by block that the optimizers' own groups have, as far as they are known.
    """

    def __init__(  # noqa: PLR0913 - keyword-only, and what differs between runs
        self,
        mode: ControlMode,
        *,
        bounds: tuple[float, float],
        blocks: Collection[str],
        parameter_types: Collection[frozenset[str]] = (),
        has_callback: bool = False,
        lr_refusal: Callable[[], str] = str,
        interval_refusal: str = "",
        log: Callable[[str], None] = lambda _: None,
        own_rates: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.mode = mode
        self.revision = 0
        self.multipliers = dict.fromkeys(blocks, 1.0)
        self.update_every: Mapping[str, int] = {}  # of blocks that are not updated at every step
        self.step = 0  # that began last
        self.pending_rollback: RollbackRequest | None = None
        self.last_refusal = ""  # before which step a command was refused, and why
        self._bounds = bounds
        self._parameter_types = parameter_types
        self._has_callback = has_callback
        self._lr_refusal = lr_refusal
        self._interval_refusal = interval_refusal
        self._log = log
        self._own_rates = own_rates
        self._ramp = _Ramp(self.multipliers, self.multipliers, 0, 0)
        self._fade: tuple[int, int] | None = (
            None  # (steps taken when multipliers above 1 begin to fade, steps it takes)
        )
        self._taken = 0
        self._seen: dict[str, CommandResult | None] = {}  # by id; None while it waits
        self._revisions: dict[str, int] = {}  # of those that have one
        self._forgotten = 0  # the highest revision among commands that were answered and are not in `_seen` any more
        self._waiting: list[Command] = []
        self._rollback_command: Command | None = None  # the one behind pending_rollback
        self._results: list[CommandResult] = []
        self._unapplied = 0  # commands in a row

    @property
    def may_scale(self) -> bool:
        """Whether the next step may run under a multiplier other than 1, or without a block."""
        waiting = any(isinstance(command.action, SetMultipliers) for command in self._waiting)
        return (
            waiting
            or bool(self.update_every)
            or any(value != 1.0 for value in (*self.multipliers.values(), *self._ramp.target.values()))
        )

    @property
    def targets(self) -> Mapping[str, float]:
        """The multipliers in force, or where they move to."""
        return self._ramp.target

    @property
    def has_results(self) -> bool:
        """Whether `take_results` would return any."""
        return bool(self._results)

    def receive(self, command: Command, next_step: int) -> None:
        """Accept or refuse a command before step `next_step`; one whose id is known gets its result again."""
        if isinstance(command.action, Cancel):
            self._cancel(command, command.action.command_id, next_step)
            return
        if command.id in self._seen:
            known = self._seen[command.id]
            if known is not None:
                self._results.append(known)
            return
        unknowable = self._refusal_to_remember(command)
        if unknowable:
            self.refuse(command, next_step, unknowable)
            return
        # Noted before it has a result: the same command may come again while it waits for its step.
        self._remember(command)
        refusal = self._refusal(command)
        if refusal:
            self._settle(command, "refused", next_step, refusal)
        else:
            self._waiting.append(command)
            # By step and not by arrival: of two commands that are due at once the later one's multipliers must win.
            self._waiting.sort(key=lambda waiting: waiting.apply_at_step)

    def refuse(self, command: Command, next_step: int, reason: str, outcome: Outcome = "refused") -> bool:
        """Refuse a command before step `next_step` for `reason`; returns False, and does not, if its id is known.

        It is not remembered: other ranks, whose state must be the same, may never have received it.
        """
        if command.id in self._seen:
            return False
        self._report(command, CommandResult(command.id, outcome, next_step, reason))
        return True

    def _cancel(self, command: Command, cancelled: str, next_step: int) -> None:
        """Let go of the command `cancelled`, also if it comes later; where it has a result, that is told again.

        Commands come in one order on all ranks, so that all of them let go of it before the same step.
        """
        known = self._seen.get(cancelled)
        if known is not None:
            self._results.append(known)
            return
        if self._rollback_command is not None and self._rollback_command.id == cancelled:
            self.refuse(command, next_step, "the rollback has begun")
            return
        if cancelled not in self._seen and self._is_full:
            self.refuse(command, next_step, _FULL)
            return
        self._waiting = [waiting for waiting in self._waiting if waiting.id != cancelled]
        result = CommandResult(cancelled, "cancelled", next_step, f"cancelled before step {next_step}")
        self._seen[cancelled] = result
        self._report(command, result)

    @property
    def _is_full(self) -> bool:
        """Whether no more commands without a revision can be remembered."""
        return len(self._seen) - len(self._revisions) >= _REMEMBERED_IDS

    def _refusal_to_remember(self, command: Command) -> str:
        """Why it could not be told later that `command` was answered, or can't be told now; empty if it can.

        Of commands with a revision the oldest are forgotten, and none is taken with a revision up to theirs. Others,
        such as rollbacks, are never forgotten.
        """
        if command.action is None:  # refused whenever it comes, so there is nothing to remember
            return self._refusal(command)
        revision = _revision(command)
        if not revision:
            return _FULL if self._is_full else ""
        if revision <= self._forgotten:
            return f"revision {revision} must be above {self._forgotten}: those up to it were answered long ago"
        return ""

    def _remember(self, command: Command) -> None:
        self._seen[command.id] = None
        revision = _revision(command)
        if not revision:
            return
        self._revisions[command.id] = revision
        if len(self._revisions) > _REMEMBERED_IDS:
            oldest = next(each for each in self._revisions if self._seen[each] is not None)
            del self._seen[oldest]
            self._forgotten = max(self._forgotten, self._revisions.pop(oldest))

    def begin(self, step: int, now_unix_ns: int) -> Mapping[str, float]:
        """Apply the commands that are due before `step`; returns its multipliers. Calling it twice does no harm."""
        self.step = step
        for command in self._due(step, now_unix_ns, SetMultipliers):
            self._set(command, step)
        if self._fade is not None and self._taken >= self._fade[0]:
            self._start_fade(self._fade[1])
        # Computed from the steps taken and not multiplied on, so that a second call for the same step changes nothing.
        self.multipliers = self._ramp.at(self._taken)
        return self.multipliers

    def end(self, step: int, now_unix_ns: int) -> RollbackRequest | None:
        """Count `step` as taken; returns the rollback that is due now, if any.

        It stays pending until `rolled_back` or `rollback_failed` is called.
        """
        self._taken += 1
        for command in self._due(step, now_unix_ns, RollBack):
            request = self._request(command, step)
            if request is not None:
                self.pending_rollback, self._rollback_command = request, command
                self._log(f"{_described(command, self.multipliers)} is due after step {step}{_asked_by(command)}")
                return request
        return None

    def rolled_back(self, step: int) -> None:
        """The loop has restored the checkpoint of `step`; the next step is `step` + 1."""
        if self._rollback_command is not None:
            self._settle(self._rollback_command, "applied", step + 1, f"restored to step {step}")
        self.pending_rollback = self._rollback_command = None

    def rollback_failed(self, step: int, reason: str, outcome: Outcome = "failed") -> None:
        """The pending rollback was not done after `step`, for `reason`; "failed": its checkpoint can't be restored."""
        if self._rollback_command is not None:
            self._settle(self._rollback_command, outcome, step, reason)
        self.pending_rollback = self._rollback_command = None

    def state_dict(self) -> dict[str, Any]:
        """The multipliers and the results so far, as plain values. The daemon sends waiting commands again."""
        return {
            "revision": self.revision,
            "start": dict(self._ramp.start),
            "target": dict(self._ramp.target),
            # Relative to the steps taken, a number that starts at 0 again in the next process.
            "ramp": [self._taken - self._ramp.since, self._ramp.steps],
            "update_every": dict(self.update_every),
            "fade": None if self._fade is None else [self._fade[0] - self._taken, self._fade[1]],
            "answered": [asdict(result) for result in self._seen.values() if result is not None],
            "revisions": {each: number for each, number in self._revisions.items() if self._seen[each] is not None},
            "forgotten": self._forgotten,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, with its multipliers clamped to the present bounds.

        Raises:
            KeyError: `state` lacks an entry. Nothing is changed then, nor below.
            TypeError: An entry has the wrong type.
            ValueError: An entry has a wrong value.
        """
        # A run taken up where rates can't be changed must not inherit multipliers that nobody could take back.
        low, high = (1.0, 1.0) if self.mode == "none" or self._lr_refusal() else self._bounds

        def bounded(values: Mapping[str, float]) -> dict[str, float]:
            return {block: min(max(float(values.get(block, 1.0)), low), high) for block in self.multipliers}

        (elapsed, steps), fade = state["ramp"], state["fade"]
        ramp = _Ramp(bounded(state["start"]), bounded(state["target"]), -int(elapsed), int(steps))
        answered = [
            CommandResult(**{**each, "unchanged_blocks": tuple(each["unchanged_blocks"])}) for each in state["answered"]
        ]
        loaded_fade = None if fade is None else (int(fade[0]), int(fade[1]))
        revision = int(state["revision"])
        may_leave_out = not (self.mode == "none" or self._lr_refusal() or self._interval_refusal)
        # A state of an earlier version has no intervals.
        saved = state.get("update_every", {}) if may_leave_out else {}
        update_every = {block: int(saved[block]) for block in self.multipliers if int(saved.get(block, 1)) > 1}
        # Nor does it have these two.
        revisions = {str(each): int(number) for each, number in state.get("revisions", {}).items()}
        forgotten = int(state.get("forgotten", 0))
        self._ramp, self._fade, self._taken, self.revision = ramp, loaded_fade, 0, revision
        self.update_every = update_every
        self._seen = {result.command_id: result for result in answered}
        self._revisions = {each: number for each, number in revisions.items() if each in self._seen}
        self._forgotten = forgotten
        self.multipliers = ramp.at(-1) if elapsed else dict(ramp.start)

    def take_results(self) -> tuple[CommandResult, ...]:
        """Remove and return the oldest results, as many as fit in a sample."""
        results, self._results = tuple(self._results[:_MAX_RESULTS]), self._results[_MAX_RESULTS:]
        return results

    def _due(self, step: int, now_unix_ns: int, kind: type[SetMultipliers | RollBack]) -> list[Command]:
        """Remove and return the waiting commands of `kind` that are due; those that expired get their result."""
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
        # Starts from 1 for every block: the daemon need not know which blocks an earlier set, maybe lost, has named.
        target = dict.fromkeys(self.multipliers, 1.0) | dict(action.multipliers)
        now = self._ramp.at(self._taken - 1) if self._taken > self._ramp.since else dict(self._ramp.start)
        self._ramp = _Ramp(now, target, self._taken, action.ramp_steps)
        self._fade = (self._taken + action.ttl_steps, action.ramp_steps) if action.ttl_steps else None
        self.revision = action.revision
        # Intervals come with each set, as those in force. A cut must not be lost for one of an earlier optimizer.
        asked = {} if self._interval_refusal else action.update_every
        # In the blocks' own order: a protobuf map has none.
        self.update_every = {block: asked[block] for block in self.multipliers if asked.get(block, 1) > 1}
        unchanged = _unchanged(action.multipliers, target, self._parameter_types)
        remarks = (
            _shared_rates(target, self._parameter_types),
            _shared_intervals(self.update_every, self._parameter_types),
            self._ignored_intervals(action.update_every),
        )
        self._settle(command, "applied", step, "; ".join(filter(None, remarks)), unchanged)

    def _start_fade(self, steps: int) -> None:
        """Return multipliers above 1 to 1, as the daemon did not renew them in time; those below 1 stay."""
        now = self._ramp.at(self._taken - 1)
        # Protective cuts hold when the daemon falls silent; a raise needs one that watches what it does.
        target = {block: min(value, 1.0) for block, value in self._ramp.target.items()}
        is_change = target != self._ramp.target
        self._ramp, self._fade = _Ramp(now, target, self._taken, steps), None
        if is_change:
            self._log(f"multipliers above 1 end, as they were not renewed: {describe_multipliers(target)}")

    def _request(self, command: Command, step: int) -> RollbackRequest | None:
        action = command.action
        assert isinstance(action, RollBack)  # noqa: S101 - narrowed by _due
        if self.pending_rollback is not None:
            self._settle(command, "refused", step, "another rollback is pending")
        elif action.step > step:
            self._settle(command, "refused", step, f"the checkpoint's step {action.step} is ahead of step {step}")
        else:
            return RollbackRequest(action.step, action.uri, action.skip, command.reason)
        return None

    def _refusal(self, command: Command) -> str:
        """Why `command` can't be accepted; empty if it can."""
        if self.mode == "none":
            return 'attach was called with control="none": every command is refused'
        if len(self._waiting) >= _MAX_WAITING:
            return f"{_MAX_WAITING} commands are waiting already"
        match command.action:
            case SetMultipliers() as action:
                return self._multiplier_refusal(action)
            case RollBack() as action:
                return self._rollback_refusal(action)
        return "unknown action: the daemon may be newer than the trainer's sharpwatch"

    def _multiplier_refusal(self, action: SetMultipliers) -> str:
        reason = self._lr_refusal()
        if reason:
            return f"learning rates can't be changed: {reason}"
        low, high = self._bounds
        for block, value in action.multipliers.items():
            if block not in self.multipliers:
                return f"unknown block {block!r}: the model has {', '.join(self.multipliers)}"
            if not math.isfinite(value) or not low <= value <= high:
                return f"multiplier of {block!r} must be within lr_bounds ({low:g}, {high:g}), got {value:g}"
        if action.ramp_steps < 0 or action.ttl_steps < 0:
            return f"ramp_steps and ttl_steps must be >= 0, got {action.ramp_steps} and {action.ttl_steps}"
        return self._refusal_of_intervals(action.update_every)

    def _refusal_of_intervals(self, update_every: Mapping[str, int]) -> str:
        for block, steps in update_every.items():
            if block not in self.multipliers:
                return f"unknown block {block!r}: the model has {', '.join(self.multipliers)}"
            if not 1 <= steps <= MAX_INTERVAL:
                return f"{block!r} must be updated every 1 to {MAX_INTERVAL} steps, got {steps}"
        return ""

    def _ignored_intervals(self, update_every: Mapping[str, int]) -> str:
        ignored = ", ".join(block for block, steps in update_every.items() if steps > 1)
        if not (self._interval_refusal and ignored):
            return ""
        return f"{ignored} updated at every step, since no block can be left out of one: {self._interval_refusal}"

    def _rollback_refusal(self, action: RollBack) -> str:
        if self.mode != "rollback" and not self._has_callback:
            return f'control="{self.mode}" accepts rollbacks only with on_rollback=; control="rollback" needs none'
        if action.step < 0 or not action.uri:
            return f"a rollback needs a checkpoint with step >= 0 and a uri, got {action.step} and {action.uri!r}"
        if action.skip[1] < action.skip[0]:
            return f"skip must satisfy first <= last, got {action.skip}"
        return ""

    def _settle(
        self,
        command: Command,
        outcome: Outcome,
        step: int,
        detail: str = "",
        unchanged_blocks: tuple[str, ...] = (),
    ) -> None:
        result = CommandResult(command.id, outcome, step, detail, unchanged_blocks)
        self._seen[command.id] = result
        self._report(command, result)

    def _report(self, command: Command, result: CommandResult) -> None:
        self._results.append(result)
        if result.outcome == "refused":
            self.last_refusal = f"at step {result.step}: {result.detail[:_MAX_SHOWN]}"
        self._unapplied = 0 if result.outcome == "applied" else self._unapplied + 1
        if self._unapplied > _MAX_LOGGED:
            return
        detail = f": {result.detail[:_MAX_SHOWN]}" if result.detail else ""
        what = _described(command, self.multipliers)
        rates = self._effective_rates(command) if result.outcome == "applied" else ""
        self._log(f"{what} {result.outcome} at step {result.step}{rates}{detail}{_asked_by(command)}")
        if self._unapplied == _MAX_LOGGED:
            self._log(f"{_MAX_LOGGED} commands in a row were not applied: no more are logged until one is")

    def _effective_rates(self, command: Command) -> str:
        """What the learning rates of the blocks that a command sets come to, by the schedule as it stands."""
        if not isinstance(command.action, SetMultipliers):
            return ""
        own, target = self._own_rates(), self._ramp.target
        rates = ", ".join(f"{block} {own[block] * target[block]:.4g}" for block in target if own.get(block))
        return f", learning rates {'then ' if command.action.ramp_steps else ''}{rates}" if rates else ""


def smallest_multiplier(types: Collection[str], multipliers: Mapping[str, float]) -> float:
    """The multiplier of a parameter that belongs to blocks of `types`; it has one learning rate, so the smallest."""
    return min((multipliers[block] for block in types), default=1.0)


def smallest_interval(types: Collection[str], update_every: Mapping[str, int]) -> int:
    """Every how many steps a parameter that belongs to blocks of `types` is updated; it is stepped as a whole."""
    return min((update_every.get(block, 1) for block in types), default=1)


def _revision(command: Command) -> int:
    """The number by which the daemon orders commands of this kind; 0 for one that has none."""
    return command.action.revision if isinstance(command.action, SetMultipliers) else 0


def _described(command: Command, known: Collection[str]) -> str:
    """A command in words; of multipliers only those of `known` blocks, as a wrong command may name any others."""
    match command.action:
        case SetMultipliers(multipliers, revision, ramp_steps, _, update_every):
            ramp = f" over {ramp_steps} steps" if ramp_steps > 0 else ""
            named = {block: multipliers[block] for block in known if block in multipliers}
            rarely = {block: update_every[block] for block in known if block in update_every}
            return f"learning-rate multipliers of revision {revision} ({describe_multipliers(named, rarely)}{ramp})"
        case RollBack(step, uri, skip):
            skipped = f", without the batches of steps {skip[0]} to {skip[1] - 1}" if skip[0] < skip[1] else ""
            return f"rollback to step {step} ({uri[:_MAX_SHOWN]!r}{skipped})"
        case Cancel(command_id):
            return f"command {command_id[:_MAX_SHOWN]!r}"
    return f"command {command.id[:_MAX_SHOWN]!r}"


def _asked_by(command: Command) -> str:
    # Quoted, as these are texts from elsewhere: after a line break in one, the rest would look like another log line.
    by = f"; by {command.author[:_MAX_SHOWN]!r}" if command.author else ""
    return by + (f"; reason: {command.reason[:_MAX_SHOWN]!r}" if command.reason else "")


def _expired(command: Command, step: int, now_unix_ns: int) -> bool:
    late_step = 0 < command.expires_at_step < step
    return late_step or 0 < command.expires_at_unix_ns < now_unix_ns


def _shared_rates(target: Mapping[str, float], parameter_types: Collection[frozenset[str]]) -> str:
    """Say which blocks have parameters at another multiplier than their own, because other blocks share them."""
    remarks: dict[str, list[str]] = {}
    for block, own in target.items():
        held = [types for types in parameter_types if block in types]
        values = [smallest_multiplier(types, target) for types in held]
        elsewhere = f", {own:g} elsewhere" if own in values else ""
        for value in sorted(set(values) - {own}):
            others = frozenset().union(*(types for types, got in zip(held, values, strict=True) if got == value))
            names = ", ".join(other for other in target if other in others and target[other] == value)
            remarks.setdefault(f"{value:g} where parameters are shared with {names}{elsewhere}", []).append(block)
    return "; ".join(f"{', '.join(blocks)} {remark}" for remark, blocks in remarks.items())


def _shared_intervals(update_every: Mapping[str, int], parameter_types: Collection[frozenset[str]]) -> str:
    """Say which blocks have parameters that are updated more often, because other blocks share them."""
    remarks = []
    for block, own in update_every.items():
        values = {smallest_interval(types, update_every) for types in parameter_types if block in types} - {own}
        remarks += [f"{block} updated every {steps} steps where parameters are shared" for steps in sorted(values)]
    return "; ".join(remarks)


def _unchanged(
    named: Collection[str], target: Mapping[str, float], parameter_types: Collection[frozenset[str]]
) -> tuple[str, ...]:
    """The named blocks that have no parameter at the block's own multiplier."""
    return tuple(
        block
        for block in target
        if block in named
        and any(block in types for types in parameter_types)
        and all(smallest_multiplier(types, target) < target[block] for types in parameter_types if block in types)
    )
