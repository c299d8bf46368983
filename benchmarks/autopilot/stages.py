"""The stages of the benchmark: which cells each has, and what the next one takes from their results.

Constants are chosen on seeds of their own, rates on another, and both are judged on five more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

from benchmarks.autopilot.contenders import CONTENDERS
from benchmarks.autopilot.runs import Cell, Result

CONSTANT_SEEDS, CONSTANT_STEPS, CONSTANT_RATES = (100, 101, 102), 300, (0.0007, 0.0014)
TUNING_SEED, TUNING_STEPS = 200, 600
RATES = (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008)
OTHER_RATES = (3.2e-5, 9e-5, 0.016, 0.032)  # with RATES, three decades
JUDGING_SEEDS, JUDGING_STEPS = (300, 301, 302, 303, 304), 2000


class Results:
    """What was trained so far of a model: a line of JSON for each training, so that a stage goes on where it stopped.

    Args:
        folder: Where the file of the model is.
        model: "llama" or "gpt2".
        size: Its size.
    """

    def __init__(self, folder: Path, model: str, size: str) -> None:
        self.model, self.size = model, size
        self._path = folder / f"{model}-{size}.jsonl"
        self._kept: dict[Cell, Result] = {}
        if self._path.exists():
            with self._path.open(encoding="utf-8") as lines:
                for line in lines:
                    kept = json.loads(line)
                    cell = Cell(**kept.pop("cell"))
                    self._kept[cell] = Result(cell, **kept)

    def of(self, cell: Cell) -> Result | None:
        """The result of a cell; None where it was not trained."""
        return self._kept.get(cell)

    def add(self, result: Result) -> None:
        """Keep a result."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(result)) + "\n")
        self._kept[result.cell] = result

    def constant(self, contender: str) -> str | None:
        """The constant whose mean loss over the seeds is least at its better rate; None where some are missing."""
        constants = CONTENDERS[contender].constants
        if len(constants) == 1:
            return constants[0]
        means = {each: self._mean_at_best(contender, each) for each in constants}
        return None if None in means.values() else min(constants, key=lambda each: means[each] or 0.0)

    def _mean_at_best(self, contender: str, constant: str) -> float | None:
        means = []
        for rate in CONSTANT_RATES:
            cells = [self.cell(contender, constant, rate, seed, CONSTANT_STEPS) for seed in CONSTANT_SEEDS]
            found = [one for cell in cells if (one := self.of(cell)) is not None]
            if len(found) < len(cells):
                return None
            means.append(fmean(one.loss for one in found))
        return min(means)

    def swept(self, contender: str, rates: Sequence[float] = RATES) -> dict[float, Result]:
        """The results of a contender on the tuning seed, by rate; those that are missing are left out."""
        constant = self.constant(contender)
        if constant is None:
            return {}
        cells = {rate: self.cell(contender, constant, rate, TUNING_SEED, TUNING_STEPS) for rate in sorted(rates)}
        return {rate: one for rate, cell in cells.items() if (one := self.of(cell)) is not None}

    def rate(self, contender: str) -> float | None:
        """The rate of the least loss on the tuning seed; None where some are missing."""
        swept = self.swept(contender)
        return min(swept, key=lambda rate: swept[rate].loss) if len(swept) == len(RATES) else None

    def judged(self, contender: str) -> dict[int, Result]:
        """The results of a contender on the judging seeds, by seed; those that are missing are left out."""
        constant, rate = self.constant(contender), self.rate(contender)
        if constant is None or rate is None:
            return {}
        cells = {seed: self.cell(contender, constant, rate, seed, JUDGING_STEPS) for seed in JUDGING_SEEDS}
        return {seed: one for seed, cell in cells.items() if (one := self.of(cell)) is not None}

    def cell(self, contender: str, constant: str, rate: float, seed: int, steps: int) -> Cell:
        """A cell of this model and size."""
        return Cell(self.model, self.size, contender, constant, rate, seed, steps)


def constants(results: Results, names: Sequence[str]) -> Iterator[Cell]:
    """Each constant of each contender that has several, at two rates on three seeds."""
    for seed in CONSTANT_SEEDS:
        for name in names:
            of_name = CONTENDERS[name].constants
            for constant in of_name if len(of_name) > 1 else ():
                for rate in CONSTANT_RATES:
                    yield results.cell(name, constant, rate, seed, CONSTANT_STEPS)


def tune(results: Results, names: Sequence[str]) -> Iterator[Cell]:
    """Each contender at six rates, with the constant that was chosen."""
    for rate in RATES:
        for name in names:
            yield results.cell(name, _chosen(results, name), rate, TUNING_SEED, TUNING_STEPS)


def sensitivity(results: Results, names: Sequence[str]) -> Iterator[Cell]:
    """Each contender at rates beyond those, for the loss that a wrong rate costs."""
    for cell in tune(results, names):
        if cell.rate == RATES[0]:
            for rate in OTHER_RATES:
                yield replace(cell, rate=rate)


def judge(results: Results, names: Sequence[str]) -> Iterator[Cell]:
    """Each contender at its best rate, seed by seed."""
    for seed in JUDGING_SEEDS:
        for name in names:
            rate = results.rate(name)
            if rate is None:
                raise SystemExit(f"{name} is not tuned for {results.model} {results.size}: run `tune` first")
            yield results.cell(name, _chosen(results, name), rate, seed, JUDGING_STEPS)


STAGES: dict[str, Callable[[Results, Sequence[str]], Iterable[Cell]]] = {
    "constants": constants,
    "tune": tune,
    "judge": judge,
    "sensitivity": sensitivity,
}


def lost_by_rate(swept: dict[float, Result]) -> float:
    """E[min(loss, initial loss) - least loss] over the logarithm of the rate, by trapezes (arXiv 2309.14322)."""
    rates = sorted(swept)
    least = min(one.loss for one in swept.values())
    lost = [min(swept[rate].loss, swept[rate].initial) - least for rate in rates]
    logs = [math.log(rate) for rate in rates]
    area = sum((b - a) * (x + y) / 2 for a, b, x, y in zip(logs, logs[1:], lost, lost[1:], strict=False))
    return area / (logs[-1] - logs[0])


def _chosen(results: Results, contender: str) -> str:
    constant = results.constant(contender)
    if constant is None:
        raise SystemExit(f"the constant of {contender} is not chosen for {results.model}: run `constants` first")
    return constant
