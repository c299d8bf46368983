"""Traces and top eigenvalues of all blocks of one model on one batch: sharpwatch and its peers, in turn.

    python -m benchmarks.curvature.run [--models llama gpt2] [--conditions eager sdpa bf16] [--seeds 5]

First every peer's cheapest setting that gets within twice the errors asked of sharpwatch is looked for (and kept in
`.bench`, `--anew` looks again), then all run in rounds, a seed a round, everything in every round. A markdown table for
each model and condition goes to stdout, every number to `.bench/curvature.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.curvature.blocks import parameters_of
from benchmarks.curvature.models import CACHE, NAMES, Batch, batch_of, key, load, split_fused
from benchmarks.curvature.ours import run_sharpwatch
from benchmarks.curvature.outcome import Choice, Outcome, plain, run_peer
from benchmarks.curvature.peers import PEERS, Peer
from benchmarks.curvature.search import Search, recall, remember, search, uniform
from benchmarks.curvature.tables import Row, table
from benchmarks.curvature.truth import BlockTruth, truth_of

CONDITIONS = {
    "eager": ("eager", torch.float32),
    "sdpa": ("sdpa", torch.float32),
    "bf16": ("eager", torch.bfloat16),
}
TRACE, TOP = 0.03, 0.02  # errors asked of sharpwatch; the peers get twice as much
Searches = Mapping[str, tuple[Search, Search]]


@dataclass(frozen=True)
class Subject:
    """What is measured; `split` is what the peers get: the same model, its fused parameters as two each."""

    condition: str
    model: nn.Module
    split: nn.Module
    batch: Batch
    blocks: Mapping[str, list[str]]


def subject(name: str, size: str, condition: str) -> Subject:
    """The trained model as `condition` says."""
    model = load(name, size, *CONDITIONS[condition])
    return Subject(condition, model, split_fused(model), batch_of(size), parameters_of(model))


def choices(name: str, size: str, seeds: int, *, anew: bool) -> Searches:
    """Every peer's cheapest settings, looked for under eager attention."""
    path = CACHE / f"search-{key(name, size)}-{seeds}.json"
    found = {} if anew else recall(path, PEERS)
    of, truth = subject(name, size, "eager"), truth_of(name, size)
    for peer in PEERS:
        if peer.name in found:
            continue
        print(f"# searching {peer.name} on {name}", flush=True)
        if peer.name.endswith("finite_difference") and "hessian-eigenthings" in found:
            found[peer.name] = found["hessian-eigenthings"]  # the same algorithms on other products
        else:
            limits = (2 * TRACE, 2 * TOP)
            found[peer.name] = search(peer, of.split, of.batch, of.blocks, truth, range(1000, 1000 + seeds), limits)
        remember(path, found)
    return found


def contestants(of: Subject, found: Searches, precision: float) -> dict[tuple[str, str], Callable[[int], Outcome]]:
    """What runs in every round, by library and setting."""

    def ours(wanted: float | None) -> Callable[[int], Outcome]:
        return lambda seed: run_sharpwatch(of.model, of.batch, seed, wanted)

    def theirs(peer: Peer, trace: Choice | None, top: Choice | None) -> Callable[[int], Outcome]:
        return lambda seed: run_peer(peer, of.split, of.batch, of.blocks, seed, trace=trace, top=top)

    runs = {
        ("sharpwatch", f"precision={precision:g}"): ours(precision),
        ("sharpwatch", "default (8 draws)"): ours(None),
    }
    for peer in PEERS:
        trace, top = found[peer.name]
        if of.condition == "bf16" and peer.name.startswith("hessian-eigenthings"):
            # Its Hutch++ and Lanczos can't: torch has neither QR nor eigh for bfloat16.
            trace, top = trace.only("hutchinson"), top.only("power iteration")
        first = dict.fromkeys(of.blocks, peer.traces[0][0]), dict.fromkeys(of.blocks, peer.tops[0][0])
        one = uniform(trace.uniform or trace.finest, of.blocks), uniform(top.uniform or top.finest, of.blocks)
        if trace.failed or top.failed:
            runs[peer.name, "any"] = theirs(peer, *first)
            continue
        label = f"{_label(one[0])}; {_label(one[1])}"
        label += "" if trace.uniform and top.uniform else " (its best: not within)"
        runs[peer.name, label] = theirs(peer, *one)
        if trace.by_block and top.by_block:
            runs[peer.name, "each block its own cheapest, by the truth"] = theirs(peer, trace.by_block, top.by_block)
    return runs


def compete(of: Subject, found: Searches, truth: Mapping[str, BlockTruth], precision: float, seeds: int) -> list[Row]:
    """All of them, in rounds."""
    runs = contestants(of, found, precision)
    rows = {which: Row(*which) for which in runs}
    run_sharpwatch(of.model, of.batch, 999, None)  # warm: a first call pays for what it imports and allocates
    for peer in PEERS:
        coarse = dict.fromkeys(of.blocks, peer.traces[0][0]), dict.fromkeys(of.blocks, peer.tops[0][0])
        run_peer(peer, of.split, of.batch, of.blocks, 999, trace=coarse[0], top=coarse[1])
    for seed in range(seeds):
        for which, run in runs.items():
            if not rows[which].outcomes or not rows[which].failed:
                rows[which].outcomes.append(run(seed))
    for row in rows.values():
        row.judge(truth)
    return list(rows.values())


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=["llama", "gpt2"])
    parser.add_argument("--conditions", nargs="+", choices=list(CONDITIONS), default=list(CONDITIONS))
    parser.add_argument("--size", default="small")
    parser.add_argument("--seeds", type=int, default=5, help="rounds")
    parser.add_argument("--search-seeds", type=int, default=5)
    parser.add_argument("--precision", type=float, default=TRACE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--anew", action="store_true", help="look for the peers' settings again")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"# {platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    written = []
    for name in arguments.models:
        truth = truth_of(name, arguments.size)
        found = choices(name, arguments.size, arguments.search_seeds, anew=arguments.anew)
        for condition in arguments.conditions:
            of = subject(name, arguments.size, condition)
            load_before = os.getloadavg()[0]
            rows = compete(of, found, truth, arguments.precision, arguments.seeds)
            busy = f"load {load_before:.1f} before, {os.getloadavg()[0]:.1f} after"
            print(f"\n**{name}, {condition}** ({arguments.seeds} rounds; {busy})\n")
            print(table(rows), flush=True)
            written += [
                {"model": name, "condition": condition, "library": row.library, "setting": row.setting}
                | {"runs": [plain(outcome) for outcome in row.outcomes]}
                for row in rows
            ]
    path = CACHE / "curvature.json"
    path.write_text(json.dumps(written), encoding="utf-8")


def _label(choice: Choice | None) -> str:
    return "none" if choice is None else next(iter(choice.values())).label


if __name__ == "__main__":
    main()
