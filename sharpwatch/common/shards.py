"""Which of several daemons has a run: rendezvous hashing over shards, and how a daemon says who holds one.

Agents, commands and daemons must come to the same shard, so the hash is part of the protocol and never changes.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass

MAX_SHARDS = 1_024
_SHARD = re.compile(r"(\d{1,4})/(\d{1,4})")
_HELD = re.compile(r"shard \d+ is held by (\S+)")


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` parts of all runs, counted from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard(0, 1)  # all runs


def parse_shard(text: str) -> Shard:
    """Read a shard.

    Args:
        text: INDEX/COUNT, such as 0/4 for the first of four.

    Raises:
        ValueError: It is none; the message says what is valid.
    """
    match = _SHARD.fullmatch(text)
    if match is None or not int(match[1]) < int(match[2]) <= MAX_SHARDS:
        raise ValueError(f"expected INDEX/COUNT with 0 <= INDEX < COUNT <= {MAX_SHARDS}, such as 0/4, got {text!r}")
    return Shard(int(match[1]), int(match[2]))


def shard_order(run: str, count: int) -> list[int]:
    """All shards of `count`, that of a run first; the others in the order in which they come after it.

    This is rendezvous hashing (Thaler and Ravishankar 1998): each shard draws a weight for the run, and the heaviest
    has it. Where one shard more or less takes part, no run moves between the others.
    """
    weights = _weights(run, count)
    return sorted(range(count), key=weights.__getitem__, reverse=True)


def shard_of(run: str, count: int) -> int:
    """The shard of a run among `count`."""
    if count == 1:
        return 0
    weights = _weights(run, count)
    return weights.index(max(weights))


def _weights(run: str, count: int) -> tuple[int, ...]:
    # SHAKE's output for fewer shards is the beginning of that for more: a shard's weight does not depend on `count`.
    drawn = hashlib.shake_128(run.encode(errors="surrogatepass")).digest(8 * count)
    return struct.unpack(f">{count}Q", drawn)


def every_run(run: str) -> bool:
    """For a daemon that holds all runs."""
    del run
    return True


def held_by(shard: int, address: str) -> str:
    """How a daemon says that another one holds a shard; without an address, that it knows of none."""
    return f"shard {shard} is held by {address}" if address else f"shard {shard} is held by no daemon at present"


def holder_in(reason: str) -> str:
    """The address in what `held_by` has said, which stands somewhere in `reason`; empty for none."""
    found = _HELD.search(reason)
    return "" if found is None or found[1] == "no" else found[1]
