"""What a sample costs the daemon: from its message to the run's snapshot, without transport, journal and estimates.

    python -m benchmarks.daemon_sample RECORDING [--against CHECKOUT] [--rounds N]

Folds a run that `benchmarks.faults.record` has recorded, as the pipeline does, and prints the processor time of a
sample, of both checkouts and their ratio. Each checkout has a process of its own; the processes take turns, so that
whatever else the machine does hits both alike. The first `YOUNG` samples are not counted: what judges a young run works
beside what will judge it later.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# No more of the package than this, by names that earlier versions have too: workers import it of other checkouts.
from sharpwatch.daemon.app import _controller
from sharpwatch.daemon.config.settings import Config
from sharpwatch.daemon.ingest.hello import Attempt, read_hello
from sharpwatch.daemon.ingest.samples import read_sample
from sharpwatch.daemon.records import NO_CHANGES
from sharpwatch.daemon.runs.run import Run
from sharpwatch.v1 import agent_pb2

HERE = Path(__file__).parents[1]
YOUNG = 250  # samples


class Worker:
    """A process that folds a run with the code of one checkout.

    Args:
        checkout: The folder that has the package.
        messages: The Hello, then the samples.
    """

    def __init__(self, checkout: Path, messages: Sequence[bytes]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(checkout)},
        )
        self._send(messages)

    def _send(self, what: object) -> None:
        assert self._process.stdin is not None
        pickle.dump(what, self._process.stdin)
        self._process.stdin.flush()

    def fold(self) -> float:
        """Fold the run once more; returns the processor time of a sample in milliseconds."""
        assert self._process.stdout is not None
        self._send("again")
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def work() -> None:
    """Fold the run that comes on stdin, each time that something else comes there."""
    messages = pickle.load(sys.stdin.buffer)  # noqa: S301  from `Worker`
    while sys.stdin.buffer.peek(1):
        pickle.load(sys.stdin.buffer)  # noqa: S301  as above
        print(fold(messages), flush=True)


def fold(messages: Sequence[bytes]) -> float:
    """Fold a run; returns the mean processor time of a sample in milliseconds."""
    hello = read_hello(agent_pb2.Hello.FromString(messages[0]))
    run = Run(Attempt(hello, messages[0]), _controller(Config(), hello, None), now=time.time())
    began = 0.0
    for number, message in enumerate(messages[1:]):
        if number == YOUNG:
            began = time.process_time()
        now = time.time()
        observation = run.update(read_sample(hello, agent_pb2.Sample.FromString(message)), now)
        if observation is not None:
            changes = run.controller.observe(observation, now)
            if changes != NO_CHANGES:
                run.count(changes)
        run.publish()
    return 1e3 * (time.process_time() - began) / (len(messages) - 1 - YOUNG)


def main(arguments: Sequence[str]) -> int:
    """Measure, and print."""
    from benchmarks.faults.recordings import read  # noqa: PLC0415  workers must not import it

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--against", type=Path, help="another checkout of sharpwatch")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    recording = read(given.recording)
    messages = [each.SerializeToString() for each in (recording.hello, *recording.samples)]
    checkouts = {"here": HERE} | ({"there": given.against.resolve()} if given.against else {})
    workers = {name: Worker(checkout, messages) for name, checkout in checkouts.items()}
    rounds = [{name: worker.fold() for name, worker in workers.items()} for _ in range(given.rounds)]
    for worker in workers.values():
        worker.close()
    print(f"{len(messages) - 1} samples of {len(recording.hello.layer_blocks)} layer blocks; milliseconds a sample:")
    for name in workers:
        times = [each[name] for each in rounds]
        print(f"{name}: median {statistics.median(times):.3f}, least {min(times):.3f} of {given.rounds} rounds")
    if given.against:
        ratios = [each["here"] / each["there"] for each in rounds]
        print(f"here / there: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        work()
    else:
        sys.exit(main(sys.argv[1:]))
