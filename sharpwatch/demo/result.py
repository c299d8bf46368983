"""The machine-readable result of a demo run."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from sharpwatch.demo.play import Outcome
from sharpwatch.demo.train import Recipe
from sharpwatch.demo.view import estimate_of
from sharpwatch.v1 import operator_pb2 as pb

_WINDOW = 20  # steps that a loss "before" and "at the end" is the mean of


def summarise(recipe: Recipe, outcome: Outcome) -> dict[str, Any]:
    """What `--json` writes."""
    detail = outcome.detail
    return {
        "run": recipe.run,
        "model": recipe.model,
        "steps": recipe.steps,
        "fault": {"kind": recipe.fault, "step": recipe.fault_step},
        "blocks": {block.block: _block(block) for block in detail.blocks},
        "alerts": [
            {
                "name": alert.name,
                "step": alert.first_step,
                "last_step": alert.last_step,
                "blocks": list(alert.blocks),
                "severity": alert.severity,
                "evidence": alert.evidence,
            }
            for alert in sorted(detail.alerts, key=lambda alert: alert.first_step)
        ],
        "decisions": [_decision(decision) for decision in outcome.decisions],
        "loss": _loss(recipe, outcome.losses),
        "overhead_ratio": detail.overhead_ratio,
        "metrics_url": outcome.metrics_url,
        "dropped": sum(detail.dropped.values()),
    }


def _block(block: pb.Block) -> dict[str, Any]:
    sharpness = estimate_of(block.estimates, "sharpness")
    trace = estimate_of(block.estimates, "trace")
    top = estimate_of(block.estimates, "top_eigenvalue")
    return {
        "sharpness": sharpness.value if sharpness else None,
        "stderr": sharpness.stderr if sharpness else None,
        "trace": trace.value if trace else None,
        "top_eigenvalue": top.value if top else None,
        "parameters": block.parameters,
    }


def _decision(decision: pb.Decision) -> dict[str, Any]:
    return {
        "action": decision.action,
        "mode": decision.mode,
        "outcome": decision.outcome,
        "applied_step": decision.applied_step if decision.HasField("applied_step") else None,
        "step": decision.step,
        "alert": decision.alert_name,
        "multipliers": dict(decision.multipliers),
        "guard": decision.guard,
        "detail": decision.detail,
    }


def _loss(recipe: Recipe, losses: list[tuple[int, float]]) -> dict[str, float | None]:
    before = [loss for step, loss in losses if recipe.fault_step - _WINDOW < step <= recipe.fault_step]
    after = [loss for step, loss in losses if step > recipe.fault_step]
    return {
        "before_fault": fmean(before) if before else None,
        "peak": max(after) if after else None,
        "end": fmean([loss for _, loss in losses[-_WINDOW:]]),
    }
