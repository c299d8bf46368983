"""Detectors of what is certain: values that are not finite, learning rates, the optimizer's settings and state.

Pure functions of a run's newest scores, without a threshold that false alarms are weighed by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sharpwatch.daemon.detection.signals import Scores
from sharpwatch.daemon.records import Finding, OptimizerGroup, Severity
from sharpwatch.wire import Doubles

_NAMED = 4  # layer blocks that a text names


@dataclass(frozen=True, slots=True)
class Judged:
    """The newest samples of a run, for detectors.

    Attributes:
        recent: The newest scores, the newest last.
        probes: The newest scores with a stability ratio, the newest last.
        names: Of the layer blocks, as "layers.3.qk".
        statistics: Of the newest sample, as `detectors.statistics`.
        limits: By statistic, what is worth a warning, and what a page.
        exceeded: The statistics that are worth a warning.
        sharp_probes: The newest scores with a trace, the newest last.
        blocks: The block types.
    """

    recent: Sequence[Scores]
    probes: Sequence[Scores]
    names: Sequence[str]
    statistics: Mapping[str, Doubles] = field(default_factory=dict)
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    exceeded: Sequence[str] = ()
    sharp_probes: Sequence[Scores] = ()
    blocks: Sequence[str] = ()

    @property
    def now(self) -> Scores:
        """The newest scores."""
        return self.recent[-1]

    @property
    def step(self) -> int:
        """The newest step."""
        return self.now.observation.step

    def named(self, badness: Doubles, where: np.ndarray) -> tuple[str, ...]:
        """The layer blocks `where`, worst first."""
        order = np.argsort(-np.nan_to_num(badness, nan=-math.inf, posinf=1e300), kind="stable")
        return tuple(self.names[i] for i in order if where[i])


Detector = Callable[[Judged], Iterable[Finding]]


def listed(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


# A rate this far above the highest that it has held. Restarts of a schedule come a little above a peak that the end of
# the warm-up has cut off: by a sixth, where that took a quarter of the first cycle.
RATE_NOTABLE, RATE_RAISED = 1.2, 1.4
# One that climbs on, from sample to sample, is no such peak: so many samples in a row and this far are a page.
CLIMBING, RATE_CLIMBED = 10, 1.1
# The part of itself that one of the first steps changes a layer block by.
FIRST_NOTABLE, FIRST_CHANGE = 0.15, 0.2
_RATE_MEANT = 0.01  # share of the highest rate below which a schedule may end at 0
# Adam's second moment can't shrink by more than β₂ in a step; the rest is for moments kept in low precision.
_MOMENT_LOST = 0.5
# The norm of weights changes in a healthy run by up to 1.1 of what an update as long as Adam's could do at most.
IMPOSSIBLE = 3.0
# By how much a setting must change within a run: less is a schedule.
_DECAY_CHANGED, _EPSILON_CHANGED, _HORIZON_CHANGED = 3.0, 10.0, 3.0
_TINY = 1e-30


def non_finite(judged: Judged) -> Iterable[Finding]:
    """A loss or a gradient that is not finite: at once, also in a young run."""
    seen = judged.now.observation
    evidence = [] if seen.loss is None or math.isfinite(seen.loss) else [f"loss is {seen.loss}"]
    blocks: tuple[str, ...] = ()
    if seen.layers is not None:
        counts = seen.layers.non_finite
        bad = (counts > 0) | np.isinf(seen.layers.gradient_norm)
        if bad.any():
            blocks = judged.named(counts.astype(np.float64), bad)
            evidence.append(f"gradient of {listed(blocks)} not finite")
    if evidence:
        yield Finding("NonFinite", "critical", "; ".join(evidence), seen.step, seen.step, blocks)


def rate_raise(judged: Judged) -> Iterable[Finding]:
    """A learning rate above the highest that it has held since its first rise ended."""
    ratios = [scores.rate for scores in judged.recent[-2:] if scores.rate.size]
    if len(ratios) < 2:
        return
    climb = judged.now.climb
    with np.errstate(invalid="ignore"):
        above = np.minimum(*ratios)
        climbs = (climb >= CLIMBING) & (judged.now.rate > RATE_CLIMBED)
        where = (above > RATE_NOTABLE) | climbs
    if where.any():
        worst = float(np.nanmax(above))
        severity: Severity = "critical" if worst > RATE_RAISED or climbs.any() else "warning"
        first = next(
            scores.observation.step
            for scores in judged.recent
            if scores.rate.size and (np.nan_to_num(scores.rate) > 1.0 + 1e-6).any()
        )
        onset = min(first, judged.step + 1 - int(climb.max()))
        everywhere = bool(where[~np.isnan(above)].all())
        blocks = () if everywhere else judged.named(above, where)
        evidence = f"learning rate {'' if everywhere else f'of {listed(blocks)} '}×{worst:.3g} of its highest before"
        yield Finding("RateRaise", severity, evidence, judged.step, onset, blocks)


def first_steps(judged: Judged) -> Iterable[Finding]:
    """A run that begins with steps that change whole layer blocks by a good part of themselves, without a warm-up.

    Adam's first updates have entries of about the learning rate, however small the gradients are.
    """
    seen, step = judged.now.observation, judged.now.first_change
    if not step.size or seen.layers is None:
        return
    with np.errstate(invalid="ignore"):
        where = step > FIRST_NOTABLE
    if where.any():
        worst = float(np.nanmax(step))
        blocks = judged.named(step, where)
        severity: Severity = "critical" if worst > FIRST_CHANGE else "warning"
        evidence = f"the first steps change {blocks[0]} by {100 * worst:.0f} % each: no warm-up"
        yield Finding("RateRaise", severity, evidence, judged.step, seen.step, blocks)


def rate_zero(judged: Judged) -> Iterable[Finding]:
    """A learning rate that has become 0 all at once, though its schedule had not come near the end."""
    rates = [scores.rate for scores in judged.recent[-3:] if scores.rate.size]
    if len(rates) < 3:
        return
    with np.errstate(invalid="ignore"):
        stopped = (rates[0] > _RATE_MEANT) & (rates[1] == 0) & (rates[2] == 0)
    if stopped.any():
        onset = judged.recent[-2].observation.step
        blocks = () if stopped[~np.isnan(rates[0])].all() else judged.named(rates[0], stopped)
        evidence = f"learning rate {f'of {listed(blocks)} ' if blocks else ''}is 0"
        yield Finding("RateZero", "critical", evidence, judged.step, onset, blocks)


def optimizer_state(judged: Judged) -> Iterable[Finding]:
    """An optimizer that has lost its state: second moments that fell too fast, or steps counted anew."""
    now = judged.now
    step = judged.step
    with np.errstate(invalid="ignore"):
        lost = now.moment < _MOMENT_LOST
    if lost.any():
        blocks = judged.named(-now.moment, lost)
        evidence = f"second moment of {listed(blocks)} ×{float(np.nanmin(now.moment)):.3g} of what it must be at least"
        # Lost everywhere, it is no layer block's own.
        yield Finding("OptimizerState", "critical", evidence, step, step, () if 2 * lost.sum() > lost.size else blocks)
    before = now.groups_before
    for key, group in now.observation.optimizer_groups.items():
        was = before.get(key)
        if was is None or was.steps is None:
            continue
        counted = 0 if group.steps is None else group.steps
        if counted < was.steps and counted < step - 1:
            evidence = f"the optimizer's state has seen {counted} steps at step {step}, after {was.steps} before"
            yield Finding("OptimizerState", "critical", evidence, step, step)
            return


def settings_changed(judged: Judged) -> Iterable[Finding]:
    """A setting of the optimizer that has changed at once, by more than a schedule changes it."""
    before = judged.now.groups_before
    for key, group in judged.now.observation.optimizer_groups.items():
        if key in before and (changes := list(_changes(before[key], group))):
            yield Finding("SettingsChanged", "critical", ", ".join(changes), judged.step, judged.step)
            return


def _changes(before: OptimizerGroup, after: OptimizerGroup) -> Iterable[str]:
    for name, now in after.settings.items():
        was = before.settings.get(name)
        if was is None or was == now:
            continue
        if name.startswith("beta") or name in {"momentum", "alpha"}:
            limit, ratio = _HORIZON_CHANGED, (1 - now + _TINY) / (1 - was + _TINY)  # of the steps that a mean covers
        else:
            limit = _EPSILON_CHANGED if name == "eps" else _DECAY_CHANGED
            ratio = (now + _TINY) / (was + _TINY)
        if not 1 / limit < ratio < limit:
            yield f"{name} {was:.4g} to {now:.4g}"


def impossible_change(judged: Judged) -> Iterable[Finding]:
    """Weights that have changed by more than a step of Adam's can change them: at once, also in a young run."""
    share = np.abs(judged.now.weight_share)
    with np.errstate(invalid="ignore"):
        where = share > IMPOSSIBLE
    if where.any():
        blocks = judged.named(share, where)
        worst = judged.names.index(blocks[0])
        change = float(judged.now.weight_change[worst])
        evidence = (
            f"weight norm of {blocks[0]} ×{math.exp(min(change, 700.0)):.4g} in one step, {share[worst]:.3g} times "
        )
        evidence += "what a step can do"
        yield Finding("WeightJump", "critical", evidence, judged.step, judged.step, blocks)


def dead_block(judged: Judged) -> Iterable[Finding]:
    """A gradient that has become exactly zero, at three of five samples."""
    dead = [scores.dead for scores in judged.recent if scores.dead.size]
    if len(dead) >= 3 and judged.now.dead.any():
        where = (np.sum(dead, axis=0) >= 3) & judged.now.dead
        if where.any():
            blocks = judged.named(where.astype(np.float64), where)
            onset = next(scores.observation.step for scores in judged.recent if scores.dead.size and scores.dead.any())
            yield Finding("DeadBlock", "critical", f"gradient of {listed(blocks)} is 0", judged.step, onset, blocks)


EXACT: tuple[Detector, ...] = (
    non_finite,
    rate_raise,
    first_steps,
    rate_zero,
    optimizer_state,
    settings_changed,
    impossible_change,
    dead_block,
)
