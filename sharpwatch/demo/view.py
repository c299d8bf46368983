"""The demo's live view: loss, sharpness of each block with its error, alerts and decisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sharpwatch.v1.operator_pb2 import Decision, RunDetail
from sharpwatch.v1.types_pb2 import Estimate

_BARS = "▁▂▃▄▅▆▇█"
_SCALE = 30  # characters of the sharpness axis


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw `values` as at most `width` bars, each the mean of an equal share of them."""
    finite = [value for value in values if math.isfinite(value)]
    bars = min(width, len(finite))
    means = [fmean(finite[len(finite) * i // bars : len(finite) * (i + 1) // bars]) for i in range(bars)]
    if not means:
        return ""
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low or 1.0)
    return "".join(_BARS[round((value - low) * scale)] for value in means)


def estimate_of(estimates: Sequence[Estimate], quantity: str) -> Estimate | None:
    """The estimate of `quantity`, or None."""
    return next((estimate for estimate in estimates if estimate.quantity == quantity), None)


def error_bar(estimate: Estimate, low: float, high: float) -> Text:
    """Draw a value and two standard errors on a logarithmic axis from `low` to `high`."""
    width = _SCALE / max(math.log(high / low), 1e-9)

    def column(value: float) -> int:
        return max(0, min(_SCALE, round(math.log(max(value, low) / low) * width)))

    spread = 2 * estimate.stderr if math.isfinite(estimate.stderr) else 0.0
    left, mid, right = column(estimate.value - spread), column(estimate.value), column(estimate.value + spread)
    return Text(" " * left + "─" * (mid - left) + "●" + "─" * (right - mid))


def _blocks(detail: RunDetail) -> Table:
    table = Table(expand=True, box=None)
    for heading in ("block", "sharpness", "± s.e.", "", "stability", "update RMS", "LR ×"):
        table.add_column(heading, justify="left" if heading in ("block", "") else "right", no_wrap=True)
    sharpness = {block.block: estimate_of(block.estimates, "sharpness") for block in detail.blocks}
    values = [estimate.value for estimate in sharpness.values() if estimate and estimate.value > 0]
    low, high = (min(values) / 2, max(values) * 2) if values else (1.0, 2.0)
    for block in detail.blocks:
        estimate = sharpness[block.block]
        ratio = estimate_of(block.estimates, "stability_ratio")
        table.add_row(
            block.block,
            f"{estimate.value:.2e}" if estimate else "…",
            f"{estimate.stderr:.0e}" if estimate else "",
            error_bar(estimate, low, high) if estimate and estimate.value > 0 else "",
            f"{ratio.value:.2f}" if ratio else "…",
            f"{block.update_rms:.2f}" if block.HasField("update_rms") else "…",
            f"{block.lr_multiplier:.3g}" if block.HasField("lr_multiplier") else "…",
        )
    return table


def decision_line(decision: Decision) -> str:
    """Describe a decision in one line."""
    cause = decision.alert_name or decision.reason
    where = f" from step {decision.applied_step}" if decision.HasField("applied_step") else ""
    why = f" ({decision.guard})" if decision.outcome == "refused" else ""
    return f"step {decision.step} {cause} → {decision.action} {_change(decision)}{where}: {decision.outcome}{why}"


def _change(decision: Decision) -> str:
    if decision.HasField("rollback"):
        return f"to step {decision.rollback.checkpoint.step}"
    factors = {f"×{value:.3g}" for value in decision.multipliers.values()}
    if len(factors) == 1:
        return factors.pop()
    return ", ".join(f"{block} ×{value:.3g}" for block, value in sorted(decision.multipliers.items()))


def render(detail: RunDetail, decisions: Sequence[Decision], losses: Sequence[float], steps: int) -> RenderableType:
    """Draw the view of one message of `WatchRun`."""
    run = detail.run
    loss = f"{run.loss:.3f}" if run.HasField("loss") else "…"
    head = Text(f"step {run.step}/{steps}   loss {loss}   mode {run.mode}   LR revision {run.lr_revision}")
    trace = Text(sparkline(losses, 90), style="cyan")
    alerts = [
        Text(
            f"{'●' if alert.active else '○'} {alert.name} {','.join(alert.blocks)} "
            f"steps {alert.first_step}-{alert.last_step}: {alert.evidence}",
            style="red" if alert.active else "dim",
        )
        for alert in detail.alerts[-4:]
    ]
    made = [Text(decision_line(decision), style="yellow") for decision in decisions[-4:]]
    return Panel(Group(head, trace, _blocks(detail), *alerts, *made), title=run.run, title_align="left")
