"""Judge the detectors on recorded runs: python -m benchmarks.faults.judge FOLDER [--seeds 2 3 4].

A fault is found by a page, an incident that becomes critical, that opens within the kind's steps from its onset; a
warning is enough for cause "data" and for faults that harm nothing. A fault is harmful where the mean loss of 20 steps
stands more than four standard deviations of nudged twins above the healthy twin's to the end, or 0.1 above for 20
steps. Thresholds are fitted on other seeds (`tails`).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.faults.kinds import FAULTS, HEALTHY, KINDS, ONSET, Kind
from benchmarks.faults.pages import write_table
from benchmarks.faults.recordings import About, read_about
from benchmarks.faults.replay import Group, Opened, Replay, culprit, groups
from benchmarks.faults.rivals import RIVALS, series
from benchmarks.faults.training import MODELS
from sharpwatch.daemon.detection.thresholds import NAMES, USUAL, Limits
from sharpwatch.daemon.records import CAUSES, Finding

_WINDOW = 20  # steps of a mean loss
_SDS, _RISE = 4.0, 0.1
_MOVED = 10.0  # standard deviations by which a fault must move its block for that to be found

Losses = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judged run.

    Attributes:
        about: What it is.
        harmful: Whether its loss suffered.
        left: The step from which on the loss has left the healthy twin's band, for 20 steps at least; None if never.
        shown: The step at which the loss by itself, without a twin, is worth a warning; None if never.
        opened: Its incidents from the onset on, oldest first.
        steps: How many of its own steps were judged.
        moved: Standard deviations by which the fault moved its layer block's weights.
        findings: Those of its own steps, oldest first.
        loss, norm: The loss and the norm of all gradients, from the trunk's first step on.
    """

    about: About
    harmful: bool
    left: int | None
    shown: int | None
    opened: Sequence[Opened]
    steps: int
    moved: float
    findings: Sequence[Finding]
    loss: Losses
    norm: Losses

    @property
    def kind(self) -> Kind:
        """Its kind; a trunk is a plain run."""
        return KINDS["plain" if self.about.kind == "trunk" else self.about.kind]

    @property
    def found(self) -> tuple[int, Opened] | None:
        """The step at which the fault was found, and the incident."""
        last = self.about.onset + self.kind.within
        warned = self.kind.cause == "data" or not self.harmful
        steps = [
            (each.incident.first_step if warned and each.incident.first_step >= self.about.onset else each.paged, each)
            for each in self.opened
        ]
        in_time = [(step, each) for step, each in steps if step is not None and self.about.onset <= step <= last]
        return min(in_time, key=lambda each: each[0], default=None)

    @property
    def parameter_right(self) -> bool | None:
        """Whether the incident names the fault's parameter; None where it names none, or the fault has none."""
        if self.found is None or not self.about.parameter or not self.found[1].incident.parameter:
            return None
        return self.found[1].incident.parameter == self.about.parameter

    @property
    def pages(self) -> int:
        """How many incidents became critical."""
        return sum(each.paged is not None for each in self.opened)

    @property
    def warnings(self) -> int:
        """How many incidents did not."""
        return len(self.opened) - self.pages

    @property
    def steps_paged(self) -> int:
        """Steps with an incident open that is critical."""
        last = self.about.first + self.steps
        spans = [range(each.paged, each.until or last) for each in self.opened if each.paged is not None]
        return len({step for span in spans for step in span})


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
    return bool(above[-1] and above[-_WINDOW:].all()) or _first_long(rise > _RISE) is not None


def leaves(run: Losses, twin: Losses, spread: float) -> int | None:
    """The index of the first of the 20 steps whose mean loss has left the twin's band, for 20 steps at least."""
    steps = min(len(run), len(twin))
    broken = np.flatnonzero(~np.isfinite(run[:steps]))
    steps = int(broken[0]) if len(broken) else steps
    if steps < 2 * _WINDOW:
        return int(broken[0]) if len(broken) else None
    left = _first_long(_means(run[:steps]) - _means(twin[:steps]) > _SDS * spread)
    return left if left is not None or not len(broken) else int(broken[0])


def _means(losses: Losses) -> Losses:
    return np.convolve(losses, np.full(_WINDOW, 1 / _WINDOW), "valid")


def _first_long(flags: npt.NDArray[np.bool_]) -> int | None:
    """The index of the first of `_WINDOW` flags in a row."""
    present = 0
    for i, flag in enumerate(flags):
        present = present + 1 if flag else 0
        if present >= _WINDOW:
            return i - _WINDOW + 1
    return None


def verdicts(found: Iterable[Group]) -> list[Verdict]:
    """Judge groups of runs; those of a group are compared with their own twins."""
    return [verdict for group in found for verdict in _judge(group)]


def _judge(group: Group) -> Iterable[Verdict]:
    abouts = {kind: read_about(path) for kind, path in group.paths.items()}
    twin = np.array(abouts["plain"].losses)
    whole = np.array([*abouts["trunk"].losses, *abouts["plain"].losses])
    twins = [np.array(about.losses) for kind, about in abouts.items() if kind.startswith("nudged")]
    spread = spread_of(twins, twin) if twins else 0.0
    trunk = group.trunk
    nothing = float("nan")
    steps = len(trunk.observations)
    seen = series(trunk.observations)
    yield Verdict(trunk.about, False, None, None, trunk.opened, steps, nothing, trunk.findings, *seen)
    for kind in sorted(set(abouts) & set(KINDS)):
        replay = group.replay(kind)
        losses = np.array(replay.about.losses)
        like = whole if replay.about.first == 1 else whole[ONSET - 1 :]
        harmful = KINDS[kind].cause != "healthy" and is_harmful(losses, like, spread)
        left = leaves(losses, like, spread) if harmful else None
        yield Verdict(
            replay.about,
            harmful,
            None if left is None else left + replay.about.first,
            _shown(replay),
            _own(replay),
            len(replay.observations),
            replay.moved,
            replay.findings,
            *series([*(trunk.observations if replay.about.trunk else []), *replay.observations]),
        )


def _shown(replay: Replay) -> int | None:
    """The first step from the onset on at which the loss alone is worth a warning."""
    limits = Limits(USUAL, 1).now
    above = [
        step.step
        for i, step in enumerate(replay.observations)
        if step.step >= replay.about.onset
        and any(replay.worst[name][i] > limits[name][0] for name in NAMES if name.startswith("loss"))
    ]
    return min(above, default=None)


def _own(replay: Replay) -> list[Opened]:
    # One that was opened as a warning may have become a page since.
    return [each for each in replay.opened if max(each.incident.first_step, each.paged or 0) >= replay.about.first]


def table(judged: Sequence[Verdict]) -> str:
    """Recall, delay, lead, cause and culprit by kind of fault; pages and warnings by kind of healthy run."""
    parts = (_fault_table, _summary, _cause_table, _healthy_table, _rival_table)
    return "\n\n".join("\n".join(part(judged)) for part in parts)


def alert_table(judged: Sequence[Verdict], alert: str) -> Iterable[str]:
    """What one alert alone finds, by kind: in how many runs, when, and the findings' own first layer block."""
    yield f"| kind | runs | with {alert} | delay | lead over the loss | block first |"
    yield "|---|---|---|---|---|---|"
    for kind in dict.fromkeys(each.about.kind for each in judged):
        runs = [each for each in judged if each.about.kind == kind]
        first = [
            (each, found)
            for each in runs
            if (
                found := next(
                    (one for one in each.findings if one.name == alert and one.step >= each.about.onset), None
                )
            )
        ]
        late = [found.step - each.about.onset for each, found in first]
        lead = [each.left - found.step for each, found in first if each.left is not None]
        right = sum(found.layer_blocks[:1] == (culprit(each.about),) for each, found in first)
        faulty = any(culprit(each.about) for each in runs)
        yield (
            f"| {kind} | {len(runs)} | {len(first)} | {_median(late) if faulty else '–'} | {_median(lead)} | "
            f"{f'{right} of {len(first)}' if faulty and first else '–'} |"
        )


def _fault_table(judged: Sequence[Verdict]) -> Iterable[str]:
    yield (
        "| fault | model | harmful | found of them | others found | delay | lead over the twin's band | over its own | "
        "cause | block first | parameter |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for kind, model in product(FAULTS, MODELS):
        runs = [each for each in judged if (each.about.kind, each.about.model) == (kind.name, model)]
        if not runs:
            continue
        harmful = [each for each in runs if each.harmful]
        others = [each for each in runs if not each.harmful]
        seen = [(each, *each.found) for each in runs if each.found is not None]
        late = [step - each.about.onset for each, step, _ in seen]
        lead = [each.left - step for each, step, _ in seen if each.left is not None]
        own = [math.inf if each.shown is None else each.shown - step for each, step, _ in seen if each.harmful]
        causes = sum(opened.incident.cause == kind.cause for _, _, opened in seen)
        placed = [(each, opened) for each, _, opened in seen if culprit(each.about)]
        right = sum(opened.incident.layer_blocks[:1] == (culprit(each.about),) for each, opened in placed)
        named = [each.parameter_right for each in runs if each.parameter_right is not None]
        cells = (
            kind.name,
            model,
            f"{len(harmful)} of {len(runs)}",
            str(sum(each.found is not None for each in harmful)),
            f"{sum(each.found is not None for each in others)} of {len(others)}",
            _median(late),
            _median(lead),
            _median(own).replace("inf", "never"),
            f"{causes} of {len(seen)}" if seen else "–",
            f"{right} of {len(placed)}" if placed else "–",
            f"{sum(named)} of {len(named)}" if named else "–",
        )
        yield f"| {' | '.join(cells)} |"


def _summary(judged: Sequence[Verdict]) -> Iterable[str]:
    faults = [each for each in judged if each.kind in FAULTS]
    harmful = [each for each in faults if each.harmful]
    recalls = [
        statistics.mean(each.found is not None for each in runs)
        for kind in FAULTS
        if (runs := [each for each in harmful if each.about.kind == kind.name])
    ]
    if recalls:
        mean, low = 100 * statistics.mean(recalls), sum(recall < 0.8 for recall in recalls)
        yield f"- Recall: mean over {len(recalls)} kinds {mean:.1f} %, of {len(harmful)} harmful runs."
        yield f"- Kinds below 80 %: {low}."
    seen = [(each, each.found[1]) for each in harmful if each.found is not None]
    if seen:
        right = sum(opened.incident.cause == each.kind.cause for each, opened in seen)
        yield f"- Cause right in {right} of {len(seen)} found ({100 * right / len(seen):.0f} %)."
    moved = [each for each in faults if each.moved > _MOVED]
    first = [each for each in moved if each.found and each.found[1].incident.layer_blocks[:1] == (culprit(each.about),)]
    if moved:
        yield f"- True layer block first in {len(first)} of {len(moved)} faults that moved it by more than 10 sd."
    named = [each.parameter_right for each in faults if each.parameter_right is not None]
    if named:
        yield f"- Parameter right in {sum(named)} of {len(named)} faults of one that were found with a parameter."


def _cause_table(judged: Sequence[Verdict]) -> Iterable[str]:
    """How often each cause was named, by the true one; of all faults found."""
    seen = [(each.kind.cause, each.found[1].incident.cause) for each in judged if each.kind in FAULTS and each.found]
    named = sorted({cause for _, cause in seen})
    yield f"| true cause | {' | '.join(named)} |"
    yield f"|---|{'---|' * len(named)}"
    for cause in sorted({cause for cause, _ in seen}):
        yield f"| {cause} | {' | '.join(str(seen.count((cause, each)) or '') for each in named)} |"


def _healthy_table(judged: Sequence[Verdict]) -> Iterable[str]:
    yield "| healthy | steps | pages | warnings | steps under an open page |"
    yield "|---|---|---|---|---|"
    total = np.zeros(4, dtype=int)
    for kind in ("trunk", *(kind.name for kind in HEALTHY)):
        runs = [each for each in judged if each.about.kind == kind]
        row = np.sum([(each.steps, each.pages, each.warnings, each.steps_paged) for each in runs] or [[0] * 4], axis=0)
        total += row
        if runs:
            yield f"| {kind} | {row[0]} | {row[1]} | {row[2]} | {row[3]} |"
    if total[0]:
        pages, warnings, under = 1e4 * total[1:] / total[0]
        yield ""
        yield (
            f"In all {total[0]} healthy steps: per 10,000 {pages:.2f} pages and {warnings:.1f} warnings; "
            f"{under / 100:.2f} % of the steps under an open page."
        )


def _rival_table(judged: Sequence[Verdict]) -> Iterable[str]:
    """Recall and median delay of harmful faults, and alarms in healthy steps, at own settings and at as few alarms."""
    faults, healthy = divided(judged)
    causes = sorted({each.kind.cause for each in faults})
    yield f"| detector | setting | alarms per 10,000 healthy steps | all kinds | {' | '.join(causes)} |"
    yield f"|---|---|---|---|{'---|' * len(causes)}"
    steps = sum(each.steps for each in healthy) / 1e4
    pages = sum(each.pages for each in healthy)
    yield f"| sharpwatch, pages | its own | {pages / steps:.1f} | {_by_cause(own_delays(faults), causes)} |"
    for name, (rule, setting, more) in RIVALS.items():
        for value in (setting, *more):
            alarms = sum(count_alarms(rule(each.loss, each.norm, value)[-each.steps :]) for each in healthy)
            enough = alarms <= max(1, pages)
            if value == setting or enough or value == more[-1]:
                seen = [(each.kind.name, rival_delay(each, rule(each.loss, each.norm, value))) for each in faults]
                what = "its own" if value == setting else "as few alarms" if enough else "least sensitive"
                yield f"| {name} | {what}: {value:g} | {alarms / steps:.1f} | {_by_cause(seen, causes)} |"
            if enough:
                break


def _by_cause(delays: Sequence[tuple[str, int | None]], causes: Sequence[str]) -> str:
    """Mean recall over kinds, and median delay: of all kinds, then of those of each cause."""
    of_causes = ([each for each in delays if KINDS[each[0]].cause == cause] for cause in causes)
    return " | ".join(map(_recall, [delays, *of_causes]))


def divided(judged: Sequence[Verdict]) -> tuple[list[Verdict], list[Verdict]]:
    """The harmful faults, and the healthy runs."""
    return (
        [each for each in judged if each.kind in FAULTS and each.harmful],
        [each for each in judged if each.kind not in FAULTS],
    )


def own_delays(faults: Sequence[Verdict]) -> list[tuple[str, int | None]]:
    """Of each fault its kind's name, and after how many steps sharpwatch found it; None where it did not."""
    return [(each.kind.name, each.found and each.found[0] - each.about.onset) for each in faults]


def mean_recall(delays: Sequence[tuple[str, int | None]]) -> float:
    """The share found, meant over kinds: of each kind's name and its delay, None where it was not found."""
    by_kind = {kind: [delay for name, delay in delays if name == kind] for kind, _ in delays}
    return statistics.mean(statistics.mean(delay is not None for delay in each) for each in by_kind.values())


def _recall(delays: Sequence[tuple[str, int | None]]) -> str:
    known = [delay for _, delay in delays if delay is not None]
    return f"{100 * mean_recall(delays):.0f} %, {_median(known)}" if delays else "–"


def rival_delay(judged: Verdict, flags: npt.NDArray[np.bool_]) -> int | None:
    """After how many steps a rival's alarms found a fault; None if they did not in time."""
    start = len(flags) - judged.steps + judged.about.onset - judged.about.first
    found = np.flatnonzero(flags[start : start + judged.kind.within + 1])
    return int(found[0]) if len(found) else None


def count_alarms(flags: npt.NDArray[np.bool_]) -> int:
    """Alarms, those within 20 steps of each other as one."""
    count, last = 0, -_WINDOW
    for i in np.flatnonzero(flags):
        count += i - last >= _WINDOW
        last = i
    return count


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):g}" if values else "–"


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, help="by default all that are recorded")
    parser.add_argument("--alert", choices=CAUSES, help="the table of one alert alone, warnings included")
    parser.add_argument("--write", type=Path, help="a page whose tables are replaced, between two comments")
    given = parser.parse_args(arguments)
    judged = verdicts(groups(given.folder, given.seeds))
    if given.alert:
        print("\n".join(alert_table(judged, given.alert)))
        return 0
    seeds = ", ".join(map(str, given.seeds)) if given.seeds else "all"
    text = (
        f"Judged on seeds {seeds}; thresholds were fitted on seeds 0, 1 and 20 to 27, and of 5M parameters 0 and 2.\n"
        f"Delays and leads are medians in steps. A run's own band is left where its loss alone is worth a warning. "
        f"Detectors: recall, mean over kinds, and median delay.\n\n"
        f"{table(judged)}"
    )
    print(text)
    if given.write is not None:
        write_table(given.write, "judged", text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
