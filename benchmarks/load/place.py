"""How runs fall on shards, and what each daemon carries, by the costs of a run that `growth` measured.

Nothing is measured here but the hash: the load of a shard is its runs times what docs/benchmarks.md has of one run.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from sharpwatch.common.shards import shard_of

_MOST_RUNS = 1_000  # live ones that one daemon holds (`daemon.runs.run.MAX_RUNS`)


@dataclass(frozen=True, slots=True)
class Costs:
    """What one run takes of its daemon and of the database: 66 layer blocks, a `gnb` probe at every tenth step.

    Attributes:
        processor_ms: Of the daemon, for each sample.
        memory_kib: Of the daemon.
        disk_bytes: Of the journal, for each sample.
        scrape_s: Of one scrape.
    """

    processor_ms: float = 1.14
    memory_kib: float = 1_106.0
    disk_bytes: float = 7_662.0
    scrape_s: float = 0.32 / 300


def place(runs: int, shards: int, interval: float, costs: Costs | None = None) -> dict[str, Any]:
    """The figures of a placement.

    Args:
        runs: How many runs.
        shards: How many shards.
        interval: Seconds between two samples of a run.
        costs: Of one run.
    """
    costs = costs or Costs()
    names = [f"job-{number % 977}-{number}" for number in range(runs)]
    began = time.process_time()
    placed = [shard_of(name, shards) for name in names]
    hashing = time.process_time() - began
    load = sorted(Counter(placed).values())
    largest, deviation = load[-1], math.sqrt(runs / shards * (1 - 1 / shards))
    more = sum(shard_of(name, shards + 1) != was for name, was in zip(names, placed, strict=True))
    # The largest shard, and the next largest beside it after its daemon has died.
    both = sum(load[-2:])
    return {
        "runs": runs,
        "shards": shards,
        "interval_s": interval,
        "mean": runs / shards,
        "smallest": load[0],
        "largest": largest,
        "largest_deviations": (largest - runs / shards) / deviation,
        "hash_us": 1e6 * hashing / runs,
        "moved_by_a_death": largest / runs,
        "moved_by_one_more": more / runs,
        "moved_by_one_more_expected": 1 / (shards + 1),
        "cores": largest / interval * costs.processor_ms / 1e3,
        "memory_gib": largest * costs.memory_kib / 2**20,
        "scrape_s": largest * costs.scrape_s,
        "cores_of_two": both / interval * costs.processor_ms / 1e3,
        "memory_gib_of_two": both * costs.memory_kib / 2**20,
        "runs_of_two": both,
        "fits": both <= _MOST_RUNS,
        "database_samples_s": runs / interval,
        "database_mb_s": runs / interval * costs.disk_bytes / 1e6,
    }
