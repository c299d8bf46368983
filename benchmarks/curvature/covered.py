"""Do stated errors cover the truth? On tiny models, whose blocks' Hessians are known exactly, over many seeds.

python -m benchmarks.curvature.covered [--seeds 40]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch

from benchmarks.curvature.blocks import parameters_of
from benchmarks.curvature.models import NAMES, batch_of, load, split_fused
from benchmarks.curvature.ours import run_gnb, run_sharpwatch
from benchmarks.curvature.outcome import Outcome, coverage, relative, run_peer
from benchmarks.curvature.peers import EigenthingsPeer, Setting
from benchmarks.curvature.truth import gauss_newton_of, truth_of

_HEAD = (
    "model",
    "library",
    "of",
    "setting",
    "RMS error, worst block",
    "within 1 s.e.",
    "2",
    "4",
    "worst block within 2",
)


def main() -> None:
    """Print a table; a normal distribution has 0.68, 0.95 and 1.00."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"| {' | '.join(_HEAD)} |\n|{'---|' * len(_HEAD)}", flush=True)
    for name in NAMES:
        for library, of, setting, known, run in contestants(name):
            outcomes = [run(seed) for seed in range(arguments.seeds)]
            print(f"| {name} | {library} | {of} | {setting} | {_cells(outcomes, known)} |", flush=True)


def contestants(name: str) -> list[tuple[str, str, str, Mapping[str, float], Callable[[int], Outcome]]]:
    """Library, quantity, setting, the truth of it by block, and a run; of the peers only one states an error."""
    model, batch = load(name, "tiny"), batch_of("tiny")
    split, blocks, peer = split_fused(model), parameters_of(model), EigenthingsPeer()
    truth = {block: known.trace for block, known in truth_of(name, "tiny").items()}
    gauss_newton = {block: value for block, (value, _) in gauss_newton_of(name, "tiny").items()}

    def theirs(method: str) -> Callable[[int], Outcome]:
        setting = dict.fromkeys(blocks, Setting(method, {"method": method, "num_matvecs": 33}))
        return lambda seed: run_peer(peer, split, batch, blocks, seed, trace=setting)

    return [
        ("sharpwatch", "Tr G", "gnb, 8 draws", gauss_newton, lambda seed: run_gnb(model, batch, seed, 8)),
        ("sharpwatch", "Tr H", "8 draws", truth, lambda seed: run_sharpwatch(model, batch, seed, None)),
        ("sharpwatch", "Tr H", "precision=0.03", truth, lambda seed: run_sharpwatch(model, batch, seed, 0.03)),
        (peer.name, "Tr H", "hutchinson, 33 draws", truth, theirs("hutchinson")),
        (peer.name, "Tr H", "hutch++, 33 products", truth, theirs("hutch++")),
    ]


def _cells(outcomes: list[Outcome], truth: Mapping[str, float]) -> str:
    pairs = {block: [(outcome.traces[block], truth[block]) for outcome in outcomes] for block in truth}
    errors = {block: relative([found.value for found, _ in some], truth[block]) for block, some in pairs.items()}
    each = {block: coverage(some) or {} for block, some in pairs.items()}
    whole = coverage([pair for some in pairs.values() for pair in some]) or {}
    wide = max(errors, key=lambda block: errors[block])
    least = min(each, key=lambda block: each[block][2])
    cells = [
        f"{errors[wide]:.1%} {wide}",
        *(f"{share:.2f}" for share in whole.values()),
        f"{each[least][2]:.2f} {least}",
    ]
    return " | ".join(cells)


if __name__ == "__main__":
    main()
