"""The autopilot: which multipliers measured curvature asks for, and the decisions that put them in force.

Two rules, each of which can be left out. The curvature share raises blocks that add little to the curvature along the
step (`curvature_share`). The stability cap cuts all blocks alike by min(1, ρ*/ρ), where ρ is the directional stability
ratio that the step would have without the cap; it is proportional to the rate.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from sharpwatch.curvature.statistics.estimate import stability_ratio
from sharpwatch.daemon.config.settings import AutopilotConfig, MaintenanceConfig
from sharpwatch.daemon.decisions.curvature_share import at_unit_multipliers, multipliers_from_shares
from sharpwatch.daemon.decisions.decision_log import DecisionLog
from sharpwatch.daemon.decisions.guards import OK, Permissions
from sharpwatch.daemon.decisions.operator_requests import issue
from sharpwatch.daemon.decisions.policy import changed_blocks, in_maintenance, is_trouble
from sharpwatch.daemon.decisions.ramp_back import rates_are_free, scaling_state
from sharpwatch.daemon.decisions.transitions import took_effect
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.records import RENEWED, Decision, Mode, Observation, ProbedStep

AUTHOR = "autopilot"
WINDOW = 8  # probes that shares are taken from
_CAP_WINDOW = 4  # probes that the cap is taken from: it has to follow the rate
_LEAST = 2  # probes before anything is changed
_EDGE = 1.0  # stability ratio from which on nothing is raised
_RISE = 2.0  # by which one revision raises a multiplier at most
_TRIES = 4  # to renew raises, in the second half of their time-out
_EXPIRES_AFTER_STEPS = 100  # a trainer that has not taken a change by then is asked anew, by newer probes


class Autopilot:
    """Makes the autopilot's decisions for one run.

    It leaves alone what others have decided: blocks whose multiplier an operator or a plan has set, and the whole run
    while a plan goes on, or a policy's change of rates is in force or being judged. While the run is in trouble it
    raises nothing.
    """

    def __init__(  # noqa: PLR0913, PLR0917  what the autopilot knows of the run, and what limits it
        self,
        log: DecisionLog,
        detection: RunDetection,
        permissions: Permissions,
        config: AutopilotConfig,
        new_id: Callable[[], str],
        maintenance: Sequence[MaintenanceConfig],
    ) -> None:
        self._log = log
        self._detection = detection
        self._permissions = permissions
        self._config = config
        self._new_id = new_id
        self._maintenance = maintenance
        self._probes: deque[ProbedStep] = deque(maxlen=WINDOW)
        self._went_back = False  # since the newest renewal: how much of a time-out is over is not known then

    def configure(self, config: AutopilotConfig, maintenance: Sequence[MaintenanceConfig]) -> None:
        """Goes by other rules from now on."""
        self._config, self._maintenance = config, maintenance

    def note(self, obs: Observation) -> None:
        """Take in a step without deciding anything."""
        if obs.restored:
            self._probes.clear()
            self._went_back = True
        if obs.probed is not None:
            self._probes.append(obs.probed)

    def act(self, obs: Observation, mode: Mode | None, now: float) -> None:
        """Take in a step, and decide after a probe; `mode` is the run's own, `now` is in unix seconds.

        Raises are renewed in every mode: that changes nothing, and the trainer would end them by itself.
        """
        self.note(obs)
        if self._log.newest_revision and self._must_renew(obs.step):
            self._renew(obs.step, now)
        if obs.probed is None or not self._config.is_on or not self._is_free():
            return
        mode = in_maintenance(mode or self._config.mode, self._maintenance, now)
        if mode == "enforce":
            self._expire_proposals("the autopilot acts by itself by now")
        in_force = self._log.multipliers
        quiet = not any(map(is_trouble, self._detection.incidents.open))
        wanted = wanted_multipliers(
            tuple(self._probes),
            in_force,
            self._config,
            self._permissions.lr_bounds,
            may_raise=quiet,
            kept=scaling_state(self._log).operators,
        )
        newest = next((made for made in self._own() if not made.is_renewal), None)
        if wanted is None or self._is_near(wanted, in_force):
            return
        # What was recorded, or came to nothing, is not repeated at each probe.
        if (
            newest is None
            or took_effect(newest)
            or newest.mode != mode
            or not self._is_near(wanted, newest.multipliers)
        ):
            self._put(self._draft(wanted, mode, obs.step, now), now)

    def _is_free(self) -> bool:
        if self._log.plan is not None and self._log.plan.is_active:
            return False
        return rates_are_free(self._log)

    def _is_near(self, one: Mapping[str, float], other: Mapping[str, float]) -> bool:
        least = math.log(self._config.least_change)
        return all(abs(math.log(value / other.get(block, 1.0))) < least for block, value in one.items())

    def _own(self) -> Iterator[Decision]:
        """The autopilot's decisions, newest first."""
        return (made for made in reversed(self._log.decisions) if not made.policy and made.mode != "operator")

    def _must_renew(self, step: int) -> bool:
        """Whether raises would soon end by their time-out, though the daemon is there."""
        if not any(value > 1 for value in self._log.multipliers.values()) or self._permissions.multipliers() != OK:
            return False
        newest = next(filter(took_effect, self._own()), None)
        if newest is None or not newest.ttl_steps or self._is_moving(step):
            return False
        tried = next((made.step for made in self._own() if made.is_renewal), None)
        if tried is not None and abs(step - tried) < newest.ttl_steps // (2 * _TRIES):
            return False
        since = newest.step if newest.applied_step is None else newest.applied_step
        return self._went_back or abs(step - since) >= newest.ttl_steps // 2

    def _is_moving(self, step: int) -> bool:
        """Whether a renewal would change something: the end of a ramp, or of a policy's raise."""
        revision = self._log.effective()[-1]
        ramp = self._log.find(revision.decision_id).ramp_steps
        if revision.applied_step is None or abs(step - revision.applied_step) <= ramp:
            return True
        return any(factor > 1 for one in scaling_state(self._log).active for factor in one.factors.values())

    def _renew(self, step: int, now: float) -> None:
        draft = self._draft(self._log.multipliers, "enforce", step, now)
        # Not as a new set (`issue`): proposals that started from this one stand.
        made = self._log.add(replace(draft, detail=RENEWED, reason=RENEWED), "send")
        self._log.send(self._log.revise(made, author=AUTHOR, reason=RENEWED, now=now))
        self._went_back = False

    def _draft(self, multipliers: Mapping[str, float], mode: Mode, step: int, now: float) -> Decision:
        before = self._log.multipliers
        # A time-out ends all raises; an operator's stay.
        lasting = any(before[block] > 1 for block in scaling_state(self._log).operators)
        return Decision(
            id=self._new_id(),
            run=self._log.run,
            made_at=now,
            step=step,
            action="set_lr",
            mode=mode,
            outcome="draft",
            guard=self._permissions.multipliers(),
            detail=self._described(multipliers, before),
            multipliers=dict(multipliers),
            ramp_steps=self._config.ramp_steps,
            ttl_steps=0 if lasting else self._config.ttl_steps,
            # A proposal's expiry counts from its approval; until then it is the number of steps alone.
            expires_at_step=_EXPIRES_AFTER_STEPS + (step if mode == "enforce" else 0),
            author=AUTHOR,
        )

    def _put(self, made: Decision, now: float) -> None:
        mode = made.mode
        if mode == "observe":
            self._log.add(made, "observe")
        elif made.guard != OK:
            self._log.add(made, "refuse")
        elif mode == "advise":
            self._expire_proposals("newer probes say otherwise")
            self._log.add(made, "propose")
        else:
            issue(self._log, made, author=AUTHOR, now=now)

    def _expire_proposals(self, why: str) -> None:
        for other in self._log.unsettled():
            if other.outcome == "proposed" and not other.policy:
                self._log.advance(other, "supersede", detail=f"{other.detail}; {why}")

    def _described(self, multipliers: Mapping[str, float], before: Mapping[str, float]) -> str:
        sums = {block: sum(probe.parts.get(block, 0.0) for probe in self._probes) for block in before}
        whole = sum(probe.curvature for probe in self._probes)
        shares = ", ".join(f"{block} {part / whole:.2g}" for block, part in sums.items()) if whole > 0 else "none"
        return f"{changed_blocks(multipliers, before)}; curvature shares: {shares}"


def wanted_multipliers(  # noqa: PLR0913  what is measured, what is in force, and what may be done
    probes: Sequence[ProbedStep],
    in_force: Mapping[str, float],
    config: AutopilotConfig,
    bounds: tuple[float, float],
    *,
    may_raise: bool = True,
    kept: Collection[str] = (),
) -> dict[str, float] | None:
    """Return the multipliers to put in force, or None where they are near enough to what is in force.

    Args:
        probes: The newest, oldest first.
        in_force: The multipliers in force or on their way, of every block.
        config: The rules.
        bounds: The smallest and the largest multiplier that the run allows.
        may_raise: Whether a multiplier may be raised now.
        kept: The blocks that stay as they are, which others have set.
    """
    own = {block: value for block, value in in_force.items() if block not in kept}
    if len(probes) < _LEAST or not own:
        return None
    cap = 1.0 if config.stability_cap is None else capped(probes[-_CAP_WINDOW:], config.stability_cap.target, kept)
    shares = dict.fromkeys(in_force, 1.0) if config.curvature_share is None else share_multipliers(probes, config)
    may_raise = may_raise and _is_stable(probes[-_CAP_WINDOW:])
    wanted = dict(in_force)
    for block, now in own.items():
        most = _RISE * now if may_raise else now
        share = shares.get(block, now / cap_of(in_force, kept))  # as it is where no probe says
        wanted[block] = min(max(cap * share, bounds[0]), bounds[1], most)
    change = max(abs(math.log(value / in_force[block])) for block, value in wanted.items())
    return wanted if change >= math.log(config.least_change) else None


def share_multipliers(probes: Sequence[ProbedStep], config: AutopilotConfig) -> dict[str, float]:
    """Return the multipliers by the curvature share, of means over `probes`: single shares are noisy."""
    rule = config.curvature_share
    if rule is None:
        raise ValueError("there is no rule for curvature shares")
    parts: dict[str, list[float]] = {}
    for probe in probes[-WINDOW:]:
        for block, part in at_unit_multipliers(probe.parts, probe.multipliers).items():
            parts.setdefault(block, []).append(part)
    # Means, as a block that rests now and then is in fewer probes.
    return multipliers_from_shares({block: fmean(values) for block, values in parts.items()}, rule)


def capped(probes: Sequence[ProbedStep], target: float, kept: Collection[str] = ()) -> float:
    """Return min(1, target/ρ), with ρ of steps without a cap; as it is where they do not descend.

    Args:
        probes: The newest, oldest first.
        target: The largest ρ.
        kept: The blocks that others have set, which the cap does not go for.
    """
    # u = c v: the curvature of v is that of u over c², its descent that of u over c.
    caps = [cap_of(probe.multipliers, kept) for probe in probes]
    curvatures = [probe.curvature / cap**2 for probe, cap in zip(probes, caps, strict=True)]
    ratio = stability_ratio(curvatures, [probe.descent / cap for probe, cap in zip(probes, caps, strict=True)])
    if ratio is None:
        return caps[-1]
    return 1.0 if ratio.value <= target else target / ratio.value


def cap_of(multipliers: Mapping[str, float], kept: Collection[str] = ()) -> float:
    """Return by how much `multipliers` cut the step as a whole: the curvature share leaves the sharpest block at 1."""
    return min((1.0, *(value for block, value in multipliers.items() if block not in kept)))


def _is_stable(probes: Sequence[ProbedStep]) -> bool:
    ratio = stability_ratio([probe.curvature for probe in probes], [probe.descent for probe in probes])
    return ratio is not None and ratio.value < _EDGE
