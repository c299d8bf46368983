"""What `/metrics` shows of the runs, from their snapshots, and its rendering."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, product

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.estimation.estimator import PROBES
from sharpwatch.daemon.ingest.samples import FailedProbe
from sharpwatch.daemon.records import CAUSES
from sharpwatch.daemon.runs.snapshot import RunSnapshot

MAX_LAYER_SERIES = 512  # layer blocks exported of one run
_RUN = ("training_job", "run")
_MINUTE = "of the minute up to the newest sample."
_ALERTS = sorted(CAUSES)
_SIGNALS = ("update", "gradient", "weight")  # of blocks, whose excursions are counted; beside the loss
_INCIDENT = ("name", "severity", "cause", "block", "layer", "parameter", "rank")


def render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Renders the body of `/metrics`; safe on any thread.

    Args:
        registry: The metrics.
        accept: The request's Accept header, by which Prometheus asks for a format.

    Returns:
        The body and its content type.
    """
    encoder, content_type = choose_encoder(accept)
    return encoder(registry), content_type


class RunCollector(Collector):
    """Exports each run that is live or was seen less than `stale_after` seconds ago (`RunSnapshot.exported`).

    Measurements that are too old (`RunSnapshot.without_stale`) are left out. `snapshots` may be called on any thread;
    `now` is unix seconds.
    """

    def __init__(
        self,
        snapshots: Callable[[], Iterable[RunSnapshot]],
        now: Callable[[], float],
        *,
        stale_after: float,
        layers: bool = True,
    ) -> None:
        self._snapshots = snapshots
        self._now = now
        self._stale_after = stale_after
        self._layers = layers

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names depend on no run, and the registry need not collect to know them."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """One family after another, each over all runs."""
        oldest = self._now() - self._stale_after
        exported = (snapshot.exported(oldest) for snapshot in self._snapshots())
        snapshots = [snapshot.without_stale() for snapshot in exported if snapshot is not None]
        snapshots.sort(key=lambda snapshot: (snapshot.hello.training_job, snapshot.hello.run))
        yield from _run_families(snapshots)
        yield from _tap_families(snapshots)
        yield from _maxima_families(snapshots)
        yield _excursion_family(snapshots)
        yield from _estimate_families(snapshots)
        yield from _action_families(snapshots)
        yield from _agent_families(snapshots)
        if self._layers:
            yield from _layer_families(snapshots)


def _labels(snapshot: RunSnapshot, *labels: str) -> list[str]:
    return [snapshot.hello.training_job, snapshot.hello.run, *labels]


def _gauge(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"sharpwatch_{name}", documentation, labels=(*_RUN, *labels))


def _counter(name: str, documentation: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"sharpwatch_{name}", documentation, labels=(*_RUN, *labels))


def _run_families(snapshots: list[RunSnapshot]) -> Iterator[Metric]:
    info = InfoMetricFamily(
        "sharpwatch_run",
        "What the run said of itself; always 1.",
        labels=(*_RUN, "optimizer", "host", "agent_version", "control", "mode", "phase"),
    )
    step = _gauge("run_step", "The newest optimizer step seen.")
    loss = _gauge("run_loss", "The newest training loss, as the run reports it.")
    stamp = _gauge("run_last_sample_timestamp_seconds", "When the newest sample came in, unix seconds.")
    parameters = _gauge("block_parameters", "Parameters of the block type over all layers.", "block")
    for snapshot in snapshots:
        hello = snapshot.hello
        extra = (hello.optimizer, hello.host, hello.agent_version, hello.control, snapshot.mode, snapshot.phase)
        info.add_metric(_labels(snapshot, *extra), {})
        if snapshot.step is not None:
            step.add_metric(_labels(snapshot), snapshot.step)
        if snapshot.loss is not None:
            loss.add_metric(_labels(snapshot), snapshot.loss)
        if snapshot.last_sample_at is not None:
            stamp.add_metric(_labels(snapshot), snapshot.last_sample_at)
        for block, numel in zip(hello.blocks, hello.block_parameters, strict=True):
            parameters.add_metric(_labels(snapshot, block), int(numel))
    yield from (info, step, loss, stamp, parameters)


_TAP = (
    ("gradient_norm", "Euclidean norm of the block's gradient as it is stepped on, after clipping."),
    ("weight_norm", "Euclidean norm of the block's weights."),
    ("update_rms", "RMS of gradient over the root of Adam's second moment, RMS_t; 1 is normal, spikes precede loss."),
    ("learning_rate", "Learning rate in force for the block, multiplier included; parameter-weighted mean."),
    ("lr_multiplier", "Multiplier in force on the block's learning rate; parameter-weighted mean."),
)


def _tap_families(snapshots: list[RunSnapshot]) -> Iterator[Metric]:
    for name, documentation in _TAP:
        family = _gauge(f"block_{name}", documentation, "block")
        for snapshot in snapshots:
            if snapshot.tap is None:
                continue
            _add_present(family, snapshot, getattr(snapshot.tap, name))
        yield family
    ratio = _gauge("block_update_ratio", "Norm of the block's update over the norm of its weights.", "block")
    for snapshot in snapshots:
        if snapshot.update_ratio is not None:
            _add_present(ratio, snapshot, snapshot.update_ratio)
    yield ratio
    noise = _gauge("block_gradient_noise", "Trace of the covariance of the block's step gradient.", "block")
    for snapshot in snapshots:
        if snapshot.gradient_noise is not None:
            _add_present(noise, snapshot, snapshot.gradient_noise)
    yield noise


def _maxima_families(snapshots: list[RunSnapshot]) -> Iterator[Metric]:
    loss = _gauge("run_loss_max", f"The largest training loss {_MINUTE}")
    gradient_norm = _gauge("block_gradient_norm_max", f"The block's largest gradient norm {_MINUTE}", "block")
    update_rms = _gauge("block_update_rms_max", f"The block's largest update RMS {_MINUTE}", "block")
    for snapshot in snapshots:
        if snapshot.maxima is None:
            continue
        if not math.isnan(snapshot.maxima.loss):
            loss.add_metric(_labels(snapshot), snapshot.maxima.loss)
        _add_present(gradient_norm, snapshot, snapshot.maxima.gradient_norm)
        _add_present(update_rms, snapshot, snapshot.maxima.update_rms)
    yield from (loss, gradient_norm, update_rms)


def _excursion_family(snapshots: list[RunSnapshot]) -> Metric:
    """Each from 0 on, as alerts; they begin anew when the daemon does."""
    family = _counter(
        "excursions",
        "Samples in which a single value stood out but was no finding; block is empty for the loss.",
        "signal",
        "block",
    )
    for snapshot in snapshots:
        for signal, block in (("loss", ""), *product(_SIGNALS, snapshot.hello.blocks)):
            count = snapshot.excursions_total.get((signal, block), 0)
            family.add_metric(_labels(snapshot, signal, block), count)
    return family


def _add_present(family: GaugeMetricFamily, snapshot: RunSnapshot, values: Iterable[float]) -> None:
    """A NaN means that nothing was measured; an infinity is shown."""
    for block, value in zip(snapshot.hello.blocks, values, strict=True):
        if not math.isnan(value):
            family.add_metric(_labels(snapshot, block), float(value))


@dataclass(frozen=True, slots=True)
class _Estimated:
    """An estimate's family, that of its standard error, and for what has a residual, that."""

    value: GaugeMetricFamily
    stderr: GaugeMetricFamily
    residual: GaugeMetricFamily | None = None

    def add(self, labels: list[str], estimate: Estimate) -> None:
        """An estimate without a finite value is not shown, an unknown standard error or residual is left out."""
        if not math.isfinite(estimate.value):
            return
        self.value.add_metric(labels, estimate.value)
        if math.isfinite(estimate.stderr):
            self.stderr.add_metric(labels, estimate.stderr)
        if self.residual is not None and math.isfinite(estimate.residual):
            self.residual.add_metric(labels, estimate.residual)

    def __iter__(self) -> Iterator[Metric]:
        yield from (self.value, self.stderr, *([] if self.residual is None else [self.residual]))


def _estimated(name: str, documentation: str, *labels: str, residual: bool = False) -> _Estimated:
    stderr = _gauge(f"{name}_stderr", f"Standard error of sharpwatch_{name}, in its unit.", *labels)
    distance = _gauge(f"{name}_residual", f"Bound on how far sharpwatch_{name} is from a true eigenvalue.", *labels)
    return _Estimated(_gauge(name, documentation, *labels), stderr, distance if residual else None)


_SHARPNESS = (
    "Average sharpness: trace of the curvature matrix over its size; gnb: Gauss-Newton, of the loss per token; moment: "
    "the newest gnb probe, carried on by squared gradients."
)
_TRACE = "Trace of the block's curvature matrix (gnb: Gauss-Newton, hutchinson: Hessian) of the mean loss per token."
_TOP = "Largest eigenvalue of the curvature matrix (gnb: Gauss-Newton, lanczos: Hessian)"
_BOTTOM = "Smallest eigenvalue of the Hessian, below zero where the loss curves downwards,"
_RATIO = (
    "how near the optimizer's step is to the edge, 1, above which the loss rises; by curvature over twice the descent "
    "along it (directional), by losses along it (linesearch), by the preconditioned top eigenvalue (preconditioned)."
)
_SHARE = (
    "Block's part of the curvature along the optimizer's step, with half of what it shares with others; over all "
    "blocks they sum to 1. Below 0 where the block takes from it."
)
_RANK = "Effective rank (tr G)^2 / tr G^2 of the block's Gauss-Newton matrix G: how many directions share its trace."
_DRIFT = "How far the block's sharp directions have turned between the halves of the window: 0 not at all, 1 wholly."
_ALIGNMENT = (
    "Cosine between the Gauss-Newton matrix and the gradient's outer product, g'Gg/(|g|^2 ||G||_F); "
    "lambda_max/||G||_F along the sharpest direction."
)
_STEP = "Step of the newest probe behind the estimates"
_KINDS = {"direction": "directional"}  # where a stability ratio's estimator has another name than its kind


def _block_estimates() -> dict[str, _Estimated]:
    """By quantity."""
    labels = ("block", "estimator")
    return {
        "sharpness": _estimated("block_sharpness", _SHARPNESS, *labels),
        "trace": _estimated("block_hessian_trace", _TRACE, *labels),
        "top_eigenvalue": _estimated("block_top_eigenvalue", f"{_TOP} of the block.", *labels, residual=True),
        "bottom_eigenvalue": _estimated("block_bottom_eigenvalue", f"{_BOTTOM} of the block.", *labels, residual=True),
        "stability_ratio": _estimated("block_stability_ratio", f"Of the block's part: {_RATIO}", "block", "kind"),
        "curvature_share": _estimated("block_curvature_share", _SHARE, "block"),
        "effective_rank": _estimated("block_effective_rank", _RANK, *labels),
        "drift": _estimated("block_drift", _DRIFT, *labels),
        "alignment": _estimated("block_gradient_alignment", _ALIGNMENT, *labels),
    }


def _whole_estimates() -> dict[str, _Estimated]:
    """By quantity."""
    over = "over all parameters."
    return {
        "top_eigenvalue": _estimated("top_eigenvalue", f"{_TOP} {over}", "estimator", residual=True),
        "bottom_eigenvalue": _estimated("bottom_eigenvalue", f"{_BOTTOM} {over}", "estimator", residual=True),
        "stability_ratio": _estimated("stability_ratio", f"Stability ratio: {_RATIO}", "kind"),
    }


def _estimate_families(snapshots: list[RunSnapshot]) -> Iterator[Metric]:
    by_block, whole = _block_estimates(), _whole_estimates()
    order = _gauge(
        "block_order_correlation",
        "Spearman correlation of measured sharpness with emb < qk < ffn < vo < norm, -1 to 1.",
    )
    inverted = _gauge(
        "block_order_inverted",
        "1 if `low` is the sharper one of two neighbours in that order by two standard errors, 0 if `high` is.",
        "low",
        "high",
    )
    since = _gauge("block_order_since_step", "Step from which all neighbours stand in that order; absent if not.")
    block_step = _gauge("block_estimate_step", f"{_STEP} of the block.", "block", "estimator")
    step = _gauge("estimate_step", f"{_STEP} over all parameters.", "estimator")
    for snapshot in snapshots:
        newest: dict[tuple[str, str], int] = {}
        for (quantity, block, estimator), estimate in snapshot.all_estimates.items():
            family = (by_block if block else whole).get(quantity)
            kind = _KINDS.get(estimator, estimator)
            if family is not None:
                of_kind = [] if quantity == "curvature_share" else [kind]  # there is but one
                family.add(_labels(snapshot, *([block] if block else []), *of_kind), estimate)
                newest[block, kind] = max(estimate.step, newest.get((block, kind), 0))
        for (block, kind), at in newest.items():
            (block_step if block else step).add_metric(_labels(snapshot, *([block] if block else []), kind), at)
        if snapshot.order_correlation is not None:
            order.add_metric(_labels(snapshot), snapshot.order_correlation)
        for pair in snapshot.order:
            inverted.add_metric(_labels(snapshot, pair.low, pair.high), float(pair.inverted))
        if snapshot.order_since is not None:
            since.add_metric(_labels(snapshot), snapshot.order_since)
    for family in (*by_block.values(), *whole.values()):
        yield from family
    yield from (block_step, step, order, inverted, since)


def _action_families(snapshots: list[RunSnapshot]) -> Iterator[Metric]:
    active = _gauge(
        "alert_active", "1 while the alert stands, 0 after; block is empty for an alert on none.", "alert", "block"
    )
    alerts = _counter("alerts", "Alerts raised.", "alert")
    incident_open = _gauge(
        "incident",
        "1 while the incident is open; block, layer and parameter are the likeliest culprit's, empty for the whole "
        "model; rank is the one that differs, if one does.",
        *_INCIDENT,
    )
    onset = _gauge("incident_onset_step", "Step at which the open incident began.", *_INCIDENT)
    critical = _counter("critical_incidents", "Incidents that have reached severity critical.")
    foreign = _gauge("foreign_alert", "1 while an alert of another system of that name fires, 0 after.", "alert")
    decisions = _counter("decisions", "Decisions that reached the outcome.", "action", "mode", "outcome")
    revision = _gauge("lr_revision", "Number of the newest LR revision; 0 before the first.")
    for snapshot in snapshots:
        active_by_block: dict[tuple[str, str], bool] = {}
        open_ones: dict[tuple[str, ...], int] = {}  # the newest of those that have the same labels
        for title, fires in _foreign(snapshot).items():
            foreign.add_metric(_labels(snapshot, title), float(fires))
        own = [incident for incident in snapshot.incidents if incident.foreign is None]
        for incident in own:
            for key in product(incident.names, incident.blocks or ("",)):
                active_by_block[key] = incident.active or active_by_block.get(key, False)
            if incident.active:
                layer, _, block = (incident.layer_blocks or ("",))[0].rpartition(".")
                whose = (block, layer, incident.parameter, "" if incident.rank is None else str(incident.rank))
                open_ones[incident.name, incident.severity, incident.cause, *whose] = incident.onset
        for (name, block), is_active in active_by_block.items():
            active.add_metric(_labels(snapshot, name, block), float(is_active))
        # Each from 0 on: increase() can't see a counter that begins at 1.
        for name, count in (dict.fromkeys(_ALERTS, 0) | dict(snapshot.incidents_total)).items():
            alerts.add_metric(_labels(snapshot, name), count)
        critical.add_metric(_labels(snapshot), sum(each.severity == "critical" for each in own))
        for labels, step in open_ones.items():
            incident_open.add_metric(_labels(snapshot, *labels), 1.0)
            onset.add_metric(_labels(snapshot, *labels), step)
        for (action, mode, outcome), count in snapshot.decisions_total.items():
            decisions.add_metric(_labels(snapshot, action, mode, outcome), count)
        revision.add_metric(_labels(snapshot), snapshot.lr_revision)
    yield from (active, alerts, incident_open, onset, critical, foreign, decisions, revision)


def _foreign(snapshot: RunSnapshot) -> dict[str, bool]:
    """By name of an alert of another system whether one fires.

    They are no incidents in `/metrics`: a rule that fires by them would be taken in again, and never end.
    """
    firing: dict[str, bool] = {}
    for incident in snapshot.incidents:
        if incident.foreign is not None:
            firing[incident.title] = incident.active or firing.get(incident.title, False)
    return firing


def _agent_families(snapshots: list[RunSnapshot]) -> Iterator[Metric]:
    overhead = _gauge("agent_overhead_ratio", "Agent's seconds over the step's seconds, as the agent measures it.")
    dropped = _counter("agent_dropped_samples", "Samples the agent lost in this attempt, by reason.", "reason")
    every = _gauge(
        "block_update_interval", "The block is updated at steps that this divides; 1 is every step.", "block"
    )
    swallowed = _counter("agent_swallowed_errors", "Errors of the agent itself, kept from the training loop.")
    for snapshot in snapshots:
        if snapshot.health is None:
            continue
        if snapshot.health.overhead_ratio is not None:
            overhead.add_metric(_labels(snapshot), snapshot.health.overhead_ratio)
        for reason, count in snapshot.health.dropped.items():
            dropped.add_metric(_labels(snapshot, reason), count)
        swallowed.add_metric(_labels(snapshot), snapshot.health.swallowed_errors)
        for block in snapshot.hello.blocks:
            every.add_metric(_labels(snapshot, block), snapshot.health.update_every.get(block, 1))
    yield from (overhead, dropped, every, swallowed, *_probe_families(snapshots), _objective_family(snapshots))


def _probe_families(snapshots: list[RunSnapshot]) -> Iterator[Metric]:
    failures = _counter("agent_probe_failures", "Probes that failed in this attempt; the run's view has why.", "probe")
    given_up = _gauge("agent_probe_given_up", "1 if the probe failed for good and will not run again.", "probe")
    for snapshot in snapshots:
        if snapshot.health is None:
            continue
        failed = snapshot.health.failed_probes
        # Of known probes alone: what a client names must not become labels without bound.
        for probe in (probe for probe in PROBES if probe in failed or probe in snapshot.hello.probes):
            one = failed.get(probe, FailedProbe(0, given_up=False))
            failures.add_metric(_labels(snapshot, probe), one.count)
            given_up.add_metric(_labels(snapshot, probe), float(one.given_up))
    yield from (failures, given_up)


def _objective_family(snapshots: list[RunSnapshot]) -> Metric:
    objective = InfoMetricFamily(
        "sharpwatch_objective",
        "What gnb takes for the run's loss, and how that is known; always 1.",
        labels=(*_RUN, "objective", "state"),
    )
    for snapshot in snapshots:
        health = snapshot.health
        if health is not None and health.objective:
            objective.add_metric(_labels(snapshot, health.objective, health.objective_state), {})
    return objective


def _layer_families(snapshots: list[RunSnapshot]) -> Iterator[Metric]:
    """Sharpness of blocks inside layers only: those outside every layer are whole under sharpwatch_block_*."""
    family = _estimated("layer_sharpness", f"{_SHARPNESS} One block in one layer.", "block", "layer", "estimator")
    for snapshot in snapshots:
        if not snapshot.layer_sharpness:
            continue
        rows = zip(snapshot.hello.layer_blocks, snapshot.layer_sharpness, strict=True)
        for (block, layer), estimate in islice((row for row in rows if row[0][1]), MAX_LAYER_SERIES):
            family.add(_labels(snapshot, block, layer, estimate.estimator), estimate)
    yield from family
    attention = _gauge(
        "attention_logit_scale",
        "Largest attention logit of inputs of length 1: spectral norm of W_Q W_K^T / sqrt(d_head), over heads.",
        "layer",
    )
    for snapshot in snapshots:
        for layer, scale in islice(snapshot.attention_scales, MAX_LAYER_SERIES):
            attention.add_metric(_labels(snapshot, layer), scale)
    yield attention
