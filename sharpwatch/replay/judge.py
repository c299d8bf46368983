"""A recorded run through the detectors: its incidents, and what could be judged from which sample on."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sharpwatch.daemon.detection.history import Losses
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.detection.signals import Scores
from sharpwatch.daemon.detection.thresholds import USUAL, Budget
from sharpwatch.daemon.records import Incident
from sharpwatch.replay.log import Column
from sharpwatch.replay.recorded_run import RecordedRun, reference_losses


@dataclass(frozen=True, slots=True)
class JudgedIncident:
    """An incident; the step at which it was closed, None where the run ended first, and at which it became critical."""

    incident: Incident
    closed_step: int | None
    critical_step: int | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the detectors find in a run.

    Attributes:
        run: The run.
        incidents: In the order they were opened.
        blind: By column the samples before the first one that was judged; None where none was.
    """

    run: RecordedRun
    incidents: tuple[JudgedIncident, ...]
    blind: Mapping[Column, int | None]


def judge(run: RecordedRun, budget: Budget = USUAL, reference: RecordedRun | None = None) -> Judgement:
    """Give a run to the detectors as a daemon would, from its first step to its last.

    Args:
        run: The run.
        budget: Of false alarms.
        reference: A run whose losses its own are held against.

    Raises:
        LogError: The reference has no loss.
    """
    numbers = itertools.count(1)
    detection = RunDetection(
        run.source,
        run.layer_blocks,
        run.parameters,
        lambda: str(next(numbers)),
        budget,
        parameter_names=run.parameter_names,
    )
    if reference is not None:
        detection.history.losses = Losses(capacity=max(1, len(run.observations)))
        detection.set_reference(reference.source, reference_losses(reference))
    closed: dict[str, int] = {}
    critical: dict[str, int] = {}
    blind: dict[Column, int | None] = {"loss": None, "grad-norm": None, "lr": None}
    for count, observation in enumerate(run.observations):
        with warnings.catch_warnings():
            # A log says nothing of updates and weights, and the means of nothing are NaN.
            warnings.simplefilter("ignore", RuntimeWarning)
            _, changed = detection.see(observation)
        for incident in changed:
            if incident.severity == "critical":
                critical.setdefault(incident.id, observation.step)
        closed |= {incident.id: observation.step for incident in changed if not incident.active}
        newest = detection.recent[-1]
        blind |= {column: count for column, known in blind.items() if known is None and _is_judged(column, newest)}
    incidents = tuple(
        JudgedIncident(each, closed.get(each.id), critical.get(each.id)) for each in detection.incidents.all
    )
    return Judgement(run, incidents, blind)


def _is_judged(column: Column, scores: Scores) -> bool:
    """Whether the newest sample has a score of a loss, of a gradient norm, or of a rate."""
    if column == "loss":
        return not np.isnan(scores.loss).all()
    if column == "grad-norm":
        return bool(np.isfinite(scores.gradient).any())
    return bool(np.isfinite(scores.rate).any())
