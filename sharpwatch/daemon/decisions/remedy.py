"""What cures an incident, by its cause and by what was measured: how far a cut has to go, or why none helps."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.decisions.ramp_back import ActiveScaling, scaling_state
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.records import Cause, Decision, Incident

FOLLOWED_WITHIN = 1.15  # times what it should be, up to which a rate that is held down is left as it is
HARMLESS = 0.05  # the part of itself that a first step may change a layer block by
_NO_CUT: Mapping[Cause, str] = {
    "data": "wrong data do this, no learning rate cures it; a rollback round them does, where they go on",
    "damaged-weight": "damaged weights do this, no learning rate cures it; a rollback to before it does",
    "optimizer-state": "the optimizer's state does this, no learning rate cures it; a rollback to before it does",
    "non-finite": "no learning rate makes numbers finite again; a rollback to before it does",
}


@dataclass(frozen=True, slots=True)
class Cut:
    """How far to cut.

    Attributes:
        factors: By block, below 1; empty where nothing is to be cut.
        why: Why so far, or why not at all.
        follows_rate: Whether the multipliers go on with the trainer's own rate.
    """

    factors: Mapping[str, float]
    why: str
    follows_rate: bool = False


def measured_cut(incident: Incident, detection: RunDetection, blocks: Collection[str]) -> Cut:
    """How far the rates of `blocks` have to be cut for an incident, by what was measured before its onset.

    The stability ratio is proportional to the learning rate, so that a cut by as much as it has grown takes it back.
    """
    if incident.name == "RateRaise":
        return _rate_cut(detection, blocks)
    if incident.name == "RateZero":
        return Cut({}, "the learning rate is 0: no multiplier makes it another")
    if "StabilityLimit" in incident.names and (excess := detection.stability_excess) > 1:
        return Cut(dict.fromkeys(blocks, 1 / excess), f"the stability ratio is ×{excess:.3g} of its usual level")
    if "AttentionGrowth" in incident.names:
        return Cut({}, "attention logits grow with the weights, and no learning rate takes that back")
    return Cut({}, _NO_CUT.get(incident.cause, "nothing that is measured says how far to cut"))


def _rate_cut(detection: RunDetection, blocks: Collection[str]) -> Cut:
    excess = {block: value for block, value in detection.rate_excess.items() if block in blocks and value > 1}
    if excess:
        factors = {block: 1 / value for block, value in excess.items()}
        return Cut(factors, f"its schedule has ×{max(excess.values()):.3g} of what it had", follows_rate=True)
    change = detection.first_change
    if change > HARMLESS:
        factor = HARMLESS / change
        return Cut(dict.fromkeys(blocks, factor), f"a first step changes {100 * change:.0f} % of a layer block")
    return Cut({}, "the rate is no longer above what it was")


def followed(scaling: ActiveScaling, excess: Mapping[str, float], low: float) -> dict[str, float]:
    """The multipliers of a cut that follows the trainer's rate, at least `low`: what they were, less what it is above.

    Args:
        scaling: The cut.
        excess: By block how many times the rate is what it was.
        low: The smallest multiplier.
    """
    return {block: max(value / excess.get(block, 1.0), min(low, value)) for block, value in scaling.before.items()}


def is_followed(multipliers: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    """Whether multipliers are near enough to those wanted."""
    return all(abs(math.log(multipliers[block] / value)) < math.log(FOLLOWED_WITHIN) for block, value in wanted.items())


def held_down(excess: Mapping[str, float], decision: Decision, log: DecisionLog) -> bool:
    """Whether the cut of a decision's incident, which goes with the trainer's rate, holds that at what it was."""
    if not decision.follows_rate:
        return False
    active = (one for one in scaling_state(log).active if one.made.follows_rate)
    scaling = next((one for one in active if one.made.alert_id == decision.alert_id), None)
    return scaling is not None and is_followed(log.multipliers, followed(scaling, excess, 0.0))
