"""What a daemon that is killed twenty times under load costs the steps of a run, and how soon its stream is back.

A plain and a watched trainer do the same work on the same batches and take turns in one process, so that whatever else
the machine does (a daemon that starts, for one) hits both alike. From another, the daemon is killed with SIGKILL as
soon as its stream stands, and started again. `longest_over_p99` is the longest step over the 99th percentile of the
plain trainer's: the watched trainer's has to stay below 1.5, as far as the plain one's own does, which is the machine's
noise. `agent_ms` is what the agent itself took of a step, so noise can be told from cost. A step with a probe is longer
by the probe; the tap alone is therefore measured first.

    python benchmarks/promises.py [--kills N] [--size SIZE]
"""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from overhead import SIZES, Trainer

import sharpwatch

_WARM_UP = 20  # steps that are not counted
_DOWN_SECONDS = 1.0  # that the daemon is away at least
_PATIENCE = 120.0


class Daemon:
    """A real daemon that comes back to its port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self.address = "127.0.0.1:0"

    def start(self) -> None:
        """Return when it serves."""
        config = self._folder / "sharpwatch.yaml"
        config.write_text(
            f'daemon: {{grpc: "{self.address}", http: "127.0.0.1:0",'
            f' store: "sqlite:///{self._folder}/sharpwatch.db", token_file: "{self._folder}/operator.token"}}\n',
            encoding="utf-8",
        )
        command = [sys.executable, "-m", "sharpwatch", "serve", "--config", str(config)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if '"serving"' in line:
                self.address = json.loads(line)["grpc"]
                threading.Thread(target=self._process.stderr.read, daemon=True).start()
                return
        raise AssertionError("the daemon did not start")

    def kill(self) -> None:
        """`kill -9`."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


def train(address: str, size: str, probes: Sequence[str]) -> None:
    """Both trainers in turn until standard input ends; a line of JSON for each pair of steps."""
    plain, watched = Trainer(size), Trainer(size)
    watch = watched.watch = sharpwatch.attach(
        watched.model, watched.optimizer, training_job="promises", address=address, probes=tuple(probes)
    )
    # Without a public name: the spool, which counts acknowledgements, and the budget's record of the last step.
    run = watch._watched  # noqa: SLF001
    spool, costs = run.transport._spool, run.scheduler.budget._window  # type: ignore[union-attr]  # noqa: SLF001
    for trainer in (plain, watched) * _WARM_UP:
        trainer.step()
    while not select.select([sys.stdin], [], [], 0)[0]:
        pair = {"plain": plain.step()[0], "watched": watched.step()[0], "agent": costs[-1][0]}
        print(json.dumps(pair | {"taken": spool.newest, "acknowledged": spool.settled}), flush=True)
    watch.close()
    print(json.dumps({"dropped": dict(run.transport.dropped)}), flush=True)


class Run(threading.Thread):
    """Trainers in a process of their own, and the lines that they have printed so far."""

    def __init__(self, address: str, size: str, probes: Sequence[str]) -> None:
        super().__init__(daemon=True)
        self.received: list[dict[str, Any]] = []
        self._news = threading.Condition()
        command = [sys.executable, __file__, "--size", size, "--address", address, "--probes", *probes]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.start()

    def run(self) -> None:
        """Read to the end."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self.received.append(json.loads(line))
                self._news.notify()

    def await_stream(self) -> float:
        """Until a sample is acknowledged that is not taken yet; the seconds that took."""
        started = time.monotonic()
        with self._news:
            newest = self.received[-1]["taken"] if self.received else 0
            while not self.received or self.received[-1]["acknowledged"] <= newest:
                assert self._news.wait(_PATIENCE), "the trainers print nothing"
                assert time.monotonic() < started + _PATIENCE, "the stream does not come back"
        return time.monotonic() - started

    def end(self) -> None:
        """Let them end, and read to the end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self.join()


def measure(size: str, kills: int, probes: Sequence[str]) -> dict[str, object]:
    """Step times of both trainers while the daemon comes and goes."""
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder))
        daemon.start()
        run = Run(daemon.address, size, probes)
        run.await_stream()
        back = []
        for _ in range(kills):
            daemon.kill()
            time.sleep(_DOWN_SECONDS)
            daemon.start()
            back.append(run.await_stream())
        run.end()
        daemon.kill()
    *pairs, last = run.received
    times = {name: np.array([pair[name] for pair in pairs]) for name in ("plain", "watched", "agent")}
    p99 = float(np.percentile(times["plain"], 99))
    trainers = ("plain", "watched")
    return {
        "probes": probes or "tap alone",
        "kills": kills,
        "steps": len(pairs),
        "p99_ms": round(1e3 * p99, 1),
        "longest_over_p99": {name: round(float(times[name].max()) / p99, 2) for name in trainers},
        "steps_over_1.5_p99": {name: int((times[name] > 1.5 * p99).sum()) for name in trainers},
        "agent_ms": {
            "median": round(1e3 * float(np.median(times["agent"])), 2),
            "longest": round(1e3 * float(times["agent"].max()), 2),
        },
        "back_after_s": {"median": round(float(np.median(back)), 2), "longest": round(max(back), 2)},
        "dropped": last["dropped"],
    }


def main() -> None:
    """Print one line of JSON for the tap alone and one with the default probes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--address", help=argparse.SUPPRESS)  # the process of the trainers
    parser.add_argument("--probes", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.address:
        train(arguments.address, arguments.size, arguments.probes)
        return
    for probes in ((), ("gnb", "direction")):
        print(json.dumps(measure(arguments.size, arguments.kills, probes)), flush=True)


if __name__ == "__main__":
    main()
