"""What cures an incident, by its cause and by what was measured: how far a cut has to go, or why none helps."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from sharpwatch.daemon.decisions.ramp_back import ActiveScaling, whole
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.detection.signals import FIRST_STEPS
from sharpwatch.daemon.records import Cause, Incident

FOLLOWED_WITHIN = 1.15  # times what it should be, up to which a rate that is held down is left as it is
FAR_OFF = 1.5  # times what it should be, from which on a rate is brought down at once
HARMLESS = 0.05  # the part of itself that a first step may change a layer block by
# Why a rollback to before the trouble cures what no learning rate does.
WHY_BACK: Mapping[Cause, str] = {
    "damaged-weight": "no learning rate makes weights whole again",
    "optimizer-state": "no learning rate brings the optimizer's state back",
    "non-finite": "no learning rate makes numbers finite again",
}
_NO_CUT: Mapping[Cause, str] = {
    "data": "wrong data do this, no learning rate cures it; a rollback round them does, where they go on",
    **{cause: f"{why}; a rollback to before it does" for cause, why in WHY_BACK.items()},
}


@dataclass(frozen=True, slots=True)
class Cut:
    """How far to cut.

    Attributes:
        factors: By block; empty where no cut helps.
        why: Why so far, or why not at all.
        makes_up_for: By block how many times too high the rate is that the cut makes up for and goes with.
    """

    factors: Mapping[str, float]
    why: str
    makes_up_for: Mapping[str, float] = field(default_factory=dict)


def measured_cut(incident: Incident, detection: RunDetection, blocks: Collection[str]) -> Cut | None:
    """How far the rates of `blocks` have to be cut for an incident, by what was measured before its onset.

    The stability ratio is proportional to the learning rate, so that a cut by as much as it has grown takes it back.

    Returns:
        The cut, without factors where none helps; None where nothing is left to be done.
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


def _rate_cut(detection: RunDetection, blocks: Collection[str]) -> Cut | None:
    if not blocks:  # as at each step of a rate that is held down
        return None
    excess = {block: value for block, value in detection.rate_excess.items() if block in blocks and value > 1}
    if excess:
        factors = {block: 1 / value for block, value in excess.items()}
        return Cut(factors, f"its schedule has ×{max(excess.values()):.3g} of what it would have", excess)
    change = detection.first_change
    if change > HARMLESS:
        factor = HARMLESS / change
        return Cut(dict.fromkeys(blocks, factor), f"a first step changes {100 * change:.0f} % of a layer block")
    return None


def is_of_first_steps(incident: Incident) -> bool:
    """Whether an incident is one of the run's first steps, which were too long for fresh weights."""
    return incident.name == "RateRaise" and incident.onset <= FIRST_STEPS


@dataclass(frozen=True, slots=True)
class Correction:
    """How a cut has to go with the trainer's rate.

    Attributes:
        multipliers: Of its blocks.
        makes_up_for: By block how many times too high a rate they then make up for.
        is_urgent: Whether the rate in use is far above what it should be.
    """

    multipliers: Mapping[str, float]
    makes_up_for: Mapping[str, float]
    is_urgent: bool


def correction(
    scaling: ActiveScaling, in_force: Mapping[str, float], excess: Mapping[str, float], low: float
) -> Correction | None:
    """How a cut that makes up for a rate has to change, by what the rate is now; None where it is well as it is.

    Args:
        scaling: The cut.
        in_force: The multipliers of all blocks; other changes than the cut's stay in them.
        excess: By block how many times too high the rate is now.
        low: The smallest multiplier.
    """
    held = {block: scaling.makes_up_for.get(block, 1.0) for block in scaling.factors}
    wanted = {b: whole(max(in_force[b] * held[b] / excess[b], min(low, in_force[b]))) for b in held}
    apart = max(abs(math.log(in_force[block] / value)) for block, value in wanted.items())
    is_back = all(excess[block] == 1.0 for block in held) and apart > 0  # exactly, however little it was
    if apart < math.log(FOLLOWED_WITHIN) and not is_back:
        return None
    made_up = {block: held[block] * in_force[block] / wanted[block] for block in held}
    return Correction(wanted, made_up, max(excess[block] / held[block] for block in held) > FAR_OFF)


def holds_down(scaling: ActiveScaling, excess: Mapping[str, float]) -> bool:
    """Whether a cut that makes up for a rate holds it at what it would be."""
    held = scaling.makes_up_for
    return bool(held) and all(excess[b] < FOLLOWED_WITHIN * held.get(b, 1.0) for b in scaling.factors)
