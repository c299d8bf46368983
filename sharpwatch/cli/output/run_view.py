"""The tables that `sharpwatch show` prints about one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sharpwatch.cli.output import formatting
from sharpwatch.cli.output.tables import Grid
from sharpwatch.v1.operator_pb2 import Block, Run, RunDetail, RunPhase
from sharpwatch.v1.types_pb2 import Estimate

_QUANTITIES = {
    "sharpness": "sharpness",
    "trace": "trace",
    "top_eigenvalue": "top eigenvalue",
    "stability_ratio": "stability ratio",
}


def run_view(detail: RunDetail, now: float) -> list[Grid]:
    """Everything about a run: its state, blocks, the origin of the estimates, alerts and failures.

    Args:
        detail: The daemon's answer.
        now: Unix seconds, which ages are relative to.
    """
    return [state(detail, now), blocks(detail.blocks), sources(detail), alerts(detail), failures(detail)]


def phase(run: Run) -> str:
    """`running`, `silent` or `closed`."""
    return RunPhase.Name(run.phase).removeprefix("RUN_PHASE_").lower()


def state(detail: RunDetail, now: float) -> Grid:
    """The run's names, progress, mode and checkpoints."""
    run = detail.run
    each = f", {formatting.number(detail.step_seconds, 3)} s each" if detail.HasField("step_seconds") else ""
    seen = formatting.age(run.last_sample_at_unix_ns, now)
    facts = [
        ("run", run.run),
        ("training job", ", ".join(filter(None, (run.training_job, detail.optimizer, detail.host)))),
        ("phase", f"{phase(run)}, attempt {run.attempts}, last sample {seen}"),
        ("step", f"{run.step}{each}"),
        ("loss", formatting.optional(run.loss if run.HasField("loss") else None)),
        ("mode", f"{run.mode}, control {run.control}, LR revision {run.lr_revision}"),
        (
            "overhead",
            f"{formatting.percent(detail.overhead_ratio)} of step time" if detail.HasField("overhead_ratio") else "–",
        ),
    ]
    facts += [(f"model's {name}", formatting.estimate(found)) for name, found in _model(detail.estimates)]
    if detail.HasField("block_order_correlation"):
        facts.append(("block order", f"rank correlation {formatting.number(detail.block_order_correlation, 2)}"))
    if detail.checkpoints:
        newest = max(detail.checkpoints, key=lambda checkpoint: checkpoint.step)
        facts.append(("checkpoints", f"{len(detail.checkpoints)}, newest of step {newest.step} at {newest.uri}"))
    return Grid("ll", tuple(facts))


def _model(estimates: Sequence[Estimate]) -> Iterable[tuple[str, Estimate]]:
    return ((name, found) for quantity, name in _QUANTITIES.items() if (found := first(estimates, quantity)))


def first(estimates: Sequence[Estimate], quantity: str) -> Estimate | None:
    """The first estimate of `quantity`, or None."""
    return next((estimate for estimate in estimates if estimate.quantity == quantity), None)


def blocks(found: Sequence[Block]) -> Grid:
    """A row for each block: curvature with its error, then statistics of the last step."""
    return Grid(
        "lrrrrrrrrr",
        tuple(_block(block) for block in found),
        (
            "block",
            "parameters",
            *_QUANTITIES.values(),
            "gradient norm",
            "update RMS",
            "learning rate",
            "multiplier",
        ),
        empty="no block reported yet",
    )


def _block(block: Block) -> tuple[str, ...]:
    measured = (
        block.gradient_norm if block.HasField("gradient_norm") else None,
        block.update_rms if block.HasField("update_rms") else None,
        block.learning_rate if block.HasField("learning_rate") else None,
        block.lr_multiplier if block.HasField("lr_multiplier") else None,
    )
    return (
        block.block,
        f"{block.parameters:,}",
        *(formatting.estimate(first(block.estimates, quantity)) for quantity in _QUANTITIES),
        *map(formatting.optional, measured),
    )


def sources(detail: RunDetail) -> Grid:
    """For each quantity: its estimator, number of draws and step; empty before the first probe."""
    rows = []
    for quantity, name in _QUANTITIES.items():
        found = [estimate for block in detail.blocks if (estimate := first(block.estimates, quantity))]
        if found:
            draws = _range([estimate.draws for estimate in found])
            at = _range([estimate.step for estimate in found])
            rows.append((name, ", ".join(sorted({estimate.estimator for estimate in found})), draws, at))
    return Grid("llrr", tuple(rows), ("quantity", "estimator", "draws", "step"), empty="no probe has come in yet")


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def alerts(detail: RunDetail) -> Grid:
    """The active alerts, the newest first."""
    active = sorted((alert for alert in detail.alerts if alert.active), key=lambda alert: -alert.first_step)
    return Grid(
        "lllrrl",
        tuple(
            (
                alert.name,
                alert.severity,
                ", ".join(alert.blocks) or "whole model",
                str(alert.first_step),
                str(alert.last_step),
                alert.evidence,
            )
            for alert in active
        ),
        ("alert", "severity", "blocks", "since step", "last step", "evidence"),
        empty="no active alert",
    )


def failures(detail: RunDetail) -> Grid:
    """Failed probes and dropped samples."""
    rows = [("probe failure", failure) for failure in detail.probe_failures]
    rows += [("dropped samples", f"{count} {reason}") for reason, count in sorted(detail.dropped.items()) if count]
    return Grid("ll", tuple(rows), empty="no probe failure, no sample dropped")
