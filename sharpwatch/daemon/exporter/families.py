"""What `/metrics` shows of a run: the families, and the rows that a snapshot gives each of them.

A section has families whose values are read from the same fields of a snapshot. Whoever renders a run again needs only
the rows of sections whose fields have changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.estimation.estimator import PROBES
from sharpwatch.daemon.ingest.samples import FailedProbe
from sharpwatch.daemon.records import CAUSES
from sharpwatch.daemon.runs.snapshot import RunSnapshot

MAX_LAYER_SERIES = 512  # layer blocks exported of one run
RUN_LABELS = ("training_job", "run")
_MINUTE = "of the minute up to the newest sample."
_ALERTS = sorted(CAUSES)
_SIGNALS = ("update", "gradient", "weight")  # of blocks, whose excursions are counted; beside the loss
_INCIDENT = ("name", "severity", "cause", "block", "layer", "parameter", "rank")
_Kind = Literal["gauge", "counter", "info"]
_METRICS: dict[_Kind, type[GaugeMetricFamily | CounterMetricFamily | InfoMetricFamily]] = {
    "gauge": GaugeMetricFamily,
    "counter": CounterMetricFamily,
    "info": InfoMetricFamily,
}
_SUFFIXES: dict[_Kind, str] = {"gauge": "", "counter": "_total", "info": "_info"}


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """A metric family. Its samples have the labels of the run, then `labels`."""

    kind: _Kind
    name: str
    documentation: str
    labels: tuple[str, ...]
    sample: str = field(init=False)  # the name of its samples

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample", self.name + _SUFFIXES[self.kind])

    def metric(self) -> Metric:
        """The family without samples, as prometheus_client has it."""
        return _METRICS[self.kind](self.name, self.documentation, labels=(*RUN_LABELS, *self.labels))


Row = tuple[Family, tuple[str, ...], float]  # a sample: its family, the values of its `labels`, and its value


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """Families whose values are read from the same fields of a snapshot, beside its Hello.

    Attributes:
        families: The families, in the order in which they are exported.
        fields: The fields of a `RunSnapshot` that `rows` reads.
        rows: Gives the rows of a snapshot; those of each family in the order in which they are exported.
    """

    families: tuple[Family, ...]
    fields: tuple[str, ...]
    rows: Callable[[RunSnapshot], Iterator[Row]]


def _gauge(name: str, documentation: str, *labels: str) -> Family:
    return Family("gauge", f"sharpwatch_{name}", documentation, labels)


def _counter(name: str, documentation: str, *labels: str) -> Family:
    return Family("counter", f"sharpwatch_{name}", documentation, labels)


def _info(name: str, documentation: str, *labels: str) -> Family:
    return Family("info", f"sharpwatch_{name}", documentation, labels)


def _present(family: Family, blocks: Iterable[str], values: Iterable[float]) -> Iterator[Row]:
    """A NaN means that nothing was measured; an infinity is shown."""
    for block, value in zip(blocks, values, strict=True):
        if not math.isnan(value):
            yield family, (block,), value


# The run

_RUN = _info(
    "run",
    "What the run said of itself; always 1.",
    *("optimizer", "host", "agent_version", "control", "mode", "phase"),
)
_RUN_STEP = _gauge("run_step", "The newest optimizer step seen.")
_RUN_LOSS = _gauge("run_loss", "The newest training loss, as the run reports it.")
_LAST_SAMPLE = _gauge("run_last_sample_timestamp_seconds", "When the newest sample came in, unix seconds.")
_PARAMETERS = _gauge("block_parameters", "Parameters of the block type over all layers.", "block")


def _run_rows(snapshot: RunSnapshot) -> Iterator[Row]:
    hello = snapshot.hello
    yield _RUN, (hello.optimizer, hello.host, hello.agent_version, hello.control, snapshot.mode, snapshot.phase), 1.0


def _newest_rows(snapshot: RunSnapshot) -> Iterator[Row]:
    if snapshot.step is not None:
        yield _RUN_STEP, (), snapshot.step
    if snapshot.loss is not None:
        yield _RUN_LOSS, (), snapshot.loss
    if snapshot.last_sample_at is not None:
        yield _LAST_SAMPLE, (), snapshot.last_sample_at


def _parameter_rows(snapshot: RunSnapshot) -> Iterator[Row]:
    for block, numel in zip(snapshot.hello.blocks, snapshot.hello.block_parameters.tolist(), strict=True):
        yield _PARAMETERS, (block,), numel


# Of every step

_TAP = {
    name: _gauge(f"block_{name}", documentation, "block")
    for name, documentation in (
        ("gradient_norm", "Euclidean norm of the block's gradient as it is stepped on, after clipping."),
        ("weight_norm", "Euclidean norm of the block's weights."),
        (
            "update_rms",
            "RMS of gradient over the root of Adam's second moment, RMS_t; 1 is normal, spikes precede loss.",
        ),
        (
            "learning_rate",
            "Learning rate in force for the block, multiplier included; parameter-weighted mean.",
        ),
        ("lr_multiplier", "Multiplier in force on the block's learning rate; parameter-weighted mean."),
    )
}
_UPDATE_RATIO = _gauge("block_update_ratio", "Norm of the block's update over the norm of its weights.", "block")
_GRADIENT_NOISE = _gauge("block_gradient_noise", "Trace of the covariance of the block's step gradient.", "block")
_LOSS_MAX = _gauge("run_loss_max", f"The largest training loss {_MINUTE}")
_GRADIENT_NORM_MAX = _gauge("block_gradient_norm_max", f"The block's largest gradient norm {_MINUTE}", "block")
_UPDATE_RMS_MAX = _gauge("block_update_rms_max", f"The block's largest update RMS {_MINUTE}", "block")
_EXCURSIONS = _counter(
    "excursions",
    "Samples in which a single value stood out but was no finding; block is empty for the loss.",
    "signal",
    "block",
)


def _tap_rows(snapshot: RunSnapshot) -> Iterator[Row]:
    if snapshot.tap is not None:
        for name, family in _TAP.items():
            yield from _present(family, snapshot.hello.blocks, getattr(snapshot.tap, name).tolist())


def _ratio_rows(snapshot: RunSnapshot) -> Iterator[Row]:
    if snapshot.update_ratio is not None:
        yield from _present(_UPDATE_RATIO, snapshot.hello.blocks, snapshot.update_ratio)


def _noise_rows(snapshot: RunSnapshot) -> Iterator[Row]:
    if snapshot.gradient_noise is not None:
        yield from _present(_GRADIENT_NOISE, snapshot.hello.blocks, snapshot.gradient_noise)


def _maxima_rows(snapshot: RunSnapshot) -> Iterator[Row]:
    maxima = snapshot.maxima
    if maxima is None:
        return
    if not math.isnan(maxima.loss):
        yield _LOSS_MAX, (), maxima.loss
    yield from _present(_GRADIENT_NORM_MAX, snapshot.hello.blocks, maxima.gradient_norm.tolist())
    yield from _present(_UPDATE_RMS_MAX, snapshot.hello.blocks, maxima.update_rms.tolist())


def _excursion_rows(snapshot: RunSnapshot) -> Iterator[Row]:
    """Each from 0 on, as alerts; they begin anew when the daemon does."""
    for where in (("loss", ""), *product(_SIGNALS, snapshot.hello.blocks)):
        yield _EXCURSIONS, where, snapshot.excursions_total.get(where, 0)


# Estimates


@dataclass(frozen=True, slots=True)
class _Estimated:
    """An estimate's family, that of its standard error, and for what has a residual, that."""

    value: Family
    stderr: Family
    residual: Family | None = None

    def rows(self, labels: tuple[str, ...], estimate: Estimate) -> Iterator[Row]:
        """An estimate without a finite value is not shown, an unknown standard error or residual is left out."""
        if not math.isfinite(estimate.value):
            return
        yield self.value, labels, estimate.value
        if math.isfinite(estimate.stderr):
            yield self.stderr, labels, estimate.stderr
        if self.residual is not None and math.isfinite(estimate.residual):
            yield self.residual, labels, estimate.residual

    @property
    def families(self) -> tuple[Family, ...]:
        return self.value, self.stderr, *(() if self.residual is None else (self.residual,))


def _estimated(name: str, documentation: str, *labels: str, residual: bool = False) -> _Estimated:
    stderr = _gauge(f"{name}_stderr", f"Standard error of sharpwatch_{name}, in its unit.", *labels)
    distance = _gauge(f"{name}_residual", f"Bound on how far sharpwatch_{name} is from a true eigenvalue.", *labels)
    return _Estimated(_gauge(name, documentation, *labels), stderr, distance if residual else None)


_BY = ("block", "estimator")
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
_ALL = "over all parameters."
_KINDS = {"direction": "directional"}  # where a stability ratio's estimator has another name than its kind
_BLOCK_ESTIMATES = {  # by quantity
    "sharpness": _estimated("block_sharpness", _SHARPNESS, *_BY),
    "trace": _estimated("block_hessian_trace", _TRACE, *_BY),
    "top_eigenvalue": _estimated("block_top_eigenvalue", f"{_TOP} of the block.", *_BY, residual=True),
    "bottom_eigenvalue": _estimated("block_bottom_eigenvalue", f"{_BOTTOM} of the block.", *_BY, residual=True),
    "stability_ratio": _estimated("block_stability_ratio", f"Of the block's part: {_RATIO}", "block", "kind"),
    "curvature_share": _estimated("block_curvature_share", _SHARE, "block"),
    "effective_rank": _estimated("block_effective_rank", _RANK, *_BY),
    "drift": _estimated("block_drift", _DRIFT, *_BY),
    "alignment": _estimated("block_gradient_alignment", _ALIGNMENT, *_BY),
}
_WHOLE_ESTIMATES = {  # by quantity
    "top_eigenvalue": _estimated("top_eigenvalue", f"{_TOP} {_ALL}", "estimator", residual=True),
    "bottom_eigenvalue": _estimated("bottom_eigenvalue", f"{_BOTTOM} {_ALL}", "estimator", residual=True),
    "stability_ratio": _estimated("stability_ratio", f"Stability ratio: {_RATIO}", "kind"),
}
_BLOCK_ESTIMATE_STEP = _gauge("block_estimate_step", f"{_STEP} of the block.", "block", "estimator")
_ESTIMATE_STEP = _gauge("estimate_step", f"{_STEP} {_ALL}", "estimator")
_ORDER = _gauge(
    "block_order_correlation",
    "Spearman correlation of measured sharpness with emb < qk < ffn < vo < norm, -1 to 1.",
)
_INVERTED = _gauge(
    "block_order_inverted",
    "1 if `low` is the sharper one of two neighbours in that order by two standard errors, 0 if `high` is.",
    "low",
    "high",
)
_IN_ORDER_SINCE = _gauge("block_order_since_step", "Step from which all neighbours stand in that order; absent if not.")


def _estimate_rows(snapshot: RunSnapshot) -> Iterator[Row]:
    newest: dict[tuple[str, str], int] = {}
    for (quantity, block, estimator), estimate in snapshot.all_estimates.items():
        estimated = (_BLOCK_ESTIMATES if block else _WHOLE_ESTIMATES).get(quantity)
        kind = _KINDS.get(estimator, estimator)
        if estimated is not None:
            of_kind = () if quantity == "curvature_share" else (kind,)  # there is but one
            yield from estimated.rows((block, *of_kind) if block else of_kind, estimate)
            newest[block, kind] = max(estimate.step, newest.get((block, kind), 0))
    for (block, kind), at in newest.items():
        yield (_BLOCK_ESTIMATE_STEP, (block, kind), at) if block else (_ESTIMATE_STEP, (kind,), at)


def _order_rows(snapshot: RunSnapshot) -> Iterator[Row]:
    if snapshot.order_correlation is not None:
        yield _ORDER, (), snapshot.order_correlation
    for pair in snapshot.order:
        yield _INVERTED, (pair.low, pair.high), pair.inverted
    if snapshot.order_since is not None:
        yield _IN_ORDER_SINCE, (), snapshot.order_since


# Incidents and decisions

_ALERT_ACTIVE = _gauge(
    "alert_active", "1 while the alert stands, 0 after; block is empty for an alert on none.", "alert", "block"
)
_ALERTS_TOTAL = _counter("alerts", "Alerts raised.", "alert")
_INCIDENT_OPEN = _gauge(
    "incident",
    "1 while the incident is open; block, layer and parameter are the likeliest culprit's, empty for the whole "
    "model; rank is the one that differs, if one does.",
    *_INCIDENT,
)
_INCIDENT_ONSET = _gauge("incident_onset_step", "Step at which the open incident began.", *_INCIDENT)
_CRITICAL = _counter("critical_incidents", "Incidents that have reached severity critical.")
_FOREIGN = _gauge("foreign_alert", "1 while an alert of another system of that name fires, 0 after.", "alert")
_DECISIONS = _counter("decisions", "Decisions that reached the outcome.", "action", "mode", "outcome")
_REVISION = _gauge("lr_revision", "Number of the newest LR revision; 0 before the first.")


def _incident_rows(snapshot: RunSnapshot) -> Iterator[Row]:
    active_by_block: dict[tuple[str, str], bool] = {}
    open_ones: dict[tuple[str, ...], int] = {}  # the newest of those that have the same labels
    for title, fires in _foreign(snapshot).items():
        yield _FOREIGN, (title,), fires
    own = [incident for incident in snapshot.incidents if incident.foreign is None]
    for incident in own:
        for key in product(incident.names, incident.blocks or ("",)):
            active_by_block[key] = incident.active or active_by_block.get(key, False)
        if incident.active:
            layer, _, block = (incident.layer_blocks or ("",))[0].rpartition(".")
            whose = (block, layer, incident.parameter, "" if incident.rank is None else str(incident.rank))
            open_ones[incident.name, incident.severity, incident.cause, *whose] = incident.onset
    for where, is_active in active_by_block.items():
        yield _ALERT_ACTIVE, where, is_active
    # Each from 0 on: increase() can't see a counter that begins at 1.
    for name, count in (dict.fromkeys(_ALERTS, 0) | dict(snapshot.incidents_total)).items():
        yield _ALERTS_TOTAL, (name,), count
    yield _CRITICAL, (), sum(each.severity == "critical" for each in own)
    for labels, step in open_ones.items():
        yield _INCIDENT_OPEN, labels, 1.0
        yield _INCIDENT_ONSET, labels, step


def _foreign(snapshot: RunSnapshot) -> dict[str, bool]:
    """By name of an alert of another system whether one fires.

    They are no incidents in `/metrics`: a rule that fires by them would be taken in again, and never end.
    """
    firing: dict[str, bool] = {}
    for incident in snapshot.incidents:
        if incident.foreign is not None:
            firing[incident.title] = incident.active or firing.get(incident.title, False)
    return firing


def _decision_rows(snapshot: RunSnapshot) -> Iterator[Row]:
    for labels, count in snapshot.decisions_total.items():
        yield _DECISIONS, labels, count
    yield _REVISION, (), snapshot.lr_revision


# The agent

_OVERHEAD = _gauge("agent_overhead_ratio", "Agent's seconds over the step's seconds, as the agent measures it.")
_DROPPED = _counter("agent_dropped_samples", "Samples the agent lost in this attempt, by reason.", "reason")
_UPDATE_EVERY = _gauge(
    "block_update_interval", "The block is updated at steps that this divides; 1 is every step.", "block"
)
_SWALLOWED = _counter("agent_swallowed_errors", "Errors of the agent itself, kept from the training loop.")
_FAILURES = _counter("agent_probe_failures", "Probes that failed in this attempt; the run's view has why.", "probe")
_GIVEN_UP = _gauge("agent_probe_given_up", "1 if the probe failed for good and will not run again.", "probe")
_OBJECTIVE = _info(
    "objective", "What gnb takes for the run's loss, and how that is known; always 1.", "objective", "state"
)


def _health_rows(snapshot: RunSnapshot) -> Iterator[Row]:
    hello, health = snapshot.hello, snapshot.health
    if health is None:
        return
    if health.overhead_ratio is not None:
        yield _OVERHEAD, (), health.overhead_ratio
    for reason, count in health.dropped.items():
        yield _DROPPED, (reason,), count
    yield _SWALLOWED, (), health.swallowed_errors
    for block in hello.blocks:
        yield _UPDATE_EVERY, (block,), health.update_every.get(block, 1)
    # Of known probes alone: what a client names must not become labels without bound.
    for probe in (probe for probe in PROBES if probe in health.failed_probes or probe in hello.probes):
        one = health.failed_probes.get(probe, FailedProbe(0, given_up=False))
        yield _FAILURES, (probe,), one.count
        yield _GIVEN_UP, (probe,), one.given_up
    if health.objective:
        yield _OBJECTIVE, (health.objective, health.objective_state), 1.0


# Layers: blocks inside them only; those outside every layer are whole under sharpwatch_block_*

_LAYER = _estimated("layer_sharpness", f"{_SHARPNESS} One block in one layer.", "block", "layer", "estimator")
_ATTENTION = _gauge(
    "attention_logit_scale",
    "Largest attention logit of inputs of length 1: spectral norm of W_Q W_K^T / sqrt(d_head), over heads.",
    "layer",
)


def _layer_rows(snapshot: RunSnapshot) -> Iterator[Row]:
    if snapshot.layer_sharpness:
        rows = zip(snapshot.hello.layer_blocks, snapshot.layer_sharpness, strict=True)
        for where, estimate in islice((row for row in rows if row[0][1]), MAX_LAYER_SERIES):
            yield from _LAYER.rows((*where, estimate.estimator), estimate)


def _attention_rows(snapshot: RunSnapshot) -> Iterator[Row]:
    for layer, scale in islice(snapshot.attention_scales, MAX_LAYER_SERIES):
        yield _ATTENTION, (layer,), scale


_ESTIMATED = (*_BLOCK_ESTIMATES.values(), *_WHOLE_ESTIMATES.values())
SECTIONS = (
    Section((_RUN,), ("mode", "phase"), _run_rows),
    Section((_RUN_STEP, _RUN_LOSS, _LAST_SAMPLE), ("step", "loss", "last_sample_at"), _newest_rows),
    Section((_PARAMETERS,), (), _parameter_rows),
    Section(tuple(_TAP.values()), ("tap",), _tap_rows),
    Section((_UPDATE_RATIO,), ("update_ratio",), _ratio_rows),
    Section((_GRADIENT_NOISE,), ("gradient_noise",), _noise_rows),
    Section((_LOSS_MAX, _GRADIENT_NORM_MAX, _UPDATE_RMS_MAX), ("maxima",), _maxima_rows),
    Section((_EXCURSIONS,), ("excursions_total",), _excursion_rows),
    Section(
        (*(family for each in _ESTIMATED for family in each.families), _BLOCK_ESTIMATE_STEP, _ESTIMATE_STEP),
        ("estimates", "sharpness"),
        _estimate_rows,
    ),
    Section((_ORDER, _INVERTED, _IN_ORDER_SINCE), ("order_correlation", "sharpness"), _order_rows),
    Section(
        (_ALERT_ACTIVE, _ALERTS_TOTAL, _INCIDENT_OPEN, _INCIDENT_ONSET, _CRITICAL, _FOREIGN),
        ("incidents", "incidents_total"),
        _incident_rows,
    ),
    Section((_DECISIONS, _REVISION), ("decisions_total", "lr_revision"), _decision_rows),
    Section(
        (_OVERHEAD, _DROPPED, _UPDATE_EVERY, _SWALLOWED, _FAILURES, _GIVEN_UP, _OBJECTIVE), ("health",), _health_rows
    ),
)
LAYER_SECTIONS = (
    Section(_LAYER.families, ("layer_sharpness",), _layer_rows),
    Section((_ATTENTION,), ("attention",), _attention_rows),
)
