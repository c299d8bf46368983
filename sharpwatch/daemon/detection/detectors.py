"""Detectors: what the newest samples of a run show to be wrong. Pure functions of its newest scores.

Those in `EXACT` read off what is certain: values that are not finite, learning rates, the optimizer's settings and
state. The others find what stands out against the run's own past; `thresholds` has the sizes that are worth a warning
and a page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from sharpwatch.daemon.detection.baselines import Highest
from sharpwatch.daemon.detection.judged import Detector, Judged, listed, with_parameter
from sharpwatch.daemon.detection.ranks import broken_ranks, ranks_text
from sharpwatch.daemon.detection.signals import RATE_NOTABLE, ROW, WARM_UP, Scores
from sharpwatch.daemon.detection.thresholds import NAMES
from sharpwatch.daemon.records import AlertName, Finding, OptimizerGroup, Severity
from sharpwatch.wire import Doubles

RATE_RAISED = 1.4  # times the highest that it has held, from which on a rate is worth a page
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
_GROWN, _FASTER = 0.1, 3.0  # log of a growth in 20 samples, and how many times that of the 20 before
_STANDS_OUT = 3.0  # z of a single value that a change can begin with
_WORTH_SAYING = 1.0  # z of a gradient norm that is named beside that of an update RMS
# z of a mean loss, and of a single one, below which it may be text of another kind: that lifts the loss of the
# laboratory's larger models by up to 11.5, no single one by more than 8 (5M parameters, seed 2).
_LOSS_LASTING, _LOSS_PEAK = 12.0, 16.0
# Of one probe's stability ratio above the run's own level, and of a block type's.
_RATIO_EXCESS, _BLOCK_EXCESS = 4.5, 3.0
_SHARPNESS_EXCESS = 4.5
# Of a young loss above all before. In the laboratory's healthy runs it stays below -0.9, in the real ones below 0.2.
_YOUNG_NOTABLE, _YOUNG_PAGE = 1.5, 3.0
# The step's curvature term takes this share of its first-order gain. Below it nothing is in danger, however far
# above its level a run is; 1 itself is no threshold, since runs differ in where they normally stand.
_RATIO_MATTERS = 0.2
# Of a log scale of attention logits since its growth began: its rise, in all and beyond the run's own drift, and the z
# of the latter.
_ATTENTION_RISEN, _ATTENTION_Z = math.log(2.0), 3.0


def non_finite(judged: Judged) -> Iterable[Finding]:
    """A loss or a gradient that is not finite: at once, also in a young run."""
    seen = judged.now.observation
    evidence = [] if seen.loss is None or math.isfinite(seen.loss) else [f"loss is {seen.loss}"]
    ranks = broken_ranks(seen.rank_losses) if evidence else ()
    if ranks and seen.rank_losses is not None:
        evidence = [f"{evidence[0]}, from {ranks_text(ranks, len(seen.rank_losses))} alone"]
    blocks: tuple[str, ...] = ()
    parameter = ""
    if seen.layers is not None:
        counts, infinite = seen.layers.non_finite, np.isinf(seen.layers.gradient_norm)
        if np.count_nonzero(counts) or np.count_nonzero(infinite):
            bad = (counts > 0) | infinite
            blocks = judged.named(counts.astype(np.float64), bad)
            parameter = judged.parameter(blocks[0], seen.layers.non_finite_parameter)
            evidence.append(f"gradient of {listed((with_parameter(blocks[0], parameter), *blocks[1:]))} not finite")
    if evidence:
        rank = ranks[0] if len(ranks) == 1 else None
        yield Finding(
            "NonFinite", "critical", "; ".join(evidence), seen.step, seen.step, blocks, parameter=parameter, rank=rank
        )


def rate_raise(judged: Judged) -> Iterable[Finding]:
    """A learning rate above the highest that it has held since its first rise ended."""
    if not np.count_nonzero(judged.now.rate > RATE_CLIMBED):
        return
    ratios = [scores.rate for scores in judged.recent[-2:] if scores.rate.size]
    if len(ratios) < 2:
        return
    above, climb = np.minimum(*ratios), judged.now.climb
    climbs = (climb >= CLIMBING) & (judged.now.rate > RATE_CLIMBED)
    where = (above > RATE_NOTABLE) | climbs
    if np.count_nonzero(where):
        worst = float(np.nanmax(np.where(climbs, judged.now.rate, above)))
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


def rate_stays_raised(judged: Judged) -> Iterable[Finding]:
    """A learning rate that was raised and whose schedule has since brought it down, by and by, but for that factor."""
    where = (judged.now.excess > RATE_NOTABLE) & ~(judged.now.rate > RATE_NOTABLE)
    if np.count_nonzero(where):
        blocks = () if where.all() else judged.named(judged.now.excess, where)
        worst = float(judged.now.excess[where].max())
        evidence = f"learning rate {f'of {listed(blocks)} ' if blocks else ''}still ×{worst:.3g} of what it would be"
        yield Finding("RateRaise", "warning", evidence, judged.step, judged.step, blocks)


def first_steps(judged: Judged) -> Iterable[Finding]:
    """A run that begins with steps that change whole layer blocks by a good part of themselves, without a warm-up.

    Adam's first updates have entries of about the learning rate, however small the gradients are.
    """
    seen, step = judged.now.observation, judged.now.first_change
    if not step.size or seen.layers is None:
        return
    where = step > FIRST_NOTABLE
    if where.any():
        worst = float(np.nanmax(step))
        blocks = judged.named(step, where)
        severity: Severity = "critical" if worst > FIRST_CHANGE else "warning"
        evidence = f"the first steps change {blocks[0]} by {100 * worst:.0f} % each: no warm-up"
        yield Finding("RateRaise", severity, evidence, judged.step, seen.step, blocks)


def rate_zero(judged: Judged) -> Iterable[Finding]:
    """A learning rate that has become 0 all at once, though its schedule had not come near the end."""
    if np.count_nonzero(judged.now.rate) == len(judged.names):
        return
    rates = [scores.rate for scores in judged.recent[-3:] if scores.rate.size]
    if len(rates) < 3:
        return
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
    lost = now.moment < _MOMENT_LOST
    if np.count_nonzero(lost):
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
        # Updates that were left out are in neither state: a restored one lags behind its step no more than before.
        if counted < was.steps and step - counted > max(1, now.groups_at - was.steps):
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
    where = share > IMPOSSIBLE
    if np.count_nonzero(where):
        blocks = judged.named(share, where)
        worst = judged.names.index(blocks[0])
        change = float(judged.now.weight_change[worst])
        parameter = judged.changed_parameter(judged.now, blocks[0])
        evidence = (
            f"weight norm of {with_parameter(blocks[0], parameter)} ×{math.exp(min(change, 700.0)):.4g} in one step, "
            f"{share[worst]:.3g} times what a step can do"
        )
        yield Finding("WeightJump", "critical", evidence, judged.step, judged.step, blocks, parameter=parameter)


def dead_block(judged: Judged) -> Iterable[Finding]:
    """A gradient that has become exactly zero, at three of five samples."""
    if not np.count_nonzero(judged.now.dead):
        return
    dead = [scores.dead for scores in judged.recent if scores.dead.size]
    if len(dead) >= 3:
        where = (np.sum(dead, axis=0) >= 3) & judged.now.dead
        if where.any():
            blocks = judged.named(where.astype(np.float64), where)
            onset = next(scores.observation.step for scores in judged.recent if scores.dead.size and scores.dead.any())
            yield Finding("DeadBlock", "critical", f"gradient of {listed(blocks)} is 0", judged.step, onset, blocks)


def dead_parameter(judged: Judged) -> Iterable[Finding]:
    """More parameters with a gradient of exactly zero than ever before, at three of five samples, in a living block."""
    if not np.count_nonzero(judged.now.more_zeros) or judged.now.observation.layers is None:
        return
    more = [scores.more_zeros for scores in judged.recent if scores.more_zeros.size]
    where = (np.sum(more, axis=0) >= 3) & judged.now.more_zeros & ~judged.now.dead
    if where.any():
        blocks = judged.named(where.astype(np.float64), where)
        onset = next(scores.observation.step for scores in judged.recent if np.count_nonzero(scores.more_zeros))
        parameter = judged.parameter(blocks[0], judged.now.observation.layers.zero_parameter)
        named = listed((with_parameter(blocks[0], parameter), *blocks[1:]))
        evidence = f"gradient of {'' if parameter else 'a part of '}{named} is 0"
        yield Finding("DeadBlock", "critical", evidence, judged.step, onset, blocks, parameter=parameter)


EXACT: tuple[Detector, ...] = (
    non_finite,
    rate_raise,
    rate_stays_raised,
    first_steps,
    rate_zero,
    optimizer_state,
    settings_changed,
    impossible_change,
    dead_block,
    dead_parameter,
)


def weight_jump(judged: Judged) -> Iterable[Finding]:
    """Weights that one step has changed far more than those around it, and that are not back after the next one.

    How fast weights grow may change for good, as where a rare token comes at last: that is no jump.
    """
    for _, severity, score, where in _exceeding(judged, "weight"):
        then = judged.recent[-2]
        blocks = judged.named(score, where)
        worst = judged.names.index(blocks[0])
        factor = math.exp(min(float(then.weight_change[worst]), 700.0))
        parameter = judged.changed_parameter(then, blocks[0])
        evidence = f"weight norm of {with_parameter(blocks[0], parameter)} ×{factor:.4g} in one step "
        evidence += f"({score[worst]:.3g} sd)"
        yield Finding("WeightJump", severity, evidence, judged.step, then.observation.step, blocks, parameter=parameter)


def weight_growth(judged: Judged) -> Iterable[Finding]:
    """Weights that grow by a tenth in 20 samples, and three times as fast as in the 20 before."""
    if not judged.now.growth.size or judged.now.settling:
        return
    growth = np.abs(judged.now.growth)
    where = (growth[0] > _GROWN) & (growth[0] > _FASTER * growth[1])
    if where.any():
        blocks = judged.named(growth[0], where)
        worst = judged.names.index(blocks[0])
        evidence = f"weight norm of {blocks[0]} ×{math.exp(float(judged.now.growth[0][worst])):.3g} in 20 samples"
        onset = judged.recent[0].observation.step
        yield Finding("WeightGrowth", "critical", evidence, judged.step, onset, blocks)


def block_shift(judged: Judged) -> Iterable[Finding]:
    """A layer block whose update RMS or gradient norm has left its level, though the others' have not."""
    signals: tuple[tuple[str, str, AlertName], ...] = (
        ("update", "update RMS", "UpdateRmsSpike"),
        ("gradient", "gradient norm", "GradientSpike"),
        ("both", "update RMS", "UpdateRmsSpike"),
    )
    for signal, what, high in signals:
        read = "update" if signal == "both" else signal
        for span, severity, score, where in _exceeding(judged, signal)[:1]:
            blocks = judged.named(score, where)
            worst = judged.names.index(blocks[0])
            size = float(getattr(judged.now, read)[ROW[span], worst])
            sign = 1.0 if size > 0 else -1.0
            evidence = f"{what} of {blocks[0]} {abs(size):.1f} sd {_side(size > 0)} its level"
            if signal == "both":
                beside = float(judged.now.gradient[ROW[span], worst])
                evidence += f", its gradient norm {beside:.1f}" if beside >= _WORTH_SAYING else ""
            singles = [sign * getattr(each, read)[0, worst] for each in judged.recent]
            onset = _onset(judged, span, singles)
            name = high if size > 0 else "DeadBlock"
            yield Finding(name, severity, f"{evidence}, over {span} samples", judged.step, onset, blocks, span=span)


def loss_shift(judged: Judged) -> Iterable[Finding]:
    """A loss that has left its trend, for several samples: upwards, or downwards as where a loader is stuck.

    What text of another kind could do as well is a warning.
    """
    sides: tuple[tuple[str, AlertName, float], ...] = (("loss", "LossSpike", 1.0), ("drop", "LossDrop", -1.0))
    for signal, alert, sign in sides:
        for span, by_size, score, _ in _exceeding(judged, signal)[:1]:
            loss = judged.now.observation.loss
            what = "loss" if loss is None else f"loss {loss:.4g}"  # a mean may be known where the newest value is not
            evidence = f"{what}: {score[0]:.1f} sd {_side(sign > 0)} its trend, over {span} samples"
            singles = [sign * scores.loss[0] for scores in judged.recent]
            unit = WARM_UP if judged.now.warming_up else 1.0
            may_be_text = score[0] < unit * _LOSS_LASTING and np.fmax.reduce(singles) < unit * _LOSS_PEAK
            severity: Severity = "warning" if may_be_text else by_size
            yield Finding(alert, severity, evidence, judged.step, _onset(judged, span, singles), span=span)


def young_loss(judged: Judged) -> Iterable[Finding]:
    """A loss that is higher three times in a row than in the 30 samples before, in a run too young for a trend."""
    above, count = judged.now.young_loss, Highest.NEWEST
    if above > _YOUNG_NOTABLE:
        severity: Severity = "critical" if above > _YOUNG_PAGE else "warning"
        evidence = (
            f"loss {judged.now.observation.loss:.4g}: three times {above:.1f} sd above the {Highest.BEFORE} before"
        )
        onset = judged.recent[-count if len(judged.recent) >= count else 0].observation.step
        yield Finding("LossSpike", severity, evidence, judged.step, onset, span=count)


def stability_limit(judged: Judged) -> Iterable[Finding]:
    """A stability ratio far above the run's own level in two of the last three probes, the newest among them.

    One probe's ratio has a denominator that can come near zero, so a single large one proves nothing.
    """
    now = judged.now
    if now.observation.stability is None or not _too_sharp(now) or sum(map(_too_sharp, judged.probes)) < 2:
        return
    excess: dict[str, float] = {}
    for scores in judged.probes:  # blocks take turns in being probed: the newest that is known of each
        excess.update(scores.block_stability)
    blocks = tuple(sorted((b for b, z in excess.items() if z > _BLOCK_EXCESS), key=lambda block: -excess[block]))
    ratio = now.observation.stability
    evidence = f"stability ratio {ratio.value:.3g}, {now.stability:.1f} sd above its level"
    onset = next(scores.observation.step for scores in judged.probes if _too_sharp(scores))
    severity: Severity = "critical" if ratio.value - ratio.stderr > 1 else "warning"
    yield Finding("StabilityLimit", severity, evidence, judged.step, onset, blocks)


def sharpness_spike(judged: Judged) -> Iterable[Finding]:
    """A block type whose sharpness is far above the run's own level in two of the last three probes of it.

    A single probe's batch can be an odd one. It is never a page: sharpness may rise for good reasons.
    """
    if not judged.now.sharpness.size:
        return
    count = len(judged.names)
    scores = np.array([each.sharpness for each in judged.sharp_probes])
    where = (scores[-1] > _SHARPNESS_EXCESS) & ((scores > _SHARPNESS_EXCESS).sum(0) >= 2)
    types = np.flatnonzero(where[count:])
    if not types.size:
        return
    worst = int(types[np.argmax(scores[-1, count + types])])
    block = judged.blocks[worst]
    within = [name.rpartition(".")[2] == block for name in judged.names]
    blocks = judged.named(scores[-1, :count], (scores[-1, :count] > _STANDS_OUT) & within)
    evidence = f"sharpness of {block} {scores[-1, count + worst]:.1f} sd above its level, in two of three probes"
    first = int(np.argmax(scores[:, count + worst] > _SHARPNESS_EXCESS))
    onset = judged.sharp_probes[first].observation.step
    yield Finding("SharpnessSpike", "warning", evidence, judged.step, onset, blocks)


def _too_sharp(scores: Scores) -> bool:
    ratio = scores.observation.stability
    return ratio is not None and scores.stability > _RATIO_EXCESS and ratio.value > _RATIO_MATTERS


def attention_growth(judged: Judged) -> Iterable[Finding]:
    """A scale of attention logits that grows faster than before in two of the last three probes, to twice in all.

    A warning: the weights alone don't say how large logits are, or that they do harm.
    """
    scores = judged.now.attention
    scales = judged.now.observation.attention
    if scores is None or scales is None:
        return
    where = (np.minimum(scores.rise, scores.excess) > _ATTENTION_RISEN) & (scores.z > _ATTENTION_Z)
    if where.any():
        blocks = judged.named(scores.rise, where)
        worst = judged.names.index(blocks[0])
        onset = int(scores.onset[where].min())
        factor = math.exp(float(scores.rise[worst]))
        evidence = f"scale of attention logits of {blocks[0]} {scales[worst]:.3g}, ×{factor:.3g} since step "
        evidence += f"{scores.onset[worst]:.0f}"
        yield Finding("AttentionGrowth", "warning", evidence, judged.step, onset, blocks)


STATISTICAL: tuple[Detector, ...] = (weight_jump, block_shift, loss_shift, stability_limit)


def findings(judged: Judged) -> list[Finding]:
    """All detectors' findings of the newest sample."""
    found = [replace(finding, is_exact=True) for detector in EXACT for finding in detector(judged)]
    found += weight_growth(judged)
    found += young_loss(judged)
    found += sharpness_spike(judged)
    found += attention_growth(judged)
    if judged.exceeded or judged.now.observation.stability is not None:
        found += [finding for detector in STATISTICAL for finding in detector(judged)]
    return found


def _exceeding(judged: Judged, signal: str) -> list[tuple[int, Severity, Doubles, np.ndarray]]:
    """What of a signal is worth a warning: span, severity, statistic and where; pages first, then short spans."""
    found: list[tuple[int, Severity, Doubles, np.ndarray]] = []
    for name in judged.exceeded:
        kind, _, span = name.partition("-")
        if kind != signal:
            continue
        score = judged.statistics[NAMES.index(name)]
        warning, critical = judged.limits[name]
        where: np.ndarray = score > warning
        if where.any():
            found.append((int(span or 1), "critical" if (score > critical).any() else "warning", score, where))
    return sorted(found, key=lambda each: (each[1] != "critical", each[0]))


def _side(above: bool) -> str:
    return "above" if above else "below"


def _onset(judged: Judged, span: int, singles: Sequence[float]) -> int:
    """The first step, of those that a mean over `span` samples is of, that stood out by itself; else the first."""
    first = max(0, len(singles) - span)
    for scores, z in list(zip(judged.recent, singles, strict=True))[first:]:
        if z > _STANDS_OUT:
            return scores.observation.step
    return judged.recent[first].observation.step
