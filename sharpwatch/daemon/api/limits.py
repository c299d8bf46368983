"""How many connections the daemon takes in, so that none of its own files lacks a descriptor."""

from __future__ import annotations

import resource
from dataclasses import dataclass

# The journal with its WAL, torch, threads' event descriptors, webhooks, and what asyncio accepts in one turn (100).
RESERVED = 256
_MOST_HTTP, _MOST_GRPC = 256, 4_096
_MOST_DESCRIPTORS = 65_536  # asked of the kernel at most
IDLE_SECONDS = 20.0  # of a connection without a whole request: half-open, or kept alive for the next one


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The most connections at a time, by side."""

    http: int
    grpc: int

    @classmethod
    def of(cls, descriptors: int) -> ConnectionLimits:
        """Share the descriptors of a process out.

        Args:
            descriptors: As many as it may have open.
        """
        left = max(descriptors - RESERVED, 32)
        http = min(_MOST_HTTP, left // 4)
        return cls(http, min(_MOST_GRPC, left - http))


def raise_descriptor_limit() -> int:
    """Allow this process the descriptors that its user may have; returns how many it may open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
