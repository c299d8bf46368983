"""The largest values of a run's last minute, so that a spike of one step does not fall between two scrapes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sharpwatch.daemon.ingest.samples import BlockTap
from sharpwatch.wire import Doubles

WINDOW = 60.0  # seconds that are covered at least: Prometheus' default scrape interval
_BUCKET = 5.0  # seconds; up to so much more is covered
_BUCKETS = int(WINDOW / _BUCKET) + 1


@dataclass(frozen=True, slots=True, eq=False)
class Maxima:
    """The largest values of the minute up to the newest sample, by block type [B]; NaN where nothing was measured."""

    loss: float
    gradient_norm: Doubles
    update_rms: Doubles


class RecentMaxima:
    """Keeps maxima in a ring of buckets; its size depends on the number of block types alone.

    Reading changes nothing, so that several Prometheus servers see the same. The window ends at the newest sample and
    not at the present time: a run whose steps take minutes always has a maximum.

    Args:
        blocks: Number of block types.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._rows = np.full((_BUCKETS, 2 * blocks + 1), np.nan)
        self._newest = 0  # number of the newest bucket since 1970

    def see(self, tap: BlockTap | None, loss: float | None, now: float) -> None:
        """Take in a sample; `now` is unix seconds, and a clock that is set back counts as one that stands."""
        bucket = int(now // _BUCKET)
        passed = min(max(0, bucket - self._newest), _BUCKETS)
        self._newest = max(self._newest, bucket)
        for i in range(passed):
            self._rows[(self._newest - i) % _BUCKETS] = np.nan
        row = self._rows[self._newest % _BUCKETS]
        if tap is not None:
            np.fmax(row[: self._blocks], tap.gradient_norm, out=row[: self._blocks])
            np.fmax(row[self._blocks : -1], tap.update_rms, out=row[self._blocks : -1])
        if loss is not None:
            row[-1] = np.fmax(row[-1], loss)

    @property
    def present(self) -> Maxima:
        """The maxima as they are now."""
        largest = np.fmax.reduce(self._rows, axis=0)
        return Maxima(float(largest[-1]), largest[: self._blocks], largest[self._blocks : -1])
