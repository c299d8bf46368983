"""What the `gnb` probe of all blocks costs over what it can't do without: one forward, and a backward for each draw.

    python -m benchmarks.curvature.gnb_price [--rounds 15] [--profile]

Both take turns on the same model and batch; the ratio of a round is of neighbours in time, its median is reported. The
models are not trained: time doesn't depend on it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.curvature.models import NAMES, Batch, Size, build
from sharpwatch.curvature.measure.measure import measure

SIZES = {
    "0.5M": Size(width=96, layers=4, heads=4, inner=256, vocabulary=512, length=64, rows=4, steps=0),
    "3M": Size(width=192, layers=6, heads=6, inner=512, vocabulary=2048, length=128, rows=4, steps=0),
    "10M": Size(width=320, layers=8, heads=8, inner=864, vocabulary=4096, length=128, rows=8, steps=0),
}
DRAWS = (4, 8)


@dataclass(frozen=True)
class Price:
    """Seconds of both, medians, and the median of the ratios of neighbours with its quartiles."""

    probe: float
    plain: float
    ratio: float
    low: float
    high: float


def compare(probe: Callable[[], object], plain: Callable[[], object], rounds: int) -> Price:
    """Both in turn."""
    for call in (probe, plain, probe, plain):
        call()
    pairs = [(_seconds(probe), _seconds(plain)) for _ in range(rounds)]
    low, ratio, high = statistics.quantiles([mine / theirs for mine, theirs in pairs], n=4)
    mine, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Price(mine, theirs, ratio, low, high)


def bare(model: nn.Module, batch: Batch, draws: int) -> None:
    """One forward, `draws` backwards."""
    parameters = list(model.parameters())
    loss = model(**batch).loss
    for draw in range(draws):
        torch.autograd.grad(loss, parameters, retain_graph=draw + 1 < draws)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--profile", action="store_true", help="where the time of the probe goes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| model | parameters | tokens | draws | gnb, ms | 1 forward + draws × backward, ms | ratio (quartiles) |")
    print("|---|---|---|---|---|---|---|")
    for size_name in arguments.sizes:
        for name in NAMES:
            size = SIZES[size_name]
            torch.manual_seed(0)
            model = build(name, size, "sdpa").eval()
            ids = torch.randint(size.vocabulary, (size.rows, size.length))
            batch = {"input_ids": ids, "labels": ids}
            for draws in DRAWS:

                def probe(model: nn.Module = model, batch: Batch = batch, draws: int = draws) -> None:
                    measure(model, [batch], estimators=("gnb",), draws=draws)

                def plain(model: nn.Module = model, batch: Batch = batch, draws: int = draws) -> None:
                    bare(model, batch, draws)

                price = compare(probe, plain, arguments.rounds)
                print(
                    f"| {name} | {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M | {ids.numel()} | {draws} "
                    f"| {1e3 * price.probe:.1f} | {1e3 * price.plain:.1f} "
                    f"| {price.ratio:.3f} ({price.low:.3f}–{price.high:.3f}) |",
                    flush=True,
                )
                if arguments.profile:
                    _explain(probe)
    print(f"\nload {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {arguments.threads} threads")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _explain(probe: Callable[[], object]) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        probe()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))


if __name__ == "__main__":
    main()
