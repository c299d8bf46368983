"""What the daemon counts and times of itself."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from sharpwatch._version import __version__

# Why a session is not opened: the Hello is not valid, or of another's run; the run has a live trainer, or belongs to
# somebody else although it has none; the client has too many runs, or all clients have; its token is for other jobs;
# the journal, which may know the run, can't be read; the run is of a shard that another daemon holds; the daemon ends.
SessionRefusal = Literal[
    "malformed",
    "wrong_run",
    "live_run",
    "held_run",
    "client_runs",
    "runs",
    "other_job",
    "store",
    "other_shard",
    "stopping",
]
# What becomes of an alert of another system: its incident begins, ends or is as it was; the configuration does not name
# it, it names no run that is known, or too many fire on that.
ForeignResult = Literal["begun", "ended", "unchanged", "unnamed", "unknown_run", "too_many"]
# Why a call is ended before it has begun: it sends nothing in time, too many send nothing, or it may not be made.
EndedCall = Literal["mute", "crowded", "unauthorized"]
GateResult = Literal["passed", "held", "failed"]  # `failed` is held as well: it could not be asked
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class OwnMetrics:
    """What the daemon counts and times of itself."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        queue_depth: Callable[[], int],
        queue_capacity: int,
        certificate_seconds: Callable[[], float] | None = None,
        shards_held: Sequence[Callable[[], bool]] = (),
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.received = Counter(
            "sharpwatch_samples_received", "Samples that came in, refused ones included.", registry=registry
        )
        self.refused = Counter(
            "sharpwatch_samples_refused", "Messages refused, by reason code.", ["code"], registry=registry
        )
        self.dropped_probes = Counter(
            "sharpwatch_probes_dropped",
            "Probes left out of their sample because a number in them was not finite.",
            ["probe"],
            registry=registry,
        )
        self.cut_readings = Counter(
            "sharpwatch_window_readings_dropped",
            "Readings of probes that windows lost since they took more bytes than a run or all runs may.",
            ["probe"],
            registry=registry,
        )
        self.ingest_to_metric = Histogram(
            "sharpwatch_ingest_to_metric_seconds",
            "From a sample's arrival until metrics show it.",
            registry=registry,
            buckets=_SECONDS,
        )
        self.estimate = Histogram(
            "sharpwatch_estimate_seconds",
            "Time of one batched curvature estimate over all runs with new probes.",
            registry=registry,
            buckets=_SECONDS,
        )
        self.store = Histogram(
            "sharpwatch_store_seconds", "Time of one journal transaction.", registry=registry, buckets=_SECONDS
        )
        self.store_errors = Counter("sharpwatch_store_errors", "Journal transactions that failed.", registry=registry)
        self.store_writable = Gauge(
            "sharpwatch_store_writable", "1 while the journal takes writes, 0 while it fails.", registry=registry
        )
        self.store_writable.set(1)
        if shards_held:
            held = Gauge(
                "sharpwatch_shard_held",
                "1 for each shard whose runs this daemon serves, 0 for those of other daemons.",
                ["shard"],
                registry=registry,
            )
            for shard, is_held in enumerate(shards_held):
                held.labels(str(shard)).set_function(is_held)
        self.notifications = Counter(
            "sharpwatch_notifications",
            "Messages to the webhook, by what became of them; of dropped ones, alerts.",
            ["result"],
            registry=registry,
        )
        self.gate = Counter(
            "sharpwatch_gate_answers", "Answers of the gate about raises of rates.", ["result"], registry=registry
        )
        for result in get_args(GateResult):
            self.gate.labels(result)
        self.foreign_alerts = Counter(
            "sharpwatch_foreign_alerts_received",
            "Alerts of other systems that came in, by what became of them, once for each run that they name.",
            ["result"],
            registry=registry,
        )
        for result in get_args(ForeignResult):
            self.foreign_alerts.labels(result)
        self.foreign_truncated = Counter(
            "sharpwatch_foreign_alerts_truncated",
            "Alerts that their sender left out of a message, as it says in truncatedAlerts.",
            registry=registry,
        )
        self.sessions = Gauge("sharpwatch_sessions", "Agent sessions connected now.", registry=registry)
        self.sessions_refused = Counter(
            "sharpwatch_sessions_refused",
            "Sessions that were not opened, by reason; an agent that is refused tries again every few seconds.",
            ["reason"],
            registry=registry,
        )
        for reason in get_args(SessionRefusal):
            self.sessions_refused.labels(reason)  # from 0 on: increase() can't see a counter that begins at 1
        self.calls_ended = Counter(
            "sharpwatch_calls_ended",
            "gRPC calls that were ended before they had begun, by reason.",
            ["reason"],
            registry=registry,
        )
        for ended in get_args(EndedCall):
            self.calls_ended.labels(ended)
        self.internal_errors = Counter(
            "sharpwatch_internal_errors",
            "Samples and estimates that the daemon itself failed on; its log has each.",
            ["where"],
            registry=registry,
        )
        depth = Gauge("sharpwatch_queue_depth", "Samples waiting for the journal.", registry=registry)
        depth.set_function(queue_depth)
        room = Gauge("sharpwatch_queue_capacity", "Samples the queue holds before it drops.", registry=registry)
        room.set(queue_capacity)
        build = Gauge(
            "sharpwatch_build_info",
            "Versions the daemon runs on; always 1.",
            ["version", "python", "torch"],
            registry=registry,
        )
        build.labels(__version__, platform.python_version(), torch.__version__).set(1)
        certificate = Gauge(
            "sharpwatch_certificate_remaining_seconds",
            "Until the daemon's certificate expires; NaN without TLS.",
            registry=registry,
        )
        certificate.set_function(certificate_seconds or (lambda: math.nan))
