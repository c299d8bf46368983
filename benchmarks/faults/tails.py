"""Fit the tails of all statistics on healthy runs: python -m benchmarks.faults.tails FOLDER... [--seeds 0 1].

What it prints is `TAILS` in sharpwatch/daemon/detection/thresholds.py. Those of the loss are without shifts of domain,
where it changes for a reason that is neither a fault nor noise. The seeds that tails are fitted on are not judged.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.faults.kinds import HEALTHY
from benchmarks.faults.replay import groups
from sharpwatch.daemon.detection.thresholds import TOGETHER

_PEAKS = 20  # that a tail is fitted to: few enough to be a tail, enough for a mean


def peaks(values: Sequence[float], level: float) -> list[float]:
    """The largest values above a level of stretches that `TOGETHER` samples lie between."""
    found: list[float] = []
    last = -TOGETHER
    for i, value in enumerate(values):
        if value > level:
            if i - last >= TOGETHER:
                found.append(value)
            else:
                found[-1] = max(found[-1], value)
            last = i
    return found


def fit(series: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Level, mean excess and rate of the tail of a statistic over several runs."""
    every = np.concatenate([np.asarray(values, dtype=float) for values in series])
    every = np.sort(every[np.isfinite(every)])
    # Down from the largest value until there are enough peaks.
    for level in every[::-1][:: max(1, len(every) // 2000)]:
        found = [peak for values in series for peak in peaks(values, level)]
        if len(found) >= _PEAKS:
            excess = float(np.mean([peak - level for peak in found]))
            return float(level), excess, len(found) / len(every)
    return float(every[0]), 0.0, 1.0


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--seeds", nargs="+", type=int, help="by default all that are recorded")
    given = parser.parse_args(arguments)
    found: dict[str, list[Sequence[float]]] = defaultdict(list)
    for group in (group for folder in given.folders for group in groups(folder, given.seeds)):
        replays = [group.trunk] + [group.replay(kind.name) for kind in HEALTHY if kind.name in group.paths]
        for replay in replays:
            for name, values in replay.worst.items():
                if replay.about.kind != "domain-shifts" or not name.startswith(("loss", "drop")):
                    found[name].append(values)
    for name, series in sorted(found.items()):
        level, excess, rate = fit(series)
        count = sum(int(np.isfinite(values).sum()) for values in series)
        print(f'    "{name}": Tail({level:.2f}, {excess:.2f}, {rate:.2e}),  # {count} samples')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
