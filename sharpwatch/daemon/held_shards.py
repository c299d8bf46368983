"""Which runs this daemon has: those of its own shard, and of shards whose daemons are gone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sharpwatch.common.shards import WHOLE, Shard, held_by, shard_of
from sharpwatch.errors import NotHeldError


@dataclass(frozen=True, slots=True)
class Since:
    """When a daemon began to hold a shard: in unix and in monotonic seconds."""

    unix: float
    monotonic: float


class HeldShards:
    """The shards whose runs this daemon serves, and who serves the others.

    Args:
        own: The daemon's own shard.

    Attributes:
        address: Where agents reach this daemon, once it serves.
    """

    def __init__(self, own: Shard = WHOLE) -> None:
        self.own = own
        self.address = ""
        self._since: dict[int, Since] = {}
        self.add(own.index)
        self._addresses: Mapping[int, str] = {}

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._since))

    def is_held(self, shard: int) -> bool:
        """Whether this daemon holds a shard."""
        return shard in self._since

    def add(self, shard: int) -> None:
        """Serves a shard from now on."""
        self._since[shard] = Since(time.time(), time.monotonic())

    def remove(self, shard: int) -> None:
        """Serves a shard no more."""
        del self._since[shard]

    def others_are_at(self, addresses: Mapping[int, str]) -> None:
        """Notes where agents reach those that hold other shards; empty for a shard that nobody holds."""
        self._addresses = addresses

    def holds(self, run: str) -> bool:
        """Whether a run is of a shard that this daemon holds."""
        return self.own.count == 1 or shard_of(run, self.own.count) in self._since

    def check(self, run: str) -> Since:
        """Returns since when this daemon holds the shard of a run.

        Raises:
            NotHeldError: It does not.
        """
        shard = shard_of(run, self.own.count)
        if shard not in self._since:
            raise NotHeldError(f"run {run}: {held_by(shard, self._addresses.get(shard, ''))}")
        return self._since[shard]
