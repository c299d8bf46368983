"""Train setups plain and watched, compare, and print a table: python -m benchmarks.setups.run [NAME...]."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.setups.registry import SETUPS, Setup
from benchmarks.setups.trial import Trial
from benchmarks.setups.verdict import Verdict, judge


def verdicts(setup: Setup) -> list[Verdict]:
    """Train `setup` plain and watched; a verdict for each of its models."""
    trials = []
    for watched in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            trials.append(Trial(setup.name, Path(folder), watched=watched))
            setup.train(trials[-1])
    plain, watched_records = (trial.records for trial in trials)
    return [judge(*pair) for pair in zip(plain, watched_records, strict=True)]


def _row(name: str, verdict: Verdict) -> str:
    """The line of the table for one model."""
    answers = [not verdict.refusal, not verdict.unplaced, not verdict.unlike, not verdict.loss]
    cells = [name, *("yes" if each else "NO" for each in answers), verdict.objective or "not named", verdict.traces]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str]) -> int:
    """Print the table, then what is wrong; 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(SETUPS)}; by default all")
    names = parser.parse_args(arguments).names or list(SETUPS)
    torch.set_num_threads(1)
    print(
        "| setup | attached | without a rule | bit-identical | loss shown is stepped on | objective | trace by block |"
    )
    print("|" + " --- |" * 7)
    wrong = []
    for name in names:
        setup = SETUPS[name]
        if setup.missing:
            print(f"| {name} | not run: {', '.join(setup.missing)} not installed |||||| ")
            continue
        started = time.process_time()
        for verdict in verdicts(setup):
            print(_row(name, verdict), flush=True)
            wrong += [f"{name}: {problem}" for problem in verdict.problems()]
        print(f"{name}: {time.process_time() - started:.1f} s of CPU", file=sys.stderr)
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
