"""The autopilot: which multipliers measured curvature asks for. Pure functions of the newest `direction` probes.

Two rules, each of which can be left out. The curvature share raises blocks that add little to the curvature along the
step (`curvature_share`). The stability cap cuts all blocks alike by min(1, ρ*/ρ), where ρ is the directional stability
ratio that the step would have without the cap; it is proportional to the rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sharpwatch.curvature.statistics.estimate import stability_ratio
from sharpwatch.daemon.config.settings import AutopilotConfig
from sharpwatch.daemon.decisions.curvature_share import at_unit_multipliers, multipliers_from_shares

WINDOW = 8  # probes that shares are taken from
_CAP_WINDOW = 4  # probes that the cap is taken from: it has to follow the rate
_LEAST = 2  # probes before anything is changed
_EDGE = 1.0  # stability ratio from which on nothing is raised
_RISE = 2.0  # by which one revision raises a multiplier at most


@dataclass(frozen=True, slots=True)
class ProbedStep:
    """A `direction` probe, and the multipliers by which its step was taken.

    Attributes:
        parts: u_bᵀ(Hu)_b by block.
        curvature: uᵀHu.
        descent: gᵀu.
        multipliers: By block.
    """

    parts: Mapping[str, float]
    curvature: float
    descent: float
    multipliers: Mapping[str, float]

    @property
    def cap(self) -> float:
        """By how much the step was cut as a whole: the curvature share leaves the sharpest block at 1."""
        return min(1.0, *self.multipliers.values())


def wanted_multipliers(
    probes: Sequence[ProbedStep],
    in_force: Mapping[str, float],
    config: AutopilotConfig,
    bounds: tuple[float, float],
    *,
    may_raise: bool = True,
) -> dict[str, float] | None:
    """Return the multipliers to put in force, or None where they are near enough to what is in force.

    Args:
        probes: The newest, oldest first.
        in_force: The multipliers in force or on their way, of every block.
        config: The rules.
        bounds: The smallest and the largest multiplier that the run allows.
        may_raise: Whether a multiplier may be raised now.
    """
    if len(probes) < _LEAST:
        return None
    cap = 1.0 if config.stability_cap is None else capped(probes[-_CAP_WINDOW:], config.stability_cap.target)
    shares = dict.fromkeys(in_force, 1.0) if config.curvature_share is None else share_multipliers(probes, config)
    may_raise = may_raise and _is_stable(probes[-_CAP_WINDOW:])
    wanted = {}
    for block, now in in_force.items():
        most = _RISE * now if may_raise else now
        wanted[block] = min(max(cap * shares.get(block, 1.0), bounds[0]), bounds[1], most)
    change = max(abs(math.log(value / in_force[block])) for block, value in wanted.items())
    return wanted if change >= math.log(config.least_change) else None


def share_multipliers(probes: Sequence[ProbedStep], config: AutopilotConfig) -> dict[str, float]:
    """Return the multipliers by the curvature share, of sums over `probes`: single shares are noisy."""
    rule = config.curvature_share
    if rule is None:
        raise ValueError("there is no rule for curvature shares")
    sums: dict[str, float] = {}
    for probe in probes[-WINDOW:]:
        for block, part in at_unit_multipliers(probe.parts, probe.multipliers).items():
            sums[block] = sums.get(block, 0.0) + part
    return multipliers_from_shares(sums, largest=rule.max, exponent=rule.exponent)


def capped(probes: Sequence[ProbedStep], target: float) -> float:
    """Return min(1, target/ρ), with ρ of steps without a cap; as it is where they do not descend."""
    # u = c v: the curvature of v is that of u over c², its descent that of u over c.
    curvatures = [probe.curvature / probe.cap**2 for probe in probes]
    ratio = stability_ratio(curvatures, [probe.descent / probe.cap for probe in probes])
    if ratio is None:
        return probes[-1].cap
    return 1.0 if ratio.value <= target else target / ratio.value


def _is_stable(probes: Sequence[ProbedStep]) -> bool:
    ratio = stability_ratio([probe.curvature for probe in probes], [probe.descent for probe in probes])
    return ratio is not None and ratio.value < _EDGE
