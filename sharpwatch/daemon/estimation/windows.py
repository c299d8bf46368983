"""The windows of probes from which estimates are made, and the registration of a kind of probe."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from sharpwatch.blocks import BLOCKS
from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.ingest.hello import RunHello

# docs/log.md has the bias and the coverage of the spectral estimates for windows of 8 probes with 4 draws.
WINDOW_PROBES = 8  # probes that one estimate is made of
WINDOW_ALL_BLOCKS = WINDOW_PROBES * len(BLOCKS)  # where blocks take turns: a full window for each of them
_READING_BYTES = 512  # of a reading without its arrays, roughly

Key = tuple[str, str, str]  # quantity, block ("" for the whole model), estimator
Window = Sequence[tuple[int, Any]]  # (step, reading), oldest first


@dataclass(frozen=True, slots=True, eq=False)
class EstimateRequest:
    """The windows of one run, to be estimated from.

    Attributes:
        hello: The Hello of the run's newest attempt.
        windows: By probe; a probe without a reading has none.
        new_steps: The steps of the readings that no request had whose estimates were made.
    """

    hello: RunHello
    windows: Mapping[str, Window] = field(default_factory=dict)
    new_steps: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Estimates:
    """The estimates of one run.

    Attributes:
        values: By quantity, block and estimator.
        layer_sharpness: One for each layer block of the Hello, or none at all.
        order_correlation: Of the blocks' sharpness with the order that is known of it; None where it is not known.
        failures: By probe, why its window could not be estimated at all.
    """

    values: Mapping[Key, Estimate] = field(default_factory=dict)
    layer_sharpness: tuple[Estimate, ...] = ()
    order_correlation: float | None = None
    failures: Mapping[str, Exception] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, order=True)
class BatchShape:
    """What a window is padded to in a batch with others.

    Attributes:
        size: Numbers of a sketch; windows of different sizes can't be in one batch.
        draws: Of the probe that has the most. Only windows with as many are in one batch, so that none is padded.
        probes: How many.
        traces: Rows of traces [probes, draws].
        sketches: Rows of sketches [probes, draws, size].
    """

    size: int
    draws: int
    probes: int
    traces: int
    sketches: int

    def joined(self, other: BatchShape) -> BatchShape:
        """The shape of both in one batch."""
        probes = max(self.probes, other.probes)
        return BatchShape(self.size, self.draws, probes, self.traces + other.traces, self.sketches + other.sketches)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors: traces in float64, sketches in float32, and their Gram matrices in float64."""
        all_draws = self.probes * self.draws
        return self.traces * all_draws * 8 + self.sketches * all_draws * (4 * self.size + 8 * all_draws)


def ignored(_: str) -> None:
    """Does nothing about a reading that is dropped."""


def _unchanged(reading: Any) -> Any:
    return reading


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingSpec:
    """What the daemon does with the readings of one kind of probe.

    Its decoder has the same name in `sharpwatch.daemon.ingest.probes.DECODERS`; the spec is registered in
    `sharpwatch.daemon.estimation.estimator.PROBES`.

    Attributes:
        name: The probe's name, which is that of its field in a Sample.
        window: How many readings of a run are kept to estimate from; 0 where nothing is estimated.
        estimators: The estimators under which its estimates are shown; a new estimate replaces all of them.
        estimate: Estimates a batch of requests, which all have a window of this probe, on a torch device.
        shape: What a request's window is padded to in a batch; None where each is estimated by itself.
        shown: Returns the fields of a run's snapshot that a single reading sets, by block; None if it sets none.
        without_projection: Returns the part of a reading that stays valid when the sketches' projection changes.
    """

    name: str
    window: int = 0
    estimators: tuple[str, ...] = ()
    estimate: Callable[[Sequence[EstimateRequest], str], list[Estimates]] | None = None
    shape: Callable[[EstimateRequest], BatchShape] | None = None
    shown: Callable[[Any], Mapping[str, tuple[float, ...] | None]] | None = None
    without_projection: Callable[[Any], Any] = _unchanged


class Windows:
    """The newest readings of one run, by probe; bounded in number and in bytes.

    A reading counts as much as the largest of its window, which is what it is padded to when it is estimated. Beyond
    `limit` the largest window loses its oldest readings, but for the newest, which a message bounds.

    Args:
        specs: What there is of probes, by name.
        limit: Bytes of all windows.
        on_cut: Called with the probe of each reading that is dropped for its size.
    """

    def __init__(self, specs: Mapping[str, ReadingSpec], limit: int, on_cut: Callable[[str], None] = ignored) -> None:
        self._specs = specs
        self._limit = limit
        self._on_cut = on_cut
        self._readings: dict[str, deque[tuple[int, Any]]] = {
            name: deque(maxlen=spec.window) for name, spec in specs.items() if spec.window
        }
        self._bytes: dict[str, int] = dict.fromkeys(self._readings, 0)
        self.nbytes = 0  # of all
        self._new: Counter[str] = Counter()  # readings that no request had yet whose estimates were made
        self.cut: Counter[str] = Counter()  # by probe, the readings that were dropped to stay within the limit

    def append(self, probe: str, step: int, reading: Any) -> None:
        """Takes in a reading; one of a probe that is not estimated is not kept."""
        window = self._readings.get(probe)
        if window is None:
            return
        window.append((step, reading))
        self._new[probe] = min(self._new[probe] + 1, len(window))
        self._measure(probe)
        while self.nbytes > self._limit and len(self._readings[self._largest()]) > 1:
            self.drop_oldest()

    def drop_oldest(self) -> None:
        """Drops the oldest reading of the largest window, which must have one."""
        probe = self._largest()
        self._readings[probe].popleft()
        self.cut[probe] += 1
        self._on_cut(probe)
        self._new[probe] = min(self._new[probe], len(self._readings[probe]))
        self._measure(probe)

    def clear(self) -> None:
        """Drops all readings."""
        for probe, window in self._readings.items():
            window.clear()
            self._measure(probe)
        self._new.clear()

    def drop_projection(self) -> None:
        """Drops what depends on the sketches' projection."""
        for probe, window in self._readings.items():
            kept = [(step, self._specs[probe].without_projection(one)) for step, one in window]
            self._readings[probe] = deque(kept, window.maxlen)
            self._measure(probe)

    def request(self, hello: RunHello, probes: Collection[str] | None = None) -> EstimateRequest:
        """Returns the windows of `probes` (None: of all) as they are now; a probe without a reading has none."""
        asked = [name for name, window in self._readings.items() if window and (probes is None or name in probes)]
        windows = {name: tuple(self._readings[name]) for name in asked}
        new = (step for name in asked for step, _ in islice(reversed(windows[name]), self._new[name]))
        return EstimateRequest(hello, windows, frozenset(new))

    def note_taken(self, request: EstimateRequest) -> None:
        """Notes that a request's estimates are made: what it has is new in no later one. No reading came since."""
        for name in request.windows:
            self._new[name] = 0

    def _largest(self) -> str:
        return max(self._bytes, key=self._bytes.__getitem__)

    def _measure(self, probe: str) -> None:
        window, before = self._readings[probe], self._bytes[probe]
        self._bytes[probe] = len(window) * max((_nbytes(reading) for _, reading in window), default=0)
        self.nbytes += self._bytes[probe] - before


def _nbytes(reading: Any) -> int:
    fields = (getattr(reading, name) for name in getattr(reading, "__dataclass_fields__", ()))
    return _READING_BYTES + sum(one.nbytes for one in fields if isinstance(one, np.ndarray))
