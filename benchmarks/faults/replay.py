"""Recorded runs through the detectors of the daemon."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np

from benchmarks.faults.kinds import ONSET
from benchmarks.faults.recordings import About, read_about, read_own
from sharpwatch.daemon.detection.run_detection import RunDetection, layer_block_name
from sharpwatch.daemon.detection.thresholds import NAMES, USUAL, Budget, statistics
from sharpwatch.daemon.ingest.hello import RunHello, read_hello
from sharpwatch.daemon.ingest.samples import read_sample
from sharpwatch.daemon.records import Finding, Incident, Observation
from sharpwatch.daemon.runs.run import observation_of


@dataclass(slots=True)
class Opened:
    """An incident of a replay.

    Attributes:
        incident: As it was at the end.
        paged: The step at which it became critical, if it did.
        until: The step at which it was closed; None if it was open at the end.
    """

    incident: Incident
    paged: int | None = None
    until: int | None = None


@dataclass(slots=True)
class Replay:
    """What the detectors made of a run's own steps, those after its trunk's.

    Attributes:
        about: What the run is.
        opened: Its incidents, oldest first.
        observations: Of its own steps.
        worst: By statistic its largest value [steps] over layer blocks.
        findings: Those of its own steps.
        moved: Largest z of the true layer block's weight change in the first two steps of a fault; NaN if it has none.
    """

    about: About
    opened: list[Opened] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    worst: dict[str, list[float]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    moved: float = float("nan")


def observations(path: Path) -> tuple[RunHello | None, list[Observation]]:
    """The steps that a file has; its Hello, unless it has none of its own."""
    hello, samples = read_own(path)
    read = None if hello is None else read_hello(hello)
    if read is None:
        return None, []
    readings = [read_sample(read, sample) for sample in samples if not sample.closing]
    return read, [observation_of(read.blocks, reading) for reading in readings]


class Group:
    """The runs of one model and seed.

    Args:
        paths: Their files by kind, with the trunk's.
        budget: Of false alarms.
    """

    def __init__(self, paths: dict[str, Path], budget: Budget = USUAL) -> None:
        self.paths = paths
        self._budget = budget
        self._trunk = self._replay_trunk()

    def _replay_trunk(self) -> tuple[Replay, RunDetection, list[Opened]]:
        replay = Replay(read_about(self.paths["trunk"]))
        hello, steps = observations(self.paths["trunk"])
        if hello is None:
            raise ValueError(f"{self.paths['trunk']} has no Hello")
        detection = self._detection(hello)
        _run(detection, [step for step in steps if step.step < ONSET], replay)
        return replay, detection, replay.opened

    def _detection(self, hello: RunHello) -> RunDetection:
        numbers = count()
        new_id, names = (lambda: str(next(numbers))), hello.parameter_names
        return RunDetection("run", hello.layer_blocks, hello.parameters, new_id, self._budget, parameter_names=names)

    @property
    def trunk(self) -> Replay:
        """Of the steps that branches have in common."""
        return self._trunk[0]

    def replay(self, kind: str) -> Replay:
        """Replay a run; a branch goes on where the trunk ends."""
        replay = Replay(read_about(self.paths[kind]))
        hello, steps = observations(self.paths[kind])
        if hello is None:
            raise ValueError(f"{self.paths[kind]} has no Hello")
        if not replay.about.trunk:
            _run(self._detection(hello), steps, replay)
            return replay
        detection = copy.deepcopy(self._trunk[1])
        _run(detection, steps, replay)
        return replay


def _run(detection: RunDetection, steps: Iterable[Observation], replay: Replay) -> None:
    about = replay.about
    opened: dict[str, Opened] = {}
    true_block = detection.names.index(name) if (name := culprit(about)) in detection.names else None
    for step in steps:
        findings, changed = detection.see(step)
        replay.findings += findings
        replay.observations.append(step)
        for incident in changed:
            entry = opened.setdefault(incident.id, Opened(incident))
            entry.incident = incident
            if incident.severity == "critical" and entry.paged is None:
                entry.paged = step.step
            if not incident.active:
                entry.until = step.step
        for name, value in zip(NAMES, np.fmax.reduce(statistics(detection.recent), axis=1), strict=True):
            replay.worst.setdefault(name, []).append(float(value))
        scores = detection.recent[-1]
        if true_block is not None and 0 <= step.step - about.onset < 2 and scores.weight.size:
            z = abs(float(scores.weight[true_block]))
            replay.moved = z if not replay.moved >= z else replay.moved
    replay.opened = list(opened.values())


def culprit(about: About) -> str:
    """The name of the layer block that a fault is in; empty for none."""
    return layer_block_name(about.block, about.layer or "") if about.block else ""


def groups(folder: Path, seeds: Iterable[int] | None = None, budget: Budget = USUAL) -> Iterator[Group]:
    """The groups of runs in a folder that are judged together."""
    found: dict[tuple[str, str, int], dict[str, Path]] = {}
    for path in sorted(folder.glob("*.run.xz")):
        about = read_about(path)
        if seeds is None or about.seed in seeds:
            found.setdefault((about.model, about.size, about.seed), {})[about.kind] = path
    for paths in found.values():
        if {"trunk", "plain"} <= set(paths):
            yield Group(paths, budget)
