"""What incidents and the monitoring of a run have cost, in steps and hours, and what actions may have saved.

Each row says how it is computed, as none is worth more than that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sharpwatch.cli.output import number, percent
from sharpwatch.daemon.decisions.effect import NEWEST, OUT_OF_BAND, LossBand, mean_of
from sharpwatch.daemon.detection.history import Losses
from sharpwatch.v1.operator_pb2 import Alert, Decision, HistoryPoint, RunDetail

_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Redone:
    """Steps that were done again, as the run went back from one step to another."""

    left_at: int
    back_to: int
    why: str

    @property
    def steps(self) -> int:
        """How many."""
        return self.left_at - self.back_to + 1


@dataclass(frozen=True, slots=True)
class Cost:
    """A row of the balance."""

    what: str
    steps: int | None
    hours: float | None
    how: str


def redone(points: Sequence[HistoryPoint], decisions: Iterable[Decision]) -> list[Redone]:
    """Where the run went back, in order.

    Args:
        points: The recorded samples, in the order in which they came.
        decisions: The run's decisions, oldest first, of which rollbacks explain that.
    """
    rollbacks = [made for made in decisions if made.action == "rollback" and _applied(made)]
    found = []
    # From the newest on, as the journal may have lost the first times that the run went back, and no rollback.
    for before, after in reversed(list(pairwise(points))):
        if after.step > before.step:
            continue
        of = [one for one in rollbacks if one.applied_step == after.step and one.step <= before.step]
        if of:
            rollbacks.remove(of[-1])
            why = f"rollback {of[-1].id}"
        else:
            why = "a new attempt" if after.attempt != before.attempt else "a restored checkpoint"
        found.append(Redone(before.step, after.step, why))
    return found[::-1]


def costs(detail: RunDetail, points: Sequence[HistoryPoint], decisions: Sequence[Decision]) -> list[Cost]:
    """The balance of a run.

    Args:
        detail: The run.
        points: Its recorded samples, in the order in which they came.
        decisions: Its decisions.
    """
    seconds, of_seconds = _step_seconds(points)
    rows = [*_trained(points, seconds, of_seconds)]
    again = redone(points, decisions)
    rows += [
        _cost(f"lost: done again after {each.why}", each.steps, seconds, f"from step {each.left_at} to {each.back_to}")
        for each in again
    ]
    if not again:
        rows.append(Cost("lost: done again", 0, 0.0, "no recorded step is followed by an earlier one"))
    rows.append(_in_trouble(detail.alerts, seconds))
    rows += [_saved(detail, points, decisions, sum(each.steps for each in again), seconds)]
    return [*rows, *_monitoring(points, seconds)]


def _applied(made: Decision) -> bool:
    return made.HasField("applied_step")


def _cost(what: str, steps: int, seconds: float | None, how: str) -> Cost:
    return Cost(what, steps, None if seconds is None else steps * seconds / _HOUR, how)


def _step_seconds(points: Sequence[HistoryPoint]) -> tuple[float | None, str]:
    """The usual time of a step, and how that is known."""
    told = [point.step_seconds for point in points if point.step_seconds]
    if told:
        return statistics.median(told), f"median of {len(told)} step times that the agent told"
    between = [
        (after.taken_at_unix_ns - before.taken_at_unix_ns) / 1e9 / (after.step - before.step)
        for before, after in pairwise(points)
        if after.attempt == before.attempt and after.step > before.step
    ]
    return (statistics.median(between), "median time between samples") if between else (None, "no step time is known")


def _trained(points: Sequence[HistoryPoint], seconds: float | None, of_seconds: str) -> Iterator[Cost]:
    time = "" if seconds is None else f", times {number(seconds, 3)} s ({of_seconds})"
    yield _cost("recorded", len(points), seconds, f"samples that the journal keeps{time or f'; {of_seconds}'}")


def _in_trouble(alerts: Iterable[Alert], seconds: float | None) -> Cost:
    steps: set[int] = set()
    for alert in alerts:
        if alert.severity == "critical":
            steps.update(range(alert.onset, alert.last_step + 1))
    return _cost("in a critical incident", len(steps), seconds, "steps from an onset to its last finding, each once")


def _saved(
    detail: RunDetail, points: Sequence[HistoryPoint], decisions: Sequence[Decision], again: int, seconds: float | None
) -> Cost:
    """What a cure saved at most, if the run would have been lost from the onset on without it."""
    incidents = {alert.id: alert for alert in detail.alerts}
    acted = [
        made for made in decisions if made.outcome == "recovered" and made.alert_id in incidents and _applied(made)
    ]
    if not acted:
        return Cost("saved", None, None, "not known: no action on an incident ended as recovered")
    # What never harmed the loss is over after any action.
    cured = [made for made in acted if _did_harm(incidents[made.alert_id], made, points)]
    if not cured:
        how = (
            "not known: before the actions that ended as recovered, the loss stood where it had stood before the "
            "onset, or too few losses are kept to say; nothing says that the run would have been lost"
        )
        return Cost("saved", None, None, how)
    onset = min(incidents[made.alert_id].onset for made in cured)
    places = [each.step for each in detail.checkpoints]
    places += [made.rollback.checkpoint.step for made in decisions if made.HasField("rollback")]
    back_to = max((step for step in places if step < onset), default=None)
    if back_to is None:
        how = (
            f"not known: no checkpoint from before the onset at {onset} is known any more, to which one would have gone"
        )
        return Cost("saved", None, None, how)
    last = max((point.step for point in points), default=detail.run.step)
    how = (
        f"if nobody had acted until step {last}, and all since the checkpoint of step {back_to}, the newest known from "
        f"before the onset at {onset}, had been thrown away; less the {again} steps done again. What the run would "
        "have done by itself is not known"
    )
    return _cost("saved: at most", max(0, last - back_to - again), seconds, how)


def _did_harm(incident: Alert, made: Decision, points: Sequence[HistoryPoint]) -> bool:
    """Whether the loss had left its band, or was lost, when a decision on an incident was made."""
    # The first time that the run came to that step: after a rollback it comes there again.
    end = next((index for index, point in enumerate(points) if point.step >= made.step), len(points) - 1)
    losses, is_lost = Losses(), incident.cause == "non-finite"
    for point in points[: end + 1]:
        loss = point.loss if point.HasField("loss") else None
        losses.see(point.step, loss)
        is_lost = is_lost or (point.step >= incident.onset and loss is not None and not math.isfinite(loss))
    band, since = LossBand.before(losses, incident.onset), losses.since(incident.onset, NEWEST)
    if is_lost or band is None or not len(since):
        return is_lost
    return band.above(mean_of(since)) > OUT_OF_BAND


def _monitoring(points: Sequence[HistoryPoint], seconds: float | None) -> Iterator[Cost]:
    told = [point.overhead_ratio for point in points if point.HasField("overhead_ratio")]
    if not told:
        yield Cost("monitoring", None, None, "not known: no sample tells the agent's own time")
        return
    ratio = statistics.fmean(told)
    hours = None if seconds is None else ratio * len(points) * seconds / _HOUR
    how = f"{percent(ratio)} of step time, the mean of what {len(told)} samples tell, times the recorded steps"
    yield Cost("monitoring: the agent's own time", None, hours, how)
