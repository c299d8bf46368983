"""The state of a watch as a value, which prints as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from sharpwatch.agent.control.commands import RollbackRequest, describe_multipliers
from sharpwatch.agent.transport.base import Connection

if TYPE_CHECKING:
    from sharpwatch.agent.watched_run import WatchedRun

_NAMES = 3  # parameters that the table names
_LABEL = 10  # columns


@dataclass(frozen=True, slots=True)
class BlockStatus:
    """One block type: how many entries its parameters have, in how many layers, and how many are of adapters."""

    block: str
    entries: int
    layers: int
    adapter_entries: int = 0


@dataclass(frozen=True, slots=True)
class ProbeStatus:
    """What became of one probe so far.

    Attributes:
        probe: Its name, as given to `attach`.
        last_step: The step at which it last ran; None before its first run in this process.
        runs: How often it ran, failures included; goes on from a checkpoint.
        failures: How often it failed.
        given_up: Whether it failed for good and will not run again.
        reason: Why it failed last; empty if it never did.
    """

    probe: str
    last_step: int | None
    runs: int
    failures: int
    given_up: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchStatus:
    """The state of a watch at one moment; `print(watch.status)` shows it as a table.

    Attributes:
        state: "watching", "disabled" (by SHARPWATCH_DISABLED) or "closed"; a closed watch shows its last status.
        training_job: The name of what is trained.
        run: The name of this attempt.
        step: Optimizer steps that took effect.
        ended: Why the watch ended by itself; empty if it did not.
        blocks: The block types of what is trained.
        parameters: How many parameters (tensors) are watched: those that were trained at `attach`.
        frozen: Names of the model's parameters that are not trained.
        training_change: What was frozen or unfrozen since `attach`; the blocks stay those of `attach`, and no curvature
            is measured. Empty if nothing was.
        other: Names of the watched parameters in block "other", which belong to none of the usual ones.
        unplaced: Those of them whose block is not known, and no rule says.
        connection: Whether the daemon is reached.
        dropped: Samples that were lost, by reason.
        probes: Each probe that was asked for.
        overhead_ratio: The agent's seconds over the loop's own, over the last 1000 steps.
        overhead_budget: The share that the agent may take; None where `probe_every` fixes how often probes run.
        control: Which commands are taken: "none", "lr" or "rollback".
        lr_refusal: Why learning rates can't be changed; empty if they can.
        multipliers: The learning-rate multipliers in force, by block type.
        update_every: Of blocks that are not updated at every step: every how many.
        revision: The number of the daemon's last set of multipliers; 0 before the first.
        pending_rollback: The rollback that the loop must do now.
        refused_command: Before which step the last command that was refused was, and why; empty if none was.
        loss: Where the newest step's loss is from: "observed", "the model's own", or "none" with the reason.
        swallowed_errors: Errors of the agent itself that were kept from the training loop.
        objective: The loss whose Gauss-Newton matrix `gnb` measures and how it is known, or why it measures none; empty
            before its first probe.
        attention: Of how many layers the scale of attention logits is measured, and why not of others; empty before
            the first probe, and for a model without attention.
    """

    state: Literal["watching", "disabled", "closed"]
    run: str
    step: int
    training_job: str = ""
    ended: str = ""
    blocks: Sequence[BlockStatus] = ()
    parameters: int = 0
    frozen: Sequence[str] = ()
    training_change: str = ""
    other: Sequence[str] = ()
    unplaced: Sequence[str] = ()
    connection: Connection = field(default_factory=Connection)
    dropped: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    probes: Sequence[ProbeStatus] = ()
    overhead_ratio: float = 0.0
    overhead_budget: float | None = None
    control: str = "none"
    lr_refusal: str = ""
    multipliers: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    update_every: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    revision: int = 0
    pending_rollback: RollbackRequest | None = None
    refused_command: str = ""
    loss: str = ""
    swallowed_errors: int = 0
    objective: str = ""
    attention: str = ""

    def __str__(self) -> str:
        rows = [("run", self._run()), *(self._rows() if self.blocks else ())]
        return "\n".join(f"{label:<{_LABEL}}{text}" for label, text in rows)

    def _run(self) -> str:
        of = f" of {self.training_job}" if self.training_job else ""
        state = f"{self.state}: {self.ended}" if self.ended else self.state
        return f"{self.run}{of}, step {self.step}" + ("" if self.state == "watching" else f" ({state})")

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "blocks", f"{_blocks(self)} ({self.parameters} parameters)"
        if self.frozen:
            yield "frozen", _names(self.frozen)
        if self.training_change:
            yield "changed", f"{self.training_change}; attach again"
        if self.other:
            yield "other", _names(self.other)
        if self.unplaced:
            yield "unplaced", f"{_names(self.unplaced)}; attach(rules=...) places them"
        if self.loss:
            yield "loss", self.loss
        yield "daemon", f"{_connection(self.connection)}; {_dropped(self.dropped)}"
        for number, probe in enumerate(self.probes):
            yield "" if number else "probes", _probe(probe)
        yield from ((label, text) for label in ("objective", "attention") if (text := getattr(self, label)))
        yield "overhead", _overhead(self)
        yield "control", _control(self)
        if self.pending_rollback is not None:
            yield "rollback", f"pending: to step {self.pending_rollback.step}, {self.pending_rollback.uri}"
        if self.refused_command:
            yield "refused", f"a command {self.refused_command}"
        if self.swallowed_errors:
            yield "errors", f"{self.swallowed_errors} of the agent's own, logged as warnings"


def collect(run: WatchedRun) -> WatchStatus:
    """The present state of `run`; reads what is known already, and waits for nothing."""
    control, budget, block_map = run.control, run.scheduler.budget, run.strategy.block_map
    return WatchStatus(
        state="closed" if run.closed else "watching",
        training_job=run.options.training_job,
        run=run.run,
        step=run.step,
        ended=run.end_reason,
        blocks=tuple(
            BlockStatus(
                block,
                entries,
                sum(each.type == block for each in block_map.layer_blocks),
                block_map.adapter_numel[block],
            )
            for block, entries in block_map.numel.items()
        ),
        parameters=len(block_map.shapes),
        training_change=str(run.training_change),
        frozen=tuple(name for name, value in run.options.model.named_parameters() if not value.requires_grad),
        other=tuple(dict.fromkeys(part.parameter for part in block_map.parts if part.type == "other")),
        unplaced=block_map.unplaced,
        connection=run.transport.connection,
        # Copied here and below: the status is of one moment, and the run goes on.
        dropped=MappingProxyType(dict(run.transport.dropped)),
        probes=_probes(run),
        overhead_ratio=budget.overhead_ratio,
        overhead_budget=budget.budget,
        control=control.mode,
        lr_refusal='control="none"'
        if control.mode == "none"
        else run.strategy.lr_refusal or run.strategy.present_state.refusal,
        multipliers=MappingProxyType(dict(control.multipliers)),
        update_every=MappingProxyType(dict(control.update_every)),
        revision=control.revision,
        pending_rollback=control.pending_rollback,
        refused_command=control.last_refusal,
        loss=run.losses.source,
        swallowed_errors=run.barrier.swallowed,
        objective=str(run.scheduler.runner.objective or ""),
        attention=run.scheduler.runner.attention.note,
    )


def announcement(status: WatchStatus) -> str:
    """One line for the log at the first step: what is watched, where samples go, which probes run."""
    probes = ", ".join(probe.probe for probe in status.probes) or "none"
    budget = "" if status.overhead_budget is None else f" within {_percent(status.overhead_budget)} of step time"
    return (
        f"watching run {status.run} of {status.training_job}: blocks {_blocks(status)}; "
        f"daemon {_connection(status.connection)}; probes {probes}{budget if status.probes else ''}"
    )


def _probes(run: WatchedRun) -> tuple[ProbeStatus, ...]:
    runner, last_steps = run.scheduler.runner, run.scheduler.last_steps
    failures = {failure.probe: failure for failure in runner.failures}
    return tuple(
        ProbeStatus(
            probe=probe,
            last_step=last_steps.get(probe),
            runs=runs,
            failures=failures[probe].count if probe in failures else 0,
            given_up=probe in runner.disabled,
            reason=failures[probe].reason if probe in failures else "",
        )
        for probe, runs in runner.runs.items()
    )


def _blocks(status: WatchStatus) -> str:
    return ", ".join(f"{each.block} {_count(each.entries)}{_adapters(each)}" for each in status.blocks)


def _adapters(block: BlockStatus) -> str:
    if not block.adapter_entries:
        return ""
    return (
        " of adapters" if block.adapter_entries == block.entries else f" ({_count(block.adapter_entries)} of adapters)"
    )


def _connection(connection: Connection) -> str:
    if not connection.address:
        return connection.reason or "none"
    since = ""
    if connection.since_unix_ns:
        since = f" since {datetime.fromtimestamp(connection.since_unix_ns / 1e9).astimezone():%Y-%m-%d %H:%M:%S}"
    if connection.connected:
        newest = f", sample {connection.acknowledged} acknowledged" if connection.acknowledged else ""
        return f"{connection.address} connected{since}{newest}"
    known = "not connected" if connection.since_unix_ns else "not reached yet"
    if connection.refused:
        known = "does not take this run"
    return f"{connection.address} {known}{since}" + (f": {connection.reason}" if connection.reason else "")


def _dropped(dropped: Mapping[str, int]) -> str:
    lost = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    return f"samples dropped: {lost}" if lost else "no sample dropped"


def _probe(probe: ProbeStatus) -> str:
    ran = "not run yet" if probe.last_step is None else f"last at step {probe.last_step}"
    text = f"{probe.probe}: {ran}, {probe.runs} runs, {probe.failures} failed"
    if probe.given_up:
        return f"{text}; given up: {probe.reason}"
    return f"{text}, last: {probe.reason}" if probe.failures else text


def _overhead(status: WatchStatus) -> str:
    budget = "probe_every is set" if status.overhead_budget is None else f"budget {_percent(status.overhead_budget)}"
    return f"{_percent(status.overhead_ratio)} of step time, {budget}"


def _control(status: WatchStatus) -> str:
    rates = describe_multipliers(status.multipliers, status.update_every)
    reason = f"; learning rates can't be changed: {status.lr_refusal}" if status.lr_refusal else ""
    return f"{status.control}: {rates}, revision {status.revision}{reason}"


def _names(names: Sequence[str]) -> str:
    more = len(names) - _NAMES
    return ", ".join(names[:_NAMES]) + (f" and {more} more" if more > 0 else "")


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 100 else f"{percent:.2g} %"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
