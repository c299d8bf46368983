"""The sharpness of a run's blocks: between its probes, against its own level, and in the order of the block types.

A `gnb` probe measures the trace of each layer block's Gauss-Newton matrix. Between two probes the squared norm of the
gradient is known at every step. As a control variate it carries the newest probe on:

    S(t) = S(t₀) · (m(t) / m(t₀))^β

where m is the mean of the squared gradient norm before clipping over the newest steps. β would be 1 if curvature and
squared gradients moved together; measured, they do so by half at most (docs/log.md), and β = 1 is worse than to keep
the newest probe's value. The error is what this prediction has missed the last probes by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sharpwatch.blocks import SHARPNESS_ORDER
from sharpwatch.curvature.statistics.estimate import Estimate, per_parameter
from sharpwatch.daemon.detection.baselines import Level
from sharpwatch.daemon.detection.state import Arrays, gathered, put_back
from sharpwatch.daemon.records import Observation, PairOrder
from sharpwatch.wire import Doubles

# Chosen by the error of predictions over 80 steps, on seeds 0 and 1 (`python -m benchmarks.faults.sharpness`).
EXPONENT, HORIZON = 0.35, 5.0
_MISSED, _MISSED_WEIGHT = 0.25, 2  # mean squared error of a prediction in logs, before it is known, and its weight
_MEMORY = 8  # probes whose prediction errors count
_USUAL_GAP = 80.0  # steps between probes, before two have come
_AT_PROBE, _LONGEST = 0.5, 4.0  # share of the squared error that a probe has itself; gaps after which it grows no more
_ERRORS = 2.0  # standard errors by which two blocks must differ
_TINY = 1e-30
_LARGEST = math.log(1e300)  # of a log trace that is a number


class Sharpness:
    """What is known of the sharpness of one run's L layer blocks and B block types, from its probes and steps.

    Args:
        parameters: The number [L] of parameters of each layer block.
        types: The block type of each.
        exponent: β.
    """

    STATE = ("_mean", "_weight", "_step", "_traces", "_mean_then", "_probed_at", "_gap", "_missed", "_probes")

    def __init__(self, parameters: npt.NDArray[np.int64], types: Sequence[str], exponent: float = EXPONENT) -> None:
        self.blocks = tuple(dict.fromkeys(types))
        self._exponent = exponent
        self._type_of = np.array([self.blocks.index(block) for block in types], dtype=np.int64)
        self._parameters = self._sums(np.asarray(parameters, dtype=np.float64))
        columns = len(types) + len(self.blocks)
        self._mean, self._weight, self._step = np.zeros(columns), 0.0, -1
        self._traces = np.full(columns, np.nan)  # log of the newest probe's
        self._mean_then = np.full(columns, np.nan)  # log of m at that probe
        self._probed_at, self._gap, self._probes = -1, _USUAL_GAP, 0
        self._missed = np.full(columns, _MISSED)
        # A z of 4.5 is a factor of 3 at least.
        self.levels = Level(columns, memory=50, spread_memory=50, blind=10)
        self.order = Order(self.blocks)

    def see(self, seen: Observation, *, keep_out: bool) -> Doubles:
        """Take in a step.

        Args:
            seen: The step; with `traces` where it was probed.
            keep_out: Whether it may not become normal, because something is known to be wrong.

        Returns:
            The z [L + B] of the log traces from the run's own level; empty where not probed, NaN where not known.
        """
        if seen.layers is not None:
            decay = (1 - 1 / HORIZON) ** max(1, seen.step - self._step if self._step >= 0 else 1)
            squares = self._sums(np.square(seen.layers.gradient_norm, dtype=np.float64))
            squares[np.isinf(squares)] = 0.0
            self._mean = decay * self._mean + (1 - decay) * squares
            self._weight = decay * self._weight + 1 - decay
            self._step = seen.step
        if seen.traces is None:
            return np.empty(0)
        return self._probe(seen.step, self._sums(seen.traces.astype(np.float64).mean(0)), keep_out=keep_out)

    def _probe(self, step: int, traces: Doubles, *, keep_out: bool) -> Doubles:
        mean = _log_mean(self._mean, self._weight)
        predicted = _carried_on(self._traces, self._mean_then, mean, self._exponent)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(traces > 0, np.log(traces), np.nan)
            missed = (logs - predicted) ** 2  # NaN where both are infinite
        if self._probes:
            gain = 1.0 / min(self._probes + _MISSED_WEIGHT, _MEMORY)
            # A new array: views have the old one.
            self._missed = self._missed + np.where(np.isfinite(missed), gain * (missed - self._missed), 0.0)
            self._gap += (max(1, step - self._probed_at) - self._gap) / min(self._probes, _MEMORY)
        self._probes += 1
        self._traces, self._mean_then, self._probed_at = logs, mean, step
        count = len(self._type_of)
        errors = np.sqrt(_AT_PROBE * self._missed[count:])
        self.order.see(step, logs[count:] - np.log(self._parameters[count:]), errors)
        return self.levels.see(logs, 0.25, keep_out=keep_out)

    def view(self) -> SharpnessView:
        """What is known now, for readers on other threads."""
        count = len(self._type_of)
        return SharpnessView(
            self.blocks,
            self._parameters[count:],
            (self._mean[count:], self._weight, self._exponent),
            (self._traces[count:], self._mean_then[count:], self._missed[count:]),
            (max(self._step, self._probed_at), self._probed_at, self._gap, self._probes),
            self.order.pairs,
            self.order.holds_since,
        )

    def state(self) -> Arrays:
        """All that `load_state` needs to go on."""
        return {
            **gathered(self, self.STATE, "sharpness"),
            **self.levels.state("sharpness-levels"),
            **gathered(self.order, Order.STATE, "order"),
        }

    def load_state(self, arrays: Arrays) -> None:
        """Go on from `state`; raises `ValueError` for one of other layer blocks."""
        put_back(self, self.STATE, arrays, "sharpness")
        self.levels.load_state(arrays, "sharpness-levels")
        put_back(self.order, Order.STATE, arrays, "order")
        self.order.tell()

    def _sums(self, values: Doubles) -> Doubles:
        """Values [L], NaN for nothing, followed by their sums by block type [B]."""
        sums = np.empty(len(values) + len(self.blocks))
        known = sums[: len(values)]
        known[:] = values
        known[np.isnan(values)] = 0.0
        sums[len(values) :] = np.bincount(self._type_of, known, len(self.blocks))
        return sums


def _log_mean(mean: Doubles, weight: float) -> Doubles:
    with np.errstate(divide="ignore", invalid="ignore"):
        log: Doubles = np.where(mean > _TINY, np.log(mean / weight), np.nan)
    return log


def _carried_on(traces: Doubles, mean_then: Doubles, mean: Doubles, exponent: float) -> Doubles:
    """The log traces by now; where no gradient is known the newest probe's."""
    log: Doubles = traces + np.nan_to_num(exponent * (mean - mean_then))
    return log


@dataclass(frozen=True, slots=True, eq=False)
class SharpnessView:
    """The sharpness of a run's block types at one time; immutable, and computed when it is read.

    Attributes:
        blocks: The block types [B].
        parameters: Their numbers of parameters.
        gradients: Decayed mean [B] of squared gradient norms, its weight, and the exponent β.
        probe: Of the newest probe: log traces [B], log mean then, and the mean squared error of predictions.
        times: The newest step, that of the newest probe, steps between probes, and number of probes.
        order: Neighbours in the order of sharpness that are known to be in order or inverted.
        order_since: The step from which all neighbours stand in that order; None where they do not.
    """

    blocks: tuple[str, ...]
    parameters: Doubles
    gradients: tuple[Doubles, float, float]
    probe: tuple[Doubles, Doubles, Doubles]
    times: tuple[int, int, float, int]
    order: tuple[PairOrder, ...] = ()
    order_since: int | None = None

    def estimates(self) -> Mapping[tuple[str, str, str], Estimate]:
        """Trace and sharpness of each block type, by quantity, block and "moment"; empty before the first probe."""
        step, probed_at, gap, probes = self.times
        if not probes:
            return {}
        mean, weight, exponent = self.gradients
        traces, mean_then, missed = self.probe
        logs = _carried_on(traces, mean_then, _log_mean(mean, weight), exponent)
        grown = _AT_PROBE + (1 - _AT_PROBE) * min((step - probed_at) / max(gap, 1.0), _LONGEST)
        errors = np.sqrt(missed * grown)
        found = {}
        for block, log, error, numel in zip(self.blocks, logs, errors, self.parameters, strict=True):
            if math.isfinite(log) and log < _LARGEST:
                trace = Estimate(math.exp(log), math.exp(log) * float(error), probes, "moment", step)
                found["trace", block, "moment"] = trace
                found["sharpness", block, "moment"] = per_parameter(trace, int(numel))
        return found


class Order:
    """Whether the block types stand in the order of Wang et al. 2025 (arXiv 2502.19002), and since when.

    Two neighbours are in order or inverted once they differ by two standard errors, and stay so until they differ as
    much the other way.

    Args:
        blocks: The block types of the run.

    Attributes:
        pairs: The neighbours that are known to be in order or inverted, the least sharp first.
        holds_since: The step from which all neighbours are in order; None where one is inverted or not known yet.
    """

    STATE = ("_states", "_since", "_z")

    def __init__(self, blocks: Sequence[str]) -> None:
        present = [block for block in SHARPNESS_ORDER if block in blocks]
        self._names = tuple(pairwise(present))
        self._pairs = np.array([[blocks.index(a), blocks.index(b)] for a, b in self._names], dtype=np.int64)
        self._pairs = self._pairs.reshape(-1, 2)
        self._states = np.zeros(len(self._names), dtype=np.int64)  # 1 in order, -1 inverted, 0 not known yet
        self._since = np.zeros(len(self._names), dtype=np.int64)
        self._z = np.full(len(self._names), np.nan)
        self.pairs: tuple[PairOrder, ...] = ()
        self.holds_since: int | None = None

    def see(self, step: int, logs: Doubles, errors: Doubles) -> None:
        """Take in the log sharpness [B] and its standard error."""
        low, high = self._pairs.T
        with np.errstate(invalid="ignore", divide="ignore"):
            self._z = (logs[high] - logs[low]) / np.hypot(errors[high], errors[low])
            new = np.where(self._z > _ERRORS, 1, np.where(self._z < -_ERRORS, -1, self._states))
        self._since = np.where(new == self._states, self._since, step)
        self._states = new
        self.tell()

    def tell(self) -> None:
        """Bring `pairs` and `holds_since` up to the state."""
        self.pairs = tuple(
            PairOrder(low, high, inverted=bool(state < 0), since=int(since), standard_errors=float(z))
            for (low, high), state, since, z in zip(self._names, self._states, self._since, self._z, strict=True)
            if state
        )
        self.holds_since = int(self._since.max()) if self._states.size and (self._states > 0).all() else None
