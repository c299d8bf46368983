"""The state of a run at one time, and which of its measurements are too old to be shown as its present state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.detection.sharpness import SharpnessView
from sharpwatch.daemon.estimation.estimator import PROBES
from sharpwatch.daemon.estimation.windows import Key
from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.samples import BlockTap, HealthReading
from sharpwatch.daemon.records import Incident, Mode, PairOrder
from sharpwatch.daemon.storage.schema import ModeRow
from sharpwatch.wire import Doubles

# Silent: nothing is heard of it; killed: its courier has told that the process ended, without a farewell.
Phase = Literal["running", "silent", "killed", "closed"]
# How old the newest reading of a probe may be until what it measured is let go: so many steps, and so many times the
# steps that usually lie between two readings.
STALE_STEPS = 100
STALE_READINGS = 10
# Which probe reads the fields that no estimate stands behind.
_READ_BY = {"update_ratio": "direction", "gradient_noise": "gradient_noise"}


def pace(steps: Sequence[int]) -> float | None:
    """Returns the mean number of steps between readings at `steps`; None while it is not known.

    A rollback lets the steps fall, which says nothing of the pace.
    """
    forward = [after - before for before, after in pairwise(steps) if after > before]
    return sum(forward) / len(forward) if forward else None


@dataclass(frozen=True, slots=True, eq=False)
class Maxima:
    """The largest values of the minute up to the newest sample, by block type [B]; NaN where nothing was measured."""

    loss: float
    gradient_norm: Doubles
    update_rms: Doubles


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """The state of a run at one time.

    It is immutable, and a run replaces it as a whole, so that any thread may read it. Values of readings are those of
    the newest sample that had them; arrays and tuples marked [B] or [L] are in the order of the Hello.
    """

    hello: RunHello
    phase: Phase
    attempts: int
    mode: Mode
    lr_revision: int
    multipliers: Mapping[str, float]
    step: int | None = None
    loss: float | None = None
    last_sample_at: float | None = None  # unix seconds, by the daemon's clock
    last_seen_at: float = 0.0
    tap: BlockTap | None = None
    maxima: Maxima | None = None
    update_ratio: tuple[float, ...] | None = None  # [B], of the newest direction probe
    gradient_noise: tuple[float, ...] | None = None  # [B], of the newest gradient_noise probe
    health: HealthReading | None = None
    probe_steps: Mapping[str, Sequence[int]] = field(
        default_factory=dict
    )  # of its last readings, by probe that has one
    attention: Doubles | None = None  # [L], the newest scale of attention logits; NaN where there is none
    attention_steps: Sequence[int] = ()  # of its last readings
    estimates: Mapping[Key, Estimate] = field(default_factory=dict)
    layer_sharpness: tuple[Estimate, ...] = ()  # [L]
    order_correlation: float | None = None
    sharpness: SharpnessView | None = None  # between probes, and in order
    incidents: tuple[Incident, ...] = ()  # the newest
    incidents_in_all: int = 0
    incidents_total: Mapping[str, int] = field(default_factory=dict)
    excursions_total: Mapping[tuple[str, str], int] = field(default_factory=dict)  # by signal, block type
    decisions_total: Mapping[tuple[str, str, str], int] = field(default_factory=dict)  # by action, mode, outcome
    dropped_probes: Mapping[str, int] = field(default_factory=dict)
    # By probe, how many readings its window has lost since it was too large.
    cut_windows: Mapping[str, int] = field(default_factory=dict)
    # How often the daemon itself failed on the run, by where ("fold", or the probe of a window) and kind of error.
    failures: Mapping[str, int] = field(default_factory=dict)
    received_bytes: int = 0  # of its messages, refused ones too, since the daemon's start
    mode_set: ModeRow | None = None  # None where the mode is the one of the configuration

    @property
    def has_unseen_incident(self) -> bool:
        """Whether an incident of severity critical is open that nobody has acknowledged."""
        return any(
            one.active and one.severity == "critical" and not one.acknowledged and one.foreign is None
            for one in self.incidents
        )

    def exported(self, since: float) -> RunSnapshot | None:
        """Returns what `/metrics` shows of the run: all while it is live or was seen after unix seconds `since`.

        Later it shows nothing, but for a run that did not end in order: while an incident of severity critical is open
        that nobody has acknowledged, it shows all but measurements. An alert must not end because nothing is heard.
        """
        if self.phase == "running" or self.last_seen_at >= since:
            return self
        if self.phase == "closed" or not self.has_unseen_incident:
            return None
        return replace(
            self,
            loss=None,
            tap=None,
            maxima=None,
            update_ratio=None,
            gradient_noise=None,
            health=None,
            attention=None,
            estimates={},
            layer_sharpness=(),
            order_correlation=None,
            sharpness=None,
        )

    @property
    def all_estimates(self) -> Mapping[Key, Estimate]:
        """The estimates of probes, then those of sharpness since."""
        return self.estimates if self.sharpness is None else {**self.estimates, **self.sharpness.estimates()}

    @property
    def order(self) -> tuple[PairOrder, ...]:
        """Neighbours in the order of sharpness that are known to be in order or inverted."""
        return () if self.sharpness is None else self.sharpness.order

    @property
    def order_since(self) -> int | None:
        """The step from which all of them stand in that order; None where they do not."""
        return None if self.sharpness is None else self.sharpness.order_since

    @property
    def attention_scales(self) -> list[tuple[str, float]]:
        """The layers whose attention is measured, "" for one outside of layers, with the newest scale of each."""
        if self.attention is None:
            return []
        rows = zip(self.hello.layer_blocks, self.attention.tolist(), strict=True)
        return [(layer, scale) for (_, layer), scale in rows if not math.isnan(scale)]

    def without_stale(self) -> RunSnapshot:
        """Returns this snapshot without what was measured by probes whose newest reading is too old."""
        stale = {probe for probe in self.probe_steps if self._is_stale(probe)}
        attention = None if self.attention_steps and self._is_old(self.attention_steps) else self.attention
        if not stale and attention is self.attention:
            return self
        gone = {estimator for probe in stale for estimator in PROBES[probe].estimators}
        changes: dict[str, Any] = {name: None for name, probe in _READ_BY.items() if probe in stale}
        if "gnb" in stale:
            changes |= {"layer_sharpness": (), "order_correlation": None, "sharpness": None}
        kept = {key: one for key, one in self.estimates.items() if key[2] not in gone}
        return replace(self, estimates=kept, attention=attention, **changes)

    def _is_stale(self, probe: str) -> bool:
        steps = self.probe_steps[probe]
        if self._age(steps) <= STALE_STEPS:
            return False
        failed = self.health.failed_probes.get(probe) if self.health is not None else None
        # An attempt that names its probes, but not this one, is of a run that goes on without it.
        if (failed is not None and failed.given_up) or (self.hello.probes and probe not in self.hello.probes):
            return True
        return self._is_old(steps)

    def _is_old(self, steps: Sequence[int]) -> bool:
        age, between = self._age(steps), pace(steps)
        return age > STALE_STEPS and between is not None and age > STALE_READINGS * between

    def _age(self, steps: Sequence[int]) -> int:
        return 0 if self.step is None else self.step - steps[-1]
