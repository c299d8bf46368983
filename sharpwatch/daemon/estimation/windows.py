"""What is kept of a run's probes, and under which names their estimates go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sharpwatch.blocks import BLOCKS
from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.probes import (
    DirectionReading,
    GnbReading,
    HutchinsonReading,
    LanczosReading,
    LineSearchReading,
    PreconditionedReading,
)

WINDOW_PROBES = 8  # that one estimate is made of
_EACH = WINDOW_PROBES * len(BLOCKS)  # where blocks take turns: as many hold a full window of each
LENGTHS: Mapping[str, int] = {
    "gnb": WINDOW_PROBES,
    "direction": _EACH,
    "hutchinson": _EACH,
    "lanczos": _EACH + WINDOW_PROBES,  # the whole model has turns too
    "linesearch": _EACH,
    "preconditioned": WINDOW_PROBES,
}
# Estimators by the probe that their estimates are made of, in the order in which they are shown.
ESTIMATORS: Mapping[str, Sequence[str]] = {
    "gnb": ("gnb", "gnb_upper_bound"),
    "direction": ("direction",),
    "hutchinson": ("hutchinson",),
    "lanczos": ("lanczos",),
    "linesearch": ("linesearch",),
    "preconditioned": ("preconditioned",),
}
Key = tuple[str, str, str]  # quantity, block ("" for the whole model), estimator


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One run's windows: probes with the steps they were taken at, oldest first."""

    manifest: RunHello
    gnb: tuple[tuple[int, GnbReading], ...] = ()
    direction: tuple[tuple[int, DirectionReading], ...] = ()
    hutchinson: tuple[tuple[int, HutchinsonReading], ...] = ()
    lanczos: tuple[tuple[int, LanczosReading], ...] = ()
    linesearch: tuple[tuple[int, LineSearchReading], ...] = ()
    preconditioned: tuple[tuple[int, PreconditionedReading], ...] = ()

    @property
    def probes(self) -> tuple[str, ...]:
        """The probes that there are windows of."""
        return tuple(probe for probe in LENGTHS if getattr(self, probe))

    @property
    def step(self) -> int:
        """The newest step in any of the windows."""
        return max((getattr(self, probe)[-1][0] for probe in self.probes), default=0)
