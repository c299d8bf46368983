"""The windows of probes from which estimates are made, and the registration of a kind of probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sharpwatch.blocks import BLOCKS
from sharpwatch.curvature.statistics.estimate import Estimate
from sharpwatch.daemon.ingest.hello import RunHello

# docs/log.md has the bias and the coverage of the spectral estimates for windows of 8 probes with 4 draws.
WINDOW_PROBES = 8  # probes that one estimate is made of
WINDOW_ALL_BLOCKS = WINDOW_PROBES * len(BLOCKS)  # where blocks take turns: a full window for each of them

Key = tuple[str, str, str]  # quantity, block ("" for the whole model), estimator
Window = Sequence[tuple[int, Any]]  # (step, reading), oldest first


@dataclass(frozen=True, slots=True, eq=False)
class EstimateRequest:
    """The windows of one run, to be estimated from.

    Attributes:
        hello: The Hello of the run's newest attempt.
        windows: By probe; a probe without a reading has none.
        step: The newest step in any of the windows.
    """

    hello: RunHello
    windows: Mapping[str, Window] = field(default_factory=dict)
    step: int = 0


@dataclass(frozen=True, slots=True)
class Estimates:
    """The estimates of one run; `layer_sharpness` has one for each layer block of the Hello, or none at all."""

    values: Mapping[Key, Estimate] = field(default_factory=dict)
    layer_sharpness: tuple[Estimate, ...] = ()
    order_correlation: float | None = None


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
        shown: Returns the fields of a run's snapshot that a single reading sets, by block; None if it sets none.
        without_projection: Returns the part of a reading that stays valid when the sketches' projection changes.
    """

    name: str
    window: int = 0
    estimators: tuple[str, ...] = ()
    estimate: Callable[[Sequence[EstimateRequest], str], list[Estimates]] | None = None
    shown: Callable[[Any], Mapping[str, tuple[float, ...] | None]] | None = None
    without_projection: Callable[[Any], Any] = _unchanged
