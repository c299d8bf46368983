"""Judge real runs that others recorded: python -m benchmarks.faults.real FOLDER [--write docs/detection.md].

The folder has logs that `sharpwatch replay` reads, such as CSV with step, loss, grad_norm and lr. All but the events
named here count as healthy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.pages import write_table
from sharpwatch.replay.files import ReadOptions, read_run
from sharpwatch.replay.judge import Judgement, judge


@dataclass(frozen=True, slots=True)
class Events:
    """What is known of a run: steps from which to which a page finds a real event, and those that count neither way."""

    real: Sequence[tuple[int, int]] = ()
    either: Sequence[tuple[int, int]] = ()


# By the beginning of the file's name. Read off the curves: the sources label nothing.
EVENTS: Mapping[str, Events] = {
    "mixtral": Events(real=[(3840, 3900)], either=[(step - 10, step + 60) for step in (2360, 2830, 3800, 4260)])
}


def rows(files: Iterable[Path]) -> Iterable[str]:
    """The lines of a table, then what it adds up to."""
    yield "| run | samples | false pages | warnings | events found |"
    yield "|---|---|---|---|---|"
    samples = false = 0
    for file in files:
        judged = judge(read_run(str(file), ReadOptions()))
        events = next((each for name, each in EVENTS.items() if file.name.startswith(name)), Events())
        pages = _pages(judged)
        found = sum(any(first <= page <= last for page in pages) for first, last in events.real)
        known = [*events.real, *events.either]
        wrong = [page for page in pages if not any(first <= page <= last for first, last in known)]
        count = len(list(judged.run.observations))
        samples, false = samples + count, false + len(wrong)
        name = f"{file.parent.name}/{file.name.removesuffix('.csv.gz')}"
        at = f" (step {', '.join(map(str, wrong))})" if wrong else ""
        expected = f"{found} of {len(events.real)}" if events.real else "–"
        warnings = len(judged.incidents) - len(pages)
        yield f"| {name} | {count} | {len(wrong)}{at} | {warnings} | {expected} |"
    yield ""
    yield f"In all {samples} samples: {1e4 * false / max(samples, 1):.2f} false pages in 10,000."


def _pages(judged: Judgement) -> list[int]:
    return [each.critical_step for each in judged.incidents if each.critical_step is not None]


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", type=Path, help="a page whose table is replaced, between two comments")
    given = parser.parse_args(arguments)
    text = "\n".join(rows(sorted(given.folder.rglob("*.csv.gz"))))
    print(text)
    if given.write is not None:
        write_table(given.write, "real", text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
