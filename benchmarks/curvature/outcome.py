"""One run of one library over all blocks: what came out, how long it took, what it passed over the data."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from benchmarks.curvature.counting import Passes, counted
from benchmarks.curvature.models import Batch
from benchmarks.curvature.peers import Peer, Setting, Value
from benchmarks.curvature.truth import BlockTruth

Choice = Mapping[str, Setting]  # by block


@dataclass
class Outcome:
    """`failed` says why there is nothing; `methods` how traces were got, where a library says so."""

    traces: dict[str, Value] = field(default_factory=dict)
    tops: dict[str, Value] = field(default_factory=dict)
    bottoms: dict[str, Value] = field(default_factory=dict)
    methods: set[str] = field(default_factory=set)
    block_passes: dict[str, int] = field(default_factory=dict)
    seconds: float = math.nan
    passes: Passes = field(default_factory=Passes)
    failed: str = ""


def run_peer(  # noqa: PLR0913 - a run is these
    peer: Peer,
    model: nn.Module,
    batch: Batch,
    blocks: Mapping[str, list[str]],
    seed: int,
    *,
    trace: Choice | None = None,
    top: Choice | None = None,
) -> Outcome:
    """The trace and the top eigenvalue of every block, whichever is asked for."""
    outcome = Outcome()
    start = time.perf_counter()
    with counted(model) as outcome.passes, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for block, names in blocks.items():
                before = _total(outcome.passes)
                kept = peer.prepare(model, batch, names)
                if trace is not None:
                    outcome.traces[block] = peer.trace(kept, trace[block], seed)
                if top is not None:
                    outcome.tops[block] = peer.top(kept, top[block], seed)
                del kept
                peer.release(model)
                outcome.block_passes[block] = _total(outcome.passes) - before
        except Exception as error:  # noqa: BLE001 - what a peer can't do is a result
            outcome.failed = reason(error)
            peer.release(model)
    outcome.seconds = time.perf_counter() - start
    return outcome


def reason(error: Exception) -> str:
    """The first sentence of an error, short enough for a cell."""
    text = " ".join(str(error).split()).split(". ")[0]
    return f"{type(error).__name__}: {text[:110]}{'…' if len(text) > 110 else ''}"


def relative(found: Sequence[float], truth: float) -> float:
    """The root mean square of the relative errors."""
    return math.sqrt(sum((value / truth - 1) ** 2 for value in found) / len(found))


def top_error(found: Sequence[float], truth: BlockTruth) -> tuple[float, bool]:
    """The relative error of λ_max, and whether a run took the negative end for it.

    Then the error is against that end: the wrong end is marked, and not held against a library's speed.
    """
    errors, negative = [], False
    for value in found:
        end = truth.bottom if value < 0 else truth.top
        negative |= value < 0
        errors.append(value / end)
    return relative(errors, 1.0), negative


def coverage(found: Sequence[tuple[Value, float]]) -> dict[int, float] | None:
    """The share of values within 1, 2 and 4 stated standard errors of their truth; None where none is stated."""
    stated = [(value.value, value.stderr, truth) for value, truth in found if value.stderr is not None]
    if not stated:
        return None
    return {
        width: sum(abs(value - truth) <= width * stderr for value, stderr, truth in stated) / len(stated)
        for width in (1, 2, 4)
    }


def plain(outcome: Outcome) -> dict[str, Any]:
    """For JSON."""
    return {
        "seconds": outcome.seconds,
        "forwards": outcome.passes.forwards,
        "backwards": outcome.passes.backwards,
        "vectors": outcome.passes.vectors,
        "traces": {block: list(value) for block, value in outcome.traces.items()},
        "tops": {block: list(value) for block, value in outcome.tops.items()},
        "bottoms": {block: list(value) for block, value in outcome.bottoms.items()},
        "block_passes": outcome.block_passes,
        "methods": sorted(outcome.methods),
        "failed": outcome.failed,
    }


def _total(passes: Passes) -> int:
    return passes.forwards + passes.vectors
