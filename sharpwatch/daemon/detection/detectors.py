"""Detectors of what stands out against the run's own past: weights, layer blocks, attention, loss, stability ratio.

Pure functions of a run's newest scores. Each has one statistic per span of samples, two-sided, the largest over layer
blocks; `thresholds` has the sizes that are worth a warning and a page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from sharpwatch.daemon.detection.baselines import Highest
from sharpwatch.daemon.detection.exact import EXACT, Detector, Judged
from sharpwatch.daemon.detection.signals import Scores
from sharpwatch.daemon.records import AlertName, Finding, Severity
from sharpwatch.wire import Doubles

_GROWN, _FASTER = 0.1, 3.0  # log of a growth in 20 samples, and how many times that of the 20 before
_STANDS_OUT = 3.0  # z of a single value that a change can begin with
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


def statistics(recent: Sequence[Scores]) -> dict[str, Doubles]:
    """What is compared with thresholds, of the newest sample; NaN where it can't be judged.

    "weight" [L] is how far the change of weights in the step before stands out from those in the steps around it; it is
    0 where they are back since. "update-5" and the like [L] are sizes of z over so many samples; "loss-3" and "drop-3"
    [1] are the two sides of the loss.
    """
    now = recent[-1]
    found = {f"{side}-{span}": np.array([sign * now.loss[span]]) for side, sign in _SIDES for span in _LOSS_SPANS}
    if len(recent) > 2 and (weight := _weight(*recent[-3:])) is not None:
        found["weight"] = weight
    if now.observation.layers is not None:
        found |= {f"update-{span}": np.abs(now.update[span]) for span in _BLOCK_SPANS}
        found |= {f"gradient-{span}": np.abs(now.gradient[span]) for span in _BLOCK_SPANS}
    return found


# Samples over which the loss, and the norms of layer blocks, are compared with thresholds.
_LOSS_SPANS, _BLOCK_SPANS = (3, 10, 40), (5, 20)
_SIDES = (("loss", 1.0), ("drop", -1.0))


def _weight(before: Scores, then: Scores, now: Scores) -> Doubles | None:
    steps = [scores.observation.step for scores in (before, then, now)]
    if steps != list(range(steps[0], steps[0] + 3)) or not (
        before.weight.size and then.weight.size and now.weight.size
    ):
        return None
    with np.errstate(invalid="ignore"):
        back = np.abs(then.weight_change + now.weight_change) < np.abs(then.weight_change) / 2
        back |= np.abs(before.weight_change + then.weight_change) < np.abs(before.weight_change) / 2  # the way back
        # Infinite where a norm overflows: the difference of two such is no number.
        rise, fall = then.weight - before.weight, then.weight - now.weight
        size = np.where(rise * fall > 0, np.minimum(np.abs(rise), np.abs(fall)), 0.0)
        size = np.where(np.isinf(then.weight), np.inf, size)
    size[np.isnan(then.weight)] = np.nan
    return np.where(back, 0.0, size)


def weight_jump(judged: Judged) -> Iterable[Finding]:
    """Weights that one step has changed far more than those around it, and that are not back after the next one.

    How fast weights grow may change for good, as where a rare token comes at last: that is no jump.
    """
    for _, severity, score, where in _exceeding(judged, "weight"):
        then = judged.recent[-2]
        blocks = judged.named(score, where)
        worst = judged.names.index(blocks[0])
        factor = math.exp(min(float(then.weight_change[worst]), 700.0))
        evidence = f"weight norm of {blocks[0]} ×{factor:.4g} in one step ({score[worst]:.3g} sd)"
        yield Finding("WeightJump", severity, evidence, judged.step, then.observation.step, blocks)


def weight_growth(judged: Judged) -> Iterable[Finding]:
    """Weights that grow by a tenth in 20 samples, and three times as fast as in the 20 before."""
    growth = np.abs(judged.now.growth)
    if not growth.size or judged.now.settling:
        return
    with np.errstate(invalid="ignore"):
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
    )
    for signal, what, high in signals:
        for span, severity, score, where in _exceeding(judged, signal)[:1]:
            blocks = judged.named(score, where)
            worst = judged.names.index(blocks[0])
            above = getattr(judged.now, signal)[span][worst] > 0
            evidence = f"{what} of {blocks[0]} {score[worst]:.1f} sd {_side(above)} its level, over {span} samples"
            singles = [getattr(each, signal)[1][worst] if each.update else math.nan for each in judged.recent]
            onset = _onset(judged, span, singles if above else [-z for z in singles])
            name = high if above else "DeadBlock"
            yield Finding(name, severity, evidence, judged.step, onset, blocks, span=span)


def loss_shift(judged: Judged) -> Iterable[Finding]:
    """A loss that has left its trend, for several samples: upwards, or downwards as where a loader is stuck."""
    sides: tuple[tuple[str, AlertName, float], ...] = (("loss", "LossSpike", 1.0), ("drop", "LossDrop", -1.0))
    for signal, alert, sign in sides:
        for span, severity, score, _ in _exceeding(judged, signal)[:1]:
            loss = judged.now.observation.loss
            what = "loss" if loss is None else f"loss {loss:.4g}"  # a mean may be known where the newest value is not
            evidence = f"{what}: {score[0]:.1f} sd {_side(sign > 0)} its trend, over {span} samples"
            singles = [sign * scores.loss.get(1, math.nan) for scores in judged.recent]
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
    with np.errstate(invalid="ignore"):
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
    with np.errstate(invalid="ignore"):
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
        score = judged.statistics[name]
        warning, critical = judged.limits[name]
        with np.errstate(invalid="ignore"):
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
