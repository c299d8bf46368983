"""A run as metrics and operators see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.estimation.windows import Key
from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.samples import BlockTap, HealthReading
from sharpwatch.daemon.records import Alert, Mode

Phase = Literal["running", "silent", "closed"]


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
    update_ratio: tuple[float, ...] | None = None  # [B], of the newest direction probe
    gradient_noise: tuple[float, ...] | None = None  # [B], of the newest gradient_noise probe
    health: HealthReading | None = None
    estimates: Mapping[Key, Estimate] = field(default_factory=dict)
    layer_sharpness: tuple[Estimate, ...] = ()  # [L]
    order_correlation: float | None = None
    alerts: tuple[Alert, ...] = ()
    alerts_total: Mapping[str, int] = field(default_factory=dict)
    decisions_total: Mapping[tuple[str, str, str], int] = field(default_factory=dict)  # by action, mode, outcome
    dropped_probes: Mapping[str, int] = field(default_factory=dict)
