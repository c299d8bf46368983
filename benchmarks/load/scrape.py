"""What a scrape takes: python -m benchmarks.load.scrape --runs 1000 [--rounds 5].

Runs of 66 layer blocks, made as the daemon makes them from samples of simulated agents. They are rendered in turn, by
one process and from the same snapshots: by `Exposition`, and by `generate_latest` of prometheus_client from families
that are ready-made. Processor time of the rendering thread, and how long a thread beside it that wants the interpreter
500 times a second has waited for it. The bodies must be equal.

`stepped`: every run has had a sample since the last scrape. `probed`: and a gnb probe, after which nearly every number
is another. `same`: none has had any.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest

from benchmarks.load.messages import body, hello, request
from sharpwatch.daemon.app import _controller
from sharpwatch.daemon.config.settings import Config
from sharpwatch.daemon.decisions.gate import no_gate
from sharpwatch.daemon.decisions.muting import Silences
from sharpwatch.daemon.estimation.estimator import estimate_all
from sharpwatch.daemon.exporter.metrics import Exposition, RunCollector, _Families
from sharpwatch.daemon.ingest.hello import Attempt, read_hello
from sharpwatch.daemon.ingest.samples import read_sample
from sharpwatch.daemon.runs.run import Run
from sharpwatch.v1 import agent_pb2

_PROBES = 3  # of each run, before the first scrape


class Feed:
    """Runs, and samples for them."""

    def __init__(self, count: int) -> None:
        self._random = np.random.default_rng(0)
        self._step = 0
        self.runs = []
        for number in range(count):
            message = agent_pb2.SessionRequest.FromString(hello(f"pretrain-{number}", "host")).hello
            told = read_hello(message)
            controller = _controller(Config(), Silences(), no_gate, told, None)
            self.runs.append(Run(Attempt(told, b""), controller, now=time.time()))
            self.runs[-1].publish(phase="running")

    def step(self, *, gnb: bool) -> None:
        """Gives each run a sample of its own."""
        self._step += 1
        for run in self.runs:
            message = request(self._step, time.time_ns(), body(self._random, gnb=gnb))
            sample = agent_pb2.SessionRequest.FromString(message).sample
            observation = run.update(read_sample(run.attempt.hello, sample), time.time(), time.monotonic())
            if observation is not None:
                run.controller.observe(observation, time.time())
            if gnb:
                wanted = run.request(("gnb",))
                run.take_estimates(wanted, estimate_all([wanted], "cpu")[0])
            run.publish()


@contextmanager
def waiting() -> Iterator[list[float]]:
    """Notes by how many seconds a thread that sleeps 2 ms again and again wakes too late."""
    late: list[float] = []
    over = threading.Event()

    def wait() -> None:
        while not over.is_set():
            began = time.perf_counter()
            time.sleep(0.002)
            late.append(time.perf_counter() - began - 0.002)

    thread = threading.Thread(target=wait)
    thread.start()
    yield late
    over.set()
    thread.join()


def timed(render: Callable[[], bytes]) -> tuple[bytes, float, float, float]:
    """Renders once; returns the body, the processor seconds, the seconds, and the longest wait of the other thread."""
    with waiting() as late:
        began, processor = time.perf_counter(), time.thread_time()
        rendered = render()
        passed, processor = time.perf_counter() - began, time.thread_time() - processor
    return rendered, processor, passed, max(late)


def main(arguments: Sequence[str]) -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    feed = Feed(given.runs)
    for _ in range(_PROBES):
        feed.step(gnb=True)
    collector = RunCollector(lambda: (run.snapshot for run in feed.runs), time.time, stale_after=900.0)
    exposition = Exposition(CollectorRegistry(), collector)
    first = timed(lambda: exposition.render("")[0])
    print(f"{given.runs} runs, {len(first[0].splitlines())} lines, {len(first[0]) / 1e6:.1f} MB")
    print(f"first scrape: {first[1]:.3f} s of processor time")
    print("| since the last | processor s | seconds | longest wait ms | generate_latest | longest wait ms | ratio |")
    print("|---|---|---|---|---|---|---|")
    changes = {"same": lambda: None, "stepped": lambda: feed.step(gnb=False), "probed": lambda: feed.step(gnb=True)}
    for name, change in changes.items():
        rounds = []
        for _ in range(given.rounds):
            change()
            ours = timed(lambda: exposition.render("")[0])
            ready = _Families(tuple(collector.collect()))
            stock = timed(lambda ready=ready: generate_latest(ready))
            if ours[0] != stock[0]:
                raise RuntimeError("the bodies differ")
            rounds.append((*ours[1:], stock[1], stock[3], stock[1] / ours[1]))
        used, passed, late, of_stock, late_by_stock, ratio = (
            statistics.median(each) for each in zip(*rounds, strict=True)
        )
        least, most = min(each[-1] for each in rounds), max(each[-1] for each in rounds)
        print(
            f"| {name} | {used:.3f} | {passed:.3f} | {1e3 * late:.1f} | {of_stock:.3f} | {1e3 * late_by_stock:.1f} "
            f"| {ratio:.1f} ({least:.1f} to {most:.1f}) |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
