"""Where the processor time of a sample goes in the daemon: python -m benchmarks.load.stages [--samples 1500].

One run of 66 layer blocks whose samples go through the daemon's own functions, one after the other on one thread: taps
alone, then each with a gnb probe of four draws. Printed are milliseconds of processor time a sample, stage by stage.
Without the transport, which `benchmarks.load tilt` has as the bare server's, and without what tasks and queues take.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.load.messages import body, hello, request
from sharpwatch.daemon.app import _controller
from sharpwatch.daemon.config.settings import Config
from sharpwatch.daemon.decisions.gate import no_gate
from sharpwatch.daemon.decisions.muting import Silences
from sharpwatch.daemon.estimation.estimator import estimate_all
from sharpwatch.daemon.ingest.hello import Attempt, read_hello
from sharpwatch.daemon.ingest.samples import read_sample
from sharpwatch.daemon.runs.run import Run
from sharpwatch.daemon.storage.journal import Journal
from sharpwatch.daemon.storage.schema import PendingWrites, SampleRow
from sharpwatch.v1 import agent_pb2

_YOUNG = 300  # samples that are not counted
_TOGETHER = 16  # samples in a transaction


def stages(samples: int, *, gnb: bool) -> dict[str, float]:
    """The milliseconds of each stage, of a sample."""
    random = np.random.default_rng(0)
    told = read_hello(agent_pb2.SessionRequest.FromString(hello("run", "host")).hello)
    run = Run(Attempt(told, b""), _controller(Config(), Silences(), no_gate, told, None), now=time.time())
    bodies = [body(random, gnb=gnb) for _ in range(64)]
    spent: dict[str, float] = defaultdict(float)

    def timed(stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        began = time.thread_time()
        result = function(*arguments)
        spent[stage] += time.thread_time() - began
        return result

    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(f"sqlite:///{Path(folder) / 'journal.db'}", retain_samples=10_000)
        rows: list[SampleRow] = []
        for step in range(1, _YOUNG + samples + 1):
            if step == _YOUNG + 1:
                spent.clear()
            message, now = request(step, time.time_ns(), bodies[step % len(bodies)]), time.time()
            sample = timed("parse", agent_pb2.SessionRequest.FromString, message).sample
            reading = timed("check and read", read_sample, told, sample)
            observation = timed("windows and maxima", run.update, reading, now, now)
            timed("detect and decide", run.controller.observe, observation, now)
            if gnb:
                wanted = run.request(("gnb",))
                run.take_estimates(wanted, timed("estimate", estimate_all, [wanted], "cpu")[0])
            timed("snapshot", run.publish)
            rows.append(SampleRow("run", told.attempt, step, step, message, now, closing=False))
            if len(rows) == _TOGETHER:
                timed("journal", journal.write, PendingWrites(), rows)
                rows.clear()
        journal.close()
    return {stage: 1e3 * seconds / samples for stage, seconds in spent.items()}


def main(arguments: Sequence[str]) -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_500)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    taps, probed = stages(given.samples, gnb=False), stages(given.samples, gnb=True)
    print("| stage | tap, ms | gnb, ms |")
    print("|---|---|---|")
    for stage in probed:
        print(f"| {stage} | {taps.get(stage, 0.0):.3f} | {probed[stage]:.3f} |")
    print(f"| all | {sum(taps.values()):.3f} | {sum(probed.values()):.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
