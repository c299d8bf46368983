"""What is wrong with a run: detectors, which judge the scores of a step, and the alerts that their findings open."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sharpwatch.daemon.detection.baselines import History, Scores
from sharpwatch.daemon.records import Alert, Finding, Severity

SPIKE = 6.0  # healthy runs stay below 5
SURE_SPIKE = 12.0  # believed without a second signal
CORROBORATES = 4.0
# A block's weights grow by less than a percent a step, and by a few where the rate is far too high. What grows them by
# half at once did not come from the optimizer: a memory fault, a bad restore.
WEIGHT_JUMP = 1.5
# Of one probe's stability ratio above the run's own level. With the baseline's floor of 0.25 this is a factor of 3
# at least; healthy ratios scatter by half as much again.
RATIO_EXCESS = 4.5
RATIO_BLOCK_EXCESS = 3.0
# The step's curvature term takes this share of its first-order gain. Below it nothing is in danger, however far
# above its level a run is; 1 itself is no threshold, since runs differ in where they normally stand.
RATIO_MATTERS = 0.2


def non_finite(scores: Scores) -> Finding | None:
    """A loss or gradient that is not finite: at once, also in warm-up."""
    seen = scores.observation
    counts = {block: count for block, count in seen.non_finite.items() if count > 0}
    norms = {block: 1 for block, norm in seen.gradient_norm.items() if not math.isfinite(norm)}
    bad_loss = seen.loss is not None and not math.isfinite(seen.loss)
    blocks = _worst_first({**norms, **counts})
    if not blocks and not bad_loss:
        return None
    evidence = [f"loss is {seen.loss}"] if bad_loss else []
    evidence += [f"{block}: {counts.get(block, 'some')} gradient entries not finite" for block in blocks]
    return Finding("NonFinite", blocks, "critical", "; ".join(evidence), seen.step)


def loss_spike(recent: Sequence[Scores]) -> Finding | None:
    """A loss of z > 6, and a gradient or an update that says so too, or three such losses in a row."""
    now = recent[-1]
    if now.loss is None or now.loss <= SPIKE:
        return None
    agree = _excess(now, CORROBORATES)
    lasting = len(recent) >= 3 and all(scores.loss is not None and scores.loss > SPIKE for scores in recent)
    if not agree and not lasting:
        return None
    evidence = f"loss {now.observation.loss:.4g} is {now.loss:.1f} robust sd above its level"
    also = [f"{signal} of {block} {z:.1f}" for z, signal, block in agree[:3]]
    evidence += f"; so are {', '.join(also)}" if also else "; the third in a row"
    severity: Severity = "critical" if now.loss > SURE_SPIKE else "warning"
    blocks = tuple(dict.fromkeys(block for _, _, block in agree))
    return Finding("LossSpike", blocks, severity, evidence, now.observation.step)


def update_rms_spike(recent: Sequence[Scores]) -> Finding | None:
    """A block's update RMS of z > 6, seen twice: in a second signal, a second block or a second step; z > 12 alone.

    Weights that jumped need no second sign, nor a z: early in a run, where levels still scatter, one damaged weight
    stays within them. Their block is the cause and stands first: it disturbs the gradients of every block around it.
    """
    now = recent[-1]
    high = {block: z for block, z in now.update_rms.items() if z > SPIKE}
    jumped = _weight_jumps(recent)
    if not jumped and not _seen_twice(high, recent):
        return None
    evidence = [f"weight norm of {block} ×{jumped[block]:.3g} in one step" for block in _worst_first(jumped)]
    evidence += [
        f"update RMS of {block} {now.observation.update_rms[block]:.3g} (z {high[block]:.1f})"
        for block in _worst_first(high)
    ]
    blocks = tuple(dict.fromkeys((*_worst_first(jumped), *_worst_first(high))))
    severity: Severity = "critical" if jumped or max(high.values()) > SURE_SPIKE else "warning"
    return Finding("UpdateRmsSpike", blocks, severity, "; ".join(evidence), now.observation.step)


def _seen_twice(high: Mapping[str, float], recent: Sequence[Scores]) -> bool:
    """Whether the blocks of too high an update RMS have a second sign, or one that needs none."""
    before = recent[-2].update_rms if len(recent) > 1 else {}
    return (
        len(high) > 1
        or any(z > SURE_SPIKE for z in high.values())
        or any(recent[-1].gradient_norm.get(block, 0.0) > CORROBORATES for block in high)
        or any(before.get(block, 0.0) > SPIKE for block in high)
    )


def _weight_jumps(recent: Sequence[Scores]) -> dict[str, float]:
    """By how much a block's weight norm grew since the step before, where that is more than a step can do.

    Not in warm-up: weights that begin at zero double in their second step.
    """
    if len(recent) < 2 or recent[-1].observation.step != recent[-2].observation.step + 1:
        return {}
    was, now = recent[-2].observation.weight_norm, recent[-1].observation.weight_norm
    ratios = {block: now[block] / was[block] for block in recent[-1].gradient_norm if was.get(block) and block in now}
    return {block: ratio for block, ratio in ratios.items() if ratio > WEIGHT_JUMP}


def stability_limit(probes: Sequence[Scores]) -> Finding | None:
    """The stability ratio stands far above the run's own level in two of its last three probes, this one among them.

    One probe's ratio has a denominator that can come near zero, so a single large one proves nothing.
    """
    now = probes[-1]
    ratio = now.observation.stability
    if ratio is None or not _too_sharp(now) or sum(map(_too_sharp, probes)) < 2:
        return None
    excess: dict[str, float] = {}
    for scores in probes:  # blocks take turns in being probed: the newest that is known of each
        excess.update(scores.block_stability)
    blocks = _worst_first({block: z for block, z in excess.items() if z > RATIO_BLOCK_EXCESS})
    evidence = (
        f"stability ratio {ratio.value:.3g} ± {ratio.stderr:.2g} is {now.stability:.1f} robust sd above its level"
    )
    return Finding(
        "StabilityLimit", blocks, "critical" if ratio.value > 1 else "warning", evidence, now.observation.step
    )


def _too_sharp(scores: Scores) -> bool:
    ratio = scores.observation.stability
    return (
        ratio is not None
        and scores.stability is not None
        and scores.stability > RATIO_EXCESS
        and ratio.value > RATIO_MATTERS
    )


def _excess(scores: Scores, above: float) -> list[tuple[float, str, str]]:
    """(z, signal, block) of what stands out, worst first."""
    signals = (("gradient norm", scores.gradient_norm), ("update RMS", scores.update_rms))
    return sorted(((z, name, block) for name, zs in signals for block, z in zs.items() if z > above), reverse=True)


def _worst_first(badness: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(sorted(badness, key=lambda block: -badness[block]))


@dataclass(frozen=True, slots=True)
class Detector:
    """A named judge.

    `judged` says whether its signal was there to be judged; so many steps that it judged clear, `quiet`, end an alert.
    """

    name: str
    judge: Callable[[History, Scores], Finding | None]
    judged: Callable[[Scores], bool]
    quiet: int


DETECTORS = (
    Detector("NonFinite", lambda _, now: non_finite(now), lambda _: True, quiet=20),
    Detector(
        "UpdateRmsSpike", lambda past, _: update_rms_spike(past.recent), lambda now: bool(now.update_rms), quiet=20
    ),
    Detector(
        "StabilityLimit",
        lambda past, now: stability_limit(past.probes) if now.stability is not None else None,
        lambda now: now.stability is not None,
        quiet=3,
    ),
    Detector("LossSpike", lambda past, _: loss_spike(past.recent), lambda now: now.loss is not None, quiet=20),
)


UPDATE_EVERY = 10  # steps between records of an alert that merely goes on


@dataclass(slots=True)
class _Open:
    alert: Alert
    quiet: int = 0  # clear steps in a row
    recorded: int = 0  # last step of the newest record


class AlertLog:
    """The alerts of one run. An alert is closed after `quiet` steps in a row at which its detector could judge."""

    def __init__(self, run: str, quiet: Mapping[str, int], new_id: Callable[[], str]) -> None:
        self._run = run
        self._quiet = quiet
        self._new_id = new_id
        self.open: dict[str, _Open] = {}  # by name
        self._all: dict[str, Alert] = {}

    @property
    def all(self) -> tuple[Alert, ...]:
        """Every alert, oldest first."""
        return tuple(self._all.values())

    def active(self, name: str) -> Alert | None:
        """The open alert of that name."""
        return self.open[name].alert if name in self.open else None

    def restore(self, alerts: Iterable[Alert]) -> None:
        """Take up journalled alerts."""
        self._all = {alert.id: alert for alert in alerts}
        self.open = {alert.name: _Open(alert, recorded=alert.last_step) for alert in self._all.values() if alert.active}

    def see(self, findings: Sequence[Finding], judged: Iterable[str]) -> tuple[Alert, ...]:
        """Fold one step's findings; `judged` are the names that had a signal. Returns the alerts to record."""
        changed = [alert for finding in findings if (alert := self._find(finding)) is not None]
        found = {finding.name for finding in findings}
        for name in judged:
            if name in self.open and name not in found:
                self.open[name].quiet += 1
                if self.open[name].quiet >= self._quiet[name]:
                    changed.append(self._close(name))
        return tuple(changed)

    def replay(self, findings: Sequence[Finding], judged: Iterable[str]) -> None:
        """Carry open alerts on, as `see` does; open and close none."""
        found = {finding.name: finding for finding in findings}
        for name, entry in self.open.items():
            finding = found.get(name)
            if finding is not None:
                self._carry_on(entry, finding)
            elif name in judged:
                entry.quiet += 1

    def close_all(self) -> tuple[Alert, ...]:
        """Close what is open: the run went back to before it."""
        return tuple(self._close(name) for name in tuple(self.open))

    def _find(self, finding: Finding) -> Alert | None:
        entry = self.open.get(finding.name)
        if entry is None:
            alert = Alert(
                id=self._new_id(),
                run=self._run,
                name=finding.name,
                blocks=finding.blocks,
                severity=finding.severity,
                evidence=finding.evidence,
                first_step=finding.step,
                last_step=finding.step,
                active=True,
            )
            self.open[finding.name] = _Open(alert, recorded=finding.step)
            self._all[alert.id] = alert
            return alert
        before = entry.alert
        self._carry_on(entry, finding)
        alert = entry.alert
        changed = alert.blocks != before.blocks or alert.severity != before.severity
        if not changed and alert.last_step - entry.recorded < UPDATE_EVERY:
            return None
        entry.recorded = alert.last_step
        return alert

    def _carry_on(self, entry: _Open, finding: Finding) -> None:
        alert = entry.alert
        # Blocks stay in the order in which trouble reached them: the first to show it is the likeliest cause.
        blocks = tuple(dict.fromkeys((*alert.blocks, *finding.blocks)))
        worse = finding.severity == "critical" and alert.severity == "warning"
        entry.quiet = 0
        entry.alert = replace(
            alert,
            blocks=blocks,
            severity="critical" if worse else alert.severity,
            evidence=finding.evidence if worse else alert.evidence,
            last_step=max(alert.last_step, finding.step),
        )
        self._all[alert.id] = entry.alert

    def _close(self, name: str) -> Alert:
        closed = replace(self.open.pop(name).alert, active=False)
        self._all[closed.id] = closed
        return closed
