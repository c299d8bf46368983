"""Count the false alarms of runs that are nothing but noise: python -m benchmarks.faults.noise --steps 200000.

A run of 20 layer blocks trains at a constant learning rate after a warm-up. Its loss, gradient norms, update RMS and
weights stand at a level, with noise of one distribution. Nothing happens in it, so each incident is a false alarm. The
budget is a page in 10,000 steps: of a Poisson number with mean 20, as in 200,000 steps, 32 is the 99 % quantile.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter
from scipy.stats import poisson

from sharpwatch.daemon.detection.run_detection import RunDetection
from sharpwatch.daemon.detection.thresholds import USUAL
from sharpwatch.daemon.records import LayerTap, Observation, OptimizerGroup

Doubles = npt.NDArray[np.float64]
Noise = Callable[[np.random.Generator, int, int], Doubles]

LAYERS, BLOCKS = 4, ("qk", "vo", "ffn", "norm", "moe")
RATE, WARM_UP = 1e-3, 100
PARAMETERS, WEIGHT_NORM = 1_000_000, 20.0  # of a layer block: entries of 0.02
# Standard deviations: of the loss, of log norms, and of a step's change of weights as a share of the most it can do.
LOSS, LOSS_SD, GRADIENT_SD, UPDATE_SD, SHARE_SD = 3.0, 0.05, 0.15, 0.12, 0.02
_PULL = 1e-3  # of weights back to their level in a step, as weight decay does
_SETTINGS = {(0, 0): OptimizerGroup({"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}, None)}


def _filtered(numerator: Sequence[float], denominator: Sequence[float]) -> Noise:
    """Normal noise through a linear filter, scaled to unit variance; its first 200 values are left out."""

    def noise(rng: np.random.Generator, rows: int, columns: int) -> Doubles:
        impulse = np.zeros(1000)
        impulse[0] = 1.0
        sd = np.sqrt((lfilter(numerator, denominator, impulse) ** 2).sum())
        series: Doubles = lfilter(numerator, denominator, rng.standard_normal((rows + 200, columns)), axis=0)
        return series[200:] / sd

    return noise


def _regimes(rng: np.random.Generator, rows: int, columns: int) -> Doubles:
    """Normal noise whose standard deviation changes between 0.7 and 1.5 every 500 rows or so, in all columns."""
    changes = np.cumsum(rng.random(rows) < 1 / 500) % 2
    return rng.standard_normal((rows, columns)) * np.where(changes, 1.5, 0.7)[:, None]


# Each has mean 0 and variance 1, but for the regimes.
DISTRIBUTIONS: Mapping[str, Noise] = {
    "normal": lambda rng, rows, columns: rng.standard_normal((rows, columns)),
    "student-t3": lambda rng, rows, columns: rng.standard_t(3, (rows, columns)) / np.sqrt(3.0),
    "laplace": lambda rng, rows, columns: rng.laplace(0.0, np.sqrt(0.5), (rows, columns)),
    "lognormal": lambda rng, rows, columns: (
        (rng.lognormal(0.0, 1.0, (rows, columns)) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)
    ),
    "uniform": lambda rng, rows, columns: rng.uniform(-np.sqrt(3.0), np.sqrt(3.0), (rows, columns)),
    "exponential": lambda rng, rows, columns: rng.exponential(1.0, (rows, columns)) - 1.0,
    "ar-0.5": _filtered([1.0], [1.0, -0.5]),
    "ar-0.9": _filtered([1.0], [1.0, -0.9]),
    "ma-5": _filtered([1.0] * 5, [1.0]),
    "regimes": _regimes,
}


def correlated(noise: Noise) -> Noise:
    """The same noise, half of whose variance all layer blocks have in common."""

    def shared(rng: np.random.Generator, rows: int, columns: int) -> Doubles:
        return np.sqrt(0.5) * (noise(rng, rows, columns) + noise(rng, rows, 1))

    return shared


def observations(noise: Noise, steps: int, seed: int, weights: Noise | None = None) -> Iterator[Observation]:
    """The steps of a run whose every series is noise about its level; `weights` is that of weights if it differs."""
    rng = np.random.default_rng(seed)
    columns = LAYERS * len(BLOCKS)
    loss = LOSS + LOSS_SD * noise(rng, steps, 1)[:, 0]
    gradient = np.exp(GRADIENT_SD * noise(rng, steps, columns)).astype(np.float32)
    update = np.exp(UPDATE_SD * noise(rng, steps, columns)).astype(np.float32)
    rate = (RATE * np.minimum(np.arange(1, steps + 1) / WARM_UP, 1.0)).astype(np.float32)
    unit = rate[:, None] * np.sqrt(PARAMETERS) / WEIGHT_NORM
    changes = SHARE_SD * unit * (weights or noise)(rng, steps, columns)
    weight = WEIGHT_NORM * np.exp(lfilter([0.0, 1.0], [1.0, _PULL - 1.0], changes, axis=0))
    weight = weight.astype(np.float32)
    ones, zeros = np.ones(columns, dtype=np.float32), np.zeros(columns, dtype=np.int64)
    for i in range(steps):
        layers = LayerTap(
            gradient_norm=gradient[i],
            weight_norm=weight[i],
            update_rms=update[i],
            non_finite=zeros,
            learning_rate=rate[i] * ones,
            lr_multiplier=ones,
            second_moment=ones,
            clip_factor=1.0,
        )
        yield Observation(i + 1, float(i), float(loss[i]), layers, {} if i else _SETTINGS)


@dataclass(slots=True)
class FalseAlarms:
    """The incidents of a run of noise.

    Attributes:
        pages: Number of those that became critical.
        warnings: Number of the others.
        paged_by: How many of the pages each alert and span of samples made.
        longest: Steps that the longest incident was open.
    """

    pages: int = 0
    warnings: int = 0
    paged_by: Counter[str] = field(default_factory=Counter)
    longest: int = 0


def false_alarms(noise: Noise, steps: int, seed: int, weights: Noise | None = None) -> FalseAlarms:
    """Run the detectors over noise."""
    numbers = count()
    names = [(block, f"layers.{layer}") for layer in range(LAYERS) for block in BLOCKS]
    detection = RunDetection("noise", names, np.full(len(names), PARAMETERS), lambda: str(next(numbers)))
    result = FalseAlarms()
    paged: set[str] = set()
    for seen in observations(noise, steps, seed, weights):
        found, changed = detection.see(seen)
        for incident in changed:
            if incident.severity == "critical" and incident.id not in paged:
                paged.add(incident.id)
                sure = [finding for finding in found if finding.severity == "critical"]
                result.paged_by[" ".join([sure[0].name, *re.findall(r"over (\d+) samples", sure[0].evidence)])] += 1
            if not incident.active:
                result.longest = max(result.longest, seen.step - incident.first_step)
    result.pages = len(paged)
    result.warnings = len(detection.incidents.all) - len(paged)
    return result


def bound(steps: int) -> int:
    """The number of pages that a run within the budget exceeds once in a hundred times."""
    return int(poisson.ppf(0.99, USUAL.pages * steps / 10_000))


def main(arguments: Sequence[str]) -> int:
    """Print a table; returns 1 if a distribution has more pages than the budget's bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS))
    parser.add_argument("--normal-weights", action="store_true", help="changes of weights are normal in every run")
    given = parser.parse_args(arguments)
    weights = DISTRIBUTIONS["normal"] if given.normal_weights else None
    most = bound(given.steps)
    print(f"{given.steps} steps each; the bound is {most} pages")
    print(f"{'noise':12} {'blocks':12} {'seed':>4} {'pages':>6} {'warnings':>9} {'longest':>8}  paged by")
    broken = False
    for name in given.only:
        noise = DISTRIBUTIONS[name]
        for blocks, drawn in (("independent", noise), ("correlated", correlated(noise))):
            for seed in given.seeds:
                result = false_alarms(drawn, given.steps, seed, weights)
                broken |= result.pages > most
                by = ", ".join(f"{alert}: {number}" for alert, number in result.paged_by.most_common())
                counts = f"{result.pages:6} {result.warnings:9} {result.longest:8}"
                print(f"{name:12} {blocks:12} {seed:4} {counts}  {by}", flush=True)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
