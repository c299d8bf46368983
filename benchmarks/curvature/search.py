"""Finds the cheapest setting of each peer that gets within the errors allowed to it.

Every method goes from coarse to fine until all blocks are within; cost is counted in passes, so that a busy machine
doesn't choose. Two choices: one setting for all blocks, and for each block its own, which only somebody who knows the
truth could make. Both are the peers' best case: the errors that chose are not looked at again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from benchmarks.curvature.models import Batch
from benchmarks.curvature.outcome import Choice, Outcome, relative, run_peer, top_error
from benchmarks.curvature.peers import Family, Peer, Setting
from benchmarks.curvature.truth import BlockTruth

Errors = Mapping[str, float]  # by block


@dataclass
class Tried:
    """One setting on all blocks over several seeds."""

    setting: Setting
    errors: dict[str, float]
    cost: dict[str, float]  # passes, by block

    def within(self, limit: float) -> bool:
        """Whether every block is."""
        return max(self.errors.values()) <= limit


@dataclass
class Search:
    """What was found for one quantity of one peer; None where nothing got within."""

    tried: list[Tried]
    limit: float
    failed: str = ""

    @property
    def uniform(self) -> Setting | None:
        """The cheapest setting with all blocks within."""
        good = [tried for tried in self.tried if tried.within(self.limit)]
        return min(good, key=lambda tried: sum(tried.cost.values())).setting if good else None

    @property
    def by_block(self) -> dict[str, Setting] | None:
        """For each block the cheapest setting that gets it within."""
        chosen: dict[str, Setting] = {}
        for block in self.tried[0].errors if self.tried else ():
            good = [tried for tried in self.tried if tried.errors[block] <= self.limit]
            if not good:
                return None
            chosen[block] = min(good, key=lambda tried, block=block: tried.cost[block]).setting
        return chosen or None

    def only(self, method: str) -> Search:
        """Of the settings of one method."""
        return Search([tried for tried in self.tried if tried.setting.label.startswith(method)], self.limit)

    @property
    def finest(self) -> Setting | None:
        """What to show where nothing got within: the setting whose worst block is best."""
        return min(self.tried, key=lambda tried: max(tried.errors.values())).setting if self.tried else None


def search(  # noqa: PLR0913, PLR0917 - what is searched where
    peer: Peer,
    model: nn.Module,
    batch: Batch,
    blocks: Mapping[str, list[str]],
    truth: Mapping[str, BlockTruth],
    seeds: Sequence[int],
    limits: tuple[float, float],
) -> tuple[Search, Search]:
    """For the trace and for λ_max; stops at the first thing that the peer can't do."""

    def trace(setting: Setting, seed: int) -> Outcome:
        return run_peer(peer, model, batch, blocks, seed, trace=dict.fromkeys(blocks, setting))

    def top(setting: Setting, seed: int) -> Outcome:
        return run_peer(peer, model, batch, blocks, seed, top=dict.fromkeys(blocks, setting))

    def trace_errors(runs: Sequence[Outcome]) -> dict[str, float]:
        return {block: relative([run.traces[block].value for run in runs], truth[block].trace) for block in blocks}

    def top_errors(runs: Sequence[Outcome]) -> dict[str, float]:
        return {block: top_error([run.tops[block].value for run in runs], truth[block])[0] for block in blocks}

    return (
        _one(peer.traces, trace, trace_errors, seeds, limits[0]),
        _one(peer.tops, top, top_errors, seeds, limits[1]),
    )


def _one(
    families: Sequence[Family],
    run: Callable[[Setting, int], Outcome],
    errors: Callable[[Sequence[Outcome]], dict[str, float]],
    seeds: Sequence[int],
    limit: float,
) -> Search:
    found = Search([], limit)
    for family in families:
        for setting in family:
            runs = []
            for seed in seeds:
                runs.append(run(setting, seed))
                if runs[-1].failed:
                    found.failed = runs[-1].failed
                    return found
            cost = {
                block: statistics.mean(outcome.block_passes[block] for outcome in runs)
                for block in runs[0].block_passes
            }
            found.tried.append(Tried(setting, errors(runs), cost))
            worst = max(found.tried[-1].errors.values())
            print(f"#   {setting.label}: worst block {worst:.1%}, {sum(cost.values()):.0f} passes", flush=True)
            if worst <= limit:
                break
    return found


def remember(path: Path, found: Mapping[str, tuple[Search, Search]]) -> None:
    """Write what was searched, by peer."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({name: [_plain(one) for one in pair] for name, pair in found.items()}, indent=1))


def recall(path: Path, peers: Sequence[Peer]) -> dict[str, tuple[Search, Search]]:
    """What `remember` wrote of `peers`."""
    written = json.loads(path.read_text()) if path.exists() else {}
    settings = {
        peer.name: {setting.label: setting for family in (*peer.traces, *peer.tops) for setting in family}
        for peer in peers
    }
    found = {}
    for name in settings.keys() & written.keys():
        trace, top = (
            Search(
                [Tried(settings[name][row["setting"]], row["errors"], row["cost"]) for row in one["tried"]],
                one["limit"],
                one["failed"],
            )
            for one in written[name]
        )
        found[name] = (trace, top)
    return found


def _plain(found: Search) -> dict[str, object]:
    rows = [{"setting": t.setting.label, "errors": t.errors, "cost": t.cost} for t in found.tried]
    return {"limit": found.limit, "failed": found.failed, "tried": rows}


def uniform(setting: Setting | None, blocks: Mapping[str, list[str]]) -> Choice | None:
    """The same for all blocks."""
    return None if setting is None else dict.fromkeys(blocks, setting)
