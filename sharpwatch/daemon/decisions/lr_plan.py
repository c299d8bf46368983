"""Learning-rate plans: named sets of block multipliers, in which stages they come, and what becomes of each stage.

    start ──▶ running ── stage went well ──▶ waiting ── promote ──▶ running
                │  ▲                           │
                │  └─ stage went well, automatic, or promote of a paused plan
                ├─ the last stage went well, or is promoted ──▶ done
                ├─ an incident opens, an operator pauses it, a stage can't be judged or is not applied ──▶ paused
                ├─ a stage harms ──▶ aborted, and the stage is undone
                └─ an operator aborts it, or changes multipliers by hand ──▶ aborted

All here are functions of values; `plan_rollout` applies them to a run, and records and sends what comes of it. A stage
that is in force is judged while the plan is paused too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.decisions.curvature_share import at_unit_multipliers, multipliers_from_shares
from sharpwatch.daemon.decisions.effect import FEW, NEWEST, LossBand, against_raise, mean_of
from sharpwatch.daemon.decisions.transitions import UNDER_WAY
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.records import Decision, LrPlan, PlanState
from sharpwatch.errors import OperatorError

HOLD_STEPS = 50  # for which a stage is held after its ramp, before it is judged to have gone well
LARGEST_RAMP = 100_000
LONGEST_NAME = 100
_PAPER: Mapping[str, float] = {"emb": 10.0, "qk": 8.0, "ffn": 6.0, "vo": 4.0, "norm": 1.0, "head": 1.0}
_EXPONENT, _MOST = 0.65, 10.0  # of ratios of sharpness
_SHARPNESS_BY = ("gnb", "hutchinson")  # the estimators, the first that the run has
_LARGEST_ERROR = 0.3  # of a sharpness, relative: then its multiplier is known to some 20 %
Estimates = Mapping[tuple[str, str, str], Estimate]  # by quantity, block and estimator


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What an operator asks for.

    Attributes:
        name: Of a plan in `NAMED`, or what a set of the operator's own is called.
        multipliers: That set; empty for a named plan.
        stages: The blocks of each stage; empty for one block a stage, that of the least raise first.
        ramp_steps: Over how many steps each stage moves.
        automatic: Whether the next stage follows without being promoted.
    """

    name: str
    multipliers: Mapping[str, float]
    stages: Sequence[Sequence[str]]
    ramp_steps: int
    automatic: bool


@dataclass(frozen=True, slots=True)
class StageSigns:
    """What is known of the stage that is not judged yet, at a step of the run.

    Attributes:
        step: The step.
        incident: An open incident in words; empty where there is none.
        against: What speaks against the stage; empty for nothing.
        compared: How the loss stands to its band from before the stage; empty where too few losses say so.
    """

    step: int
    incident: str = ""
    against: str = ""
    compared: str = ""


# The sets


def target_of(request: PlanRequest, in_force: Mapping[str, float], estimates: Estimates) -> dict[str, float]:
    """The multipliers of a plan, of the blocks that it names and the run has.

    Args:
        request: What the operator asks for.
        in_force: The multipliers in force, of every block type of the run.
        estimates: The newest of the run.

    Raises:
        OperatorError: There is no such plan, or what it is made from is not known well enough.
    """
    if request.multipliers:
        if request.name in NAMED:
            raise OperatorError(f"{request.name} is the name of a plan with multipliers of its own; choose another")
        return dict(request.multipliers)
    if request.name not in NAMED:
        raise OperatorError(f"no plan {request.name!r}; there are {', '.join(NAMED)}, and any set of your own")
    return NAMED[request.name]({block: in_force[block] for block in _PAPER if block in in_force}, estimates)


def curvature_shares(estimates: Estimates) -> dict[str, float]:
    """Each block's share of the curvature along the step, u_bᵀ(Hu)_b / uᵀHu, as far as it is known."""
    return {block: one.value for (quantity, block, _), one in estimates.items() if quantity == "curvature_share"}


def _paper(blocks: Iterable[str], _: Estimates) -> dict[str, float]:
    return {block: _PAPER[block] for block in blocks}


def _measured(blocks: Iterable[str], estimates: Estimates) -> dict[str, float]:
    """(S_norm / S_b)^0.65 (Wang et al. 2025, arXiv 2502.19002)."""
    estimator = next((each for each in _SHARPNESS_BY if ("sharpness", "norm", each) in estimates), "")
    if not estimator:
        raise OperatorError("the plan measured needs the sharpness of norm, of which there is no estimate yet")
    found = {block: _known_sharpness(block, estimator, estimates) for block in blocks}
    return {block: min((found["norm"] / value) ** _EXPONENT, _MOST) for block, value in found.items()}


def _known_sharpness(block: str, estimator: str, estimates: Estimates) -> float:
    one = estimates.get(("sharpness", block, estimator))
    if one is None:
        raise OperatorError(f"the plan measured needs the sharpness of {block}: {estimator} has no estimate of it yet")
    stands = f"{one.value:.3g} ± {one.stderr:.1g} by {estimator} at step {one.step}"
    if not (math.isfinite(one.value) and one.value > 0):
        raise OperatorError(f"the plan measured needs a sharpness of {block} above 0; it is {stands}")
    if not one.stderr <= _LARGEST_ERROR * one.value:
        raise OperatorError(
            f"the plan measured needs the sharpness of {block} to {100 * _LARGEST_ERROR:g} %; it is {stands}"
        )
    return one.value


def _by_curvature_share(in_force: Mapping[str, float], estimates: Estimates) -> dict[str, float]:
    shares = curvature_shares(estimates)
    lacking = [block for block in in_force if not math.isfinite(shares.get(block, math.nan))]
    if lacking:
        raise OperatorError(
            f"the plan curvature-share needs each block's share of the curvature along the step; there is none yet of "
            f"{', '.join(lacking)}"
        )
    if not max(shares[block] for block in in_force) > 0:
        raise OperatorError("the plan curvature-share needs a block along whose step the loss curves upwards")
    of_plan = {block: shares[block] for block in in_force}
    return multipliers_from_shares(at_unit_multipliers(of_plan, in_force))


NAMED: Mapping[str, Callable[[Mapping[str, float], Estimates], dict[str, float]]] = {
    "paper": _paper,
    "measured": _measured,
    "curvature-share": _by_curvature_share,
}


# The stages


def stages_of(
    target: Mapping[str, float], before: Mapping[str, float], wanted: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], ...]:
    """The blocks of each stage, of those alone that the plan changes.

    Args:
        target: The multipliers at the plan's end, of the blocks that it names.
        before: The multipliers before it, of every block.
        wanted: The stages as the operator has them; empty for one block a stage, that of the least raise first.

    Raises:
        OperatorError: The stages do not have each block of the plan once, or nothing would change.
    """
    changed = [block for block in target if not math.isclose(target[block], before[block], rel_tol=1e-6)]
    if not changed:
        raise OperatorError("the plan changes nothing: every block has its multiplier already")
    if not wanted:
        return tuple((block,) for block in sorted(changed, key=lambda block: target[block] / before[block]))
    named = [block for stage in wanted for block in stage]
    if sorted(named) != sorted(target):
        raise OperatorError(
            f"stages must name each block of the plan once: {', '.join(target)}; got {', '.join(named)}"
        )
    stages = (tuple(block for block in stage if block in changed) for stage in wanted)
    return tuple(stage for stage in stages if stage)


def stage_name(plan: LrPlan, index: int) -> str:
    """A stage in words, such as `stage 2 of 5 (ffn)`."""
    return f"stage {index + 1} of {len(plan.stages)} ({', '.join(plan.stages[index])})"


def stage_set(plan: LrPlan, index: int) -> dict[str, float]:
    """The multipliers that a stage sets."""
    return {block: plan.target[block] for block in plan.stages[index]}


def set_before(plan: LrPlan, stages: Sequence[int]) -> dict[str, float]:
    """The multipliers that the blocks of some stages had before the plan."""
    return {block: plan.before[block] for index in stages for block in plan.stages[index]}


# What becomes of a stage


def signs(detection: RunDetection, plan: LrPlan, made: Decision | None, step: int) -> StageSigns:
    """Read what is known of the stage that is not judged yet.

    Args:
        detection: What is known of the run.
        plan: The plan.
        made: The decision on the stage; None where none is under way.
        step: The run's step.
    """
    opened = next(iter(detection.incidents.open), None)
    incident = "" if opened is None else f"incident {opened.id} ({opened.title}) is open"
    if made is None or made.applied_step is None:
        return StageSigns(step, incident)
    losses = detection.history.losses
    newest, band = losses.since(made.applied_step + plan.ramp_steps, NEWEST), LossBand.before(losses, made.applied_step)
    known = band is not None and len(newest) >= FEW
    compared = f"loss {mean_of(newest):.4g}, {band.level:.4g} before" if band is not None and known else ""
    return StageSigns(step, incident, against_raise(detection, made.applied_step), compared)


def advanced(plan: LrPlan, made: Decision | None, seen: StageSigns) -> LrPlan:
    """The plan as it stands after a step of the run.

    Args:
        plan: The plan as it stood, active.
        made: The decision on the stage that is not judged yet; None where none is under way.
        seen: What is known of that.

    Returns:
        The plan; if it is running and no stage is under way, its next stage is due. A stage that harms is no longer
        under way, and the plan aborted.
    """
    after = plan if made is None else _judged(plan, made, seen)
    if after.state in ("running", "waiting") and seen.incident:
        after = moved(after, "paused", "; ".join(filter(None, (seen.incident, "" if after is plan else after.detail))))
    return after


def moved(plan: LrPlan, state: PlanState, detail: str, **changes: Any) -> LrPlan:
    """The plan in another state, which the daemon brought it into unless `changes` say who did."""
    return replace(plan, **{"state": state, "detail": detail, "changed_by": "", "changed_reason": "", **changes})


def promoted(plan: LrPlan, author: str, reason: str) -> LrPlan:
    """The plan after an operator has promoted it; raises `OperatorError` where it does not wait for that."""
    if plan.state not in ("waiting", "paused"):
        raise OperatorError(f"plan {plan.name} is {plan.state}{_because(plan)}: only one that waits can be promoted")
    by = {"changed_by": author, "changed_reason": reason}
    if plan.under_way:
        return moved(plan, "running", f"{stage_name(plan, plan.stages_done)} is judged", **by)
    if plan.stages_done == len(plan.stages):
        return moved(plan, "done", "promoted", **by)
    return moved(plan, "running", f"{stage_name(plan, plan.stages_done)} is due", **by)


def paused(plan: LrPlan, author: str, reason: str) -> LrPlan:
    """The plan after an operator has paused it; raises `OperatorError` where it does not go on."""
    if plan.state not in ("running", "waiting"):
        raise OperatorError(f"plan {plan.name} is {plan.state}{_because(plan)}: only one that goes on can be paused")
    return moved(plan, "paused", f"paused by {author}", changed_by=author, changed_reason=reason)


def _because(plan: LrPlan) -> str:
    return f" ({plan.detail})" if plan.detail else ""


def _judged(plan: LrPlan, made: Decision, seen: StageSigns) -> LrPlan:
    """The plan after what has shown of the stage that is under way."""
    stage = stage_name(plan, plan.stages_done)
    if made.applied_step is None:
        if made.outcome in UNDER_WAY:
            return plan
        why = ": ".join(part for part in (made.guard if made.guard != "ok" else "", made.detail) if part)
        return moved(plan, "paused", f"{stage} {made.outcome}: {why or 'no reason given'}", under_way="")
    if seen.step < made.applied_step - 1:
        return _over(plan, "paused", f"the run went back to step {seen.step}, before {stage}")
    if seen.against:
        return moved(plan, "aborted", f"{stage} was undone: {seen.against}", under_way="")
    if seen.step < made.applied_step + plan.ramp_steps + HOLD_STEPS:
        return plan
    return _held(plan, stage, seen)


def _held(plan: LrPlan, stage: str, seen: StageSigns) -> LrPlan:
    """The plan after a stage that nothing speaks against."""
    if not seen.compared:
        return _over(plan, "paused", f"too few losses to say what came of {stage}")
    well = f"{stage} went well: {seen.compared}"
    if plan.state == "paused":
        return _over(plan, "paused", f"{plan.detail}; {well}")
    is_last = plan.stages_done + 1 == len(plan.stages)
    return _over(plan, "done" if is_last else "running" if plan.automatic else "waiting", well)


def _over(plan: LrPlan, state: PlanState, detail: str) -> LrPlan:
    return moved(plan, state, detail, under_way="", stages_done=plan.stages_done + 1)
