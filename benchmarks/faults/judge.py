"""Judge the detectors on recorded runs: python -m benchmarks.faults.judge FOLDER [--seeds 2 3 4].

A fault is found by a critical alert that opens within the kind's steps from its onset and that the healthy twin lacks;
a warning is enough for cause "data" and for faults that harm nothing. A fault is harmful where the mean loss of 20
steps stands more than four standard deviations of nudged twins above the twin's to the end, or 0.1 above for 20 steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.faults.kinds import FAULTS, HEALTHY, KINDS, ONSET
from benchmarks.faults.recordings import About, Recording, read, read_about
from sharpwatch.daemon.detection.baselines import History
from sharpwatch.daemon.detection.detectors import DETECTORS, AlertLog
from sharpwatch.daemon.ingest.hello import read_hello
from sharpwatch.daemon.ingest.samples import read_sample
from sharpwatch.daemon.records import Alert
from sharpwatch.daemon.runs.run import observation_of

_WINDOW = 20  # steps of a mean loss
_SDS, _RISE = 4.0, 0.1
_NEAR = 5  # steps within which an alert of the twin's is the same one

Losses = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judged run.

    Attributes:
        about: What it is.
        harmful: Whether its loss suffered.
        alerts: All alerts from the onset on that its twin lacks, oldest first.
        steps: How many of its own steps were judged.
    """

    about: About
    harmful: bool
    alerts: Sequence[Alert]
    steps: int

    @property
    def finding(self) -> Alert | None:
        """The alert that found the fault."""
        kind = KINDS[self.about.kind]
        last = self.about.onset + kind.within
        for alert in self.alerts:
            enough = alert.severity == "critical" or kind.cause == "data" or not self.harmful
            if enough and self.about.onset <= alert.first_step <= last:
                return alert
        return None


def alerts_of(recording: Recording) -> list[Alert]:
    """Replay a run through the detectors."""
    hello = read_hello(recording.hello)
    history, numbers = History(), iter(range(10**9))
    log = AlertLog("run", {each.name: each.quiet for each in DETECTORS}, lambda: str(next(numbers)))
    opened: dict[str, Alert] = {}
    for sample in recording.samples:
        reading = read_sample(hello, sample)
        if reading.closing:
            continue
        scores = history.see(observation_of(hello.blocks, reading))
        findings = [found for each in DETECTORS if (found := each.judge(history, scores)) is not None]
        for alert in log.see(findings, [each.name for each in DETECTORS if each.judged(scores)]):
            # Severity may grow: what counts is what it was within the time, and it opened first.
            opened.setdefault(alert.id, alert)
            if alert.severity == "critical" and opened[alert.id].severity != "critical":
                opened[alert.id + "+"] = alert
    return sorted(opened.values(), key=lambda alert: alert.first_step)


def spread_of(nudged: Sequence[Losses], twin: Losses) -> float:
    """Standard deviation of nudged twins' mean losses around the twin's."""
    return float(np.std([_means(each) - _means(twin) for each in nudged]))


def is_harmful(run: Losses, twin: Losses, spread: float) -> bool:
    """Whether a run's loss leaves the twin's band for good, or by 0.1 for a while."""
    steps = min(len(run), len(twin))
    if not np.isfinite(run[:steps]).all():
        return True
    rise = _means(run[:steps]) - _means(twin[:steps])
    above = rise > _SDS * spread
    return bool(above[-1] and above[-_WINDOW:].all()) or _longest(rise > _RISE) >= _WINDOW


def _means(losses: Losses) -> Losses:
    return np.convolve(losses, np.full(_WINDOW, 1 / _WINDOW), "valid")


def _longest(flags: npt.NDArray[np.bool_]) -> int:
    longest = present = 0
    for flag in flags:
        present = present + 1 if flag else 0
        longest = max(longest, present)
    return longest


def verdicts(paths: Iterable[Path]) -> list[Verdict]:
    """Judge runs; those of one model and seed are compared with their own twins."""
    groups: dict[tuple[str, str, int], dict[str, Path]] = {}
    for path in paths:
        about = read_about(path)
        groups.setdefault((about.model, about.size, about.seed), {})[about.kind] = path
    found = []
    for group in groups.values():
        if "plain" not in group:
            continue
        twin = read(group["plain"])
        twins = [np.array(read_about(path).losses) for kind, path in group.items() if kind.startswith("nudged")]
        spread = spread_of(twins, np.array(twin.about.losses))
        known = {(alert.name, alert.first_step) for alert in alerts_of(twin)}
        whole = np.array([*read_about(group["trunk"]).losses, *twin.about.losses])
        for kind, path in group.items():
            if kind not in KINDS:
                continue
            run = twin if kind == "plain" else read(path)
            losses = np.array(run.about.losses)
            like = whole if run.about.first == 1 else whole[ONSET - 1 :]
            alerts = [
                alert
                for alert in alerts_of(run)
                if alert.first_step >= run.about.first
                and (
                    kind == "plain" or not any(n == alert.name and abs(s - alert.first_step) <= _NEAR for n, s in known)
                )
            ]
            harmful = KINDS[kind].cause != "healthy" and is_harmful(losses, like, spread)
            found.append(Verdict(run.about, harmful, alerts, len(losses)))
    return found


def table(judged: Sequence[Verdict]) -> str:
    """Recall, delay and culprit by kind of fault; alerts by kind of healthy run."""
    lines = ["| fault | harmful | found of them | others found | delay | block first |", "|---|---|---|---|---|---|"]
    rates = []
    for kind in FAULTS:
        runs = [each for each in judged if each.about.kind == kind.name]
        if not runs:
            continue
        harmful = [each for each in runs if each.harmful]
        seen = [each for each in harmful if each.finding is not None]
        others = [each for each in runs if not each.harmful]
        late = [each.finding.first_step - each.about.onset for each in runs if each.finding is not None]
        placed = [each for each in seen if each.about.block]
        right = sum(each.finding is not None and each.finding.blocks[:1] == (each.about.block,) for each in placed)
        rates += [len(seen) / len(harmful)] if harmful else []
        lines.append(
            f"| {kind.name} | {len(harmful)} of {len(runs)} | {len(seen)} | "
            f"{sum(each.finding is not None for each in others)} of {len(others)} | "
            f"{statistics.median(late) if late else '–'} | {f'{right} of {len(placed)}' if placed else '–'} |"
        )
    if rates:
        lines.append(f"\nMean recall over {len(rates)} kinds with harmful runs: {100 * statistics.mean(rates):.0f} %\n")
    lines += ["| healthy | steps | critical | warning |", "|---|---|---|---|"]
    steps = critical = warning = 0
    for kind in HEALTHY:
        runs = [each for each in judged if each.about.kind == kind.name]
        counts = [alert.severity for each in runs for alert in each.alerts]
        own = sum(each.steps for each in runs)
        steps, critical, warning = steps + own, critical + counts.count("critical"), warning + counts.count("warning")
        if runs:
            lines.append(f"| {kind.name} | {own} | {counts.count('critical')} | {counts.count('warning')} |")
    if steps:
        lines.append(
            f"\nPer 10,000 healthy steps: {1e4 * critical / steps:.1f} critical, {1e4 * warning / steps:.1f} warning"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, help="by default all that are recorded")
    given = parser.parse_args(arguments)
    paths = sorted(given.folder.glob("*.run.xz"))
    if given.seeds is not None:
        paths = [path for path in paths if read_about(path).seed in given.seeds]
    print(table(verdicts(paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
