"""Hold real runs against each other: python -m benchmarks.faults.pairs FOLDER.

The folder has those of `benchmarks.faults.real`, with an INDEX.csv beside modded-nanogpt's. First what a reference
finds: in a run that fails in silence, and in both directions of every pair of healthy runs. Then how often runs with
the same data stand out at the same step, and how often they would by chance: at the step 100 later.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sharpwatch.daemon.detection.history import Losses, StepHistory
from sharpwatch.daemon.detection.reference import ReferenceTest
from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.records import Finding
from sharpwatch.replay.files import ReadOptions, read_run
from sharpwatch.replay.recorded_run import RecordedRun, reference_losses

SILENT = ("laprop/IWSLT_adam_0.98", "laprop/IWSLT_adam_0.98_warmup")
TWINS = tuple(f"megatron-golden/gpt__gpt3_15b_8t_release__{where}" for where in ("dev_dgx_h100", "lts_dgx_a100"))
_APART = 100  # steps at which what two runs show has nothing in common


@dataclass(frozen=True, slots=True)
class Seen:
    """A run through the detectors."""

    name: str
    run: RecordedRun
    history: StepHistory
    excursions: frozenset[int]


def read(file: Path) -> Seen:
    """Read a run and give it to the detectors."""
    run = read_run(str(file), ReadOptions())
    detection = RunDetection(file.name, run.layer_blocks, run.parameters, str)
    odd, before = set(), 0
    for observation in run.observations:
        detection.see(observation)
        counted = sum(detection.excursions.values())
        if counted > before:
            odd.add(observation.step)
        before = counted
    name = f"{file.parent.name}/{file.name.removesuffix('.csv.gz')}"
    return Seen(name, run, detection.history, frozenset(odd))


def held_against(run: RecordedRun, reference: RecordedRun) -> list[Finding]:
    """What the test says of a run, step by step: the first finding of each severity."""
    found: dict[str, Finding] = {}
    own = Losses(capacity=max(1, len(run.observations)))
    test = ReferenceTest("its twin", own, reference_losses(reference))
    for observation in run.observations:
        own.see(observation.step, observation.loss)
        test.see(observation.step)
        finding = test.finding(observation.step)
        if finding is not None:
            found.setdefault(finding.severity, finding)
    return list(found.values())


def groups(folder: Path) -> Iterator[list[Path]]:
    """Files of runs of equal configuration: of one record, with equal steps and rates."""
    with (folder / "modded-nanogpt/INDEX.csv").open(encoding="utf-8") as index:
        rows = sorted(csv.DictReader(index), key=_configuration)
    for _, same in itertools.groupby(rows, key=_configuration):
        files = [folder / "modded-nanogpt" / f"{row['name']}.csv.gz" for row in same]
        if len(files) > 1:
            yield files


def _configuration(row: dict[str, str]) -> tuple[str, ...]:
    return (row["name"].partition("__")[0], row["steps"], row["lr_consts"], row["warm_iters"])


def main(arguments: Sequence[str]) -> int:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(arguments).folder
    for finding in held_against(*(read_run(str(folder / f"{name}.csv.gz"), ReadOptions()) for name in SILENT)):
        print(f"{SILENT[0]}, at step {finding.step}: {finding.severity}: {finding.evidence}")
    same = [
        [read(folder / f"{name}.csv.gz") for name in TWINS],
        *([read(file) for file in files] for files in groups(folder)),
    ]
    pairs = [pair for runs in same for pair in itertools.permutations(runs, 2)]
    false = [(run.name, other.name) for run, other in pairs if held_against(run.run, other.run)]
    steps = sum(len(run.history.losses) for run, _ in pairs)
    print(f"healthy pairs, both ways: {len(pairs)} of {steps} steps in all, {len(false)} with a silent failure {false}")
    asked = [(run, other.history, step) for run, other in pairs for step in run.excursions]
    shared = sum(bool(history.stood_out(step)) for _, history, step in asked)
    chance = sum(bool(history.stood_out(step + _APART)) for _, history, step in asked)
    alone = {(run.name, step) for run, _, step in asked}
    alone -= {(run.name, step) for run, history, step in asked if history.stood_out(step)}
    excursions = len({(run.name, step) for run, _, step in asked})
    batches = sum(len(frozenset().union(*(run.excursions for run in runs))) for runs in same)
    print(
        f"excursions: {excursions} at {batches} batches, of which {len(alone)} are in no other run with the same data"
    )
    print(f"asked one by one: another run stood out at {shared} of {len(asked)}; {_APART} steps later at {chance}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
