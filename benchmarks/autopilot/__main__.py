"""Learning rates from measured curvature against tuned ones: python -m benchmarks.autopilot STAGE --model llama.

Stages, in this order; each cell of a stage is one training, kept as a line in benchmarks/autopilot/results and not made
again:
  constants    each contender's constants, on seeds 100 to 102, 300 steps at two rates
  tune         each contender at six peak rates on seed 200, 600 steps
  judge        each at its best rate, 2,000 steps on seeds 300 to 304
  sensitivity  as tune, at four rates beyond those
  report       the tables of what is there so far

At 1M parameters a step of 256 tokens takes 108 ms of processor time (measured on a busy AMD EPYC with AVX2), a probe 3
steps, the agent in other steps 7 %. For one model that is 0.8 hours of processor time for `constants`, 0.9 for `tune`,
2.3 for `judge` and 0.6 for `sensitivity`; other work on the core makes it longer. Workers share a stage, each with one
thread.

On a GPU (not run on one yet): --device cuda --size gpt2-small --model gpt2, 98M parameters, bfloat16, 8,192 tokens
a step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.autopilot.contenders import CONTENDERS
from benchmarks.autopilot.report import tables
from benchmarks.autopilot.runs import SHAPES, train
from benchmarks.autopilot.stages import STAGES, Results
from benchmarks.faults.training import MODELS


def main(arguments: Sequence[str]) -> int:
    """Train what a stage lacks, or print the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.autopilot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=[*STAGES, "report"])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--size", choices=SHAPES, default="1M")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args(arguments)
    results = Results(given.results, given.model, given.size)
    if given.stage == "report":
        print("\n".join(tables(results)))
        return 0
    cells = list(STAGES[given.stage](results, given.contenders))
    missing = [cell for cell in cells if results.of(cell) is None]
    print(f"{len(missing)} of {len(cells)} cells are to be trained", flush=True)
    spawn = get_context("spawn")
    with ProcessPoolExecutor(given.workers, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in as_completed([pool.submit(train, cell, given.device) for cell in missing]):
            result = done.result()
            results.add(result)
            print(f"{result.cell.name}: {result.loss:.4f}, {result.seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
