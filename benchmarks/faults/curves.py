"""Draw recall against false alarms: python -m benchmarks.faults.curves FOLDER PICTURE --seeds 2 3.

sharpwatch is judged with several budgets of pages, and each rival at several settings, all on the same recordings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.faults.judge import Verdict, count_alarms, divided, mean_recall, own_delays, rival_delay, verdicts
from benchmarks.faults.replay import groups
from benchmarks.faults.rivals import RIVALS
from sharpwatch.daemon.detection.thresholds import USUAL, Budget

_BUDGETS = (0.01, 0.1, USUAL.pages, 10.0, 100.0)  # pages in 10,000 healthy steps
_LINEAR = 0.5  # alarms in 10,000 steps below which the axis is linear, down to 0

Point = tuple[float, float]  # alarms in 10,000 healthy steps, and mean recall in percent


def own_point(judged: Sequence[Verdict]) -> Point:
    """Pages in healthy runs, and recall."""
    faults, healthy = divided(judged)
    pages, steps = sum(each.pages for each in healthy), sum(each.steps for each in healthy)
    return 1e4 * pages / steps, 100 * mean_recall(own_delays(faults))


def rival_points(judged: Sequence[Verdict], name: str) -> list[Point]:
    """The same for a rival, at its own setting first."""
    rule, setting, more = RIVALS[name]
    faults, healthy = divided(judged)
    steps = sum(each.steps for each in healthy)
    points = []
    for value in (setting, *more):
        alarms = sum(count_alarms(rule(each.loss, each.norm, value)[-each.steps :]) for each in healthy)
        delays = [(each.kind.name, rival_delay(each, rule(each.loss, each.norm, value))) for each in faults]
        points.append((1e4 * alarms / steps, 100 * mean_recall(delays)))
    return points


def draw(curves: Mapping[str, Sequence[Point]], picture: Path) -> None:
    """Draw a curve for each detector, in the order of its settings."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        wide = {"linewidth": 2.5, "color": "black", "zorder": 3} if name == "sharpwatch" else {"linewidth": 1.2}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **wide)
    axes.set_xscale("symlog", linthresh=_LINEAR)
    axes.set(xlim=(0, None), ylim=(0, 101), xlabel="false alarms in 10,000 healthy steps", ylabel="mean recall, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(picture)


def main(arguments: Sequence[str]) -> int:
    """Draw the picture, and print its points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    given = parser.parse_args(arguments)
    budgets = [Budget(pages, USUAL.warnings) for pages in _BUDGETS]
    judged = [verdicts(groups(given.folder, given.seeds, budget)) for budget in budgets]
    curves = {"sharpwatch": [own_point(each) for each in judged]}
    curves |= {name: rival_points(judged[0], name) for name in RIVALS}
    for name, points in curves.items():
        print(name, " ".join(f"{alarms:.1f}:{recall:.0f}%" for alarms, recall in points))
    draw(curves, given.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
