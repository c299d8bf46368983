"""Whether this checkout is slower than another one: the tap, `measure` and a sample's way through the daemon.

    git worktree add ../before COMMIT
    python benchmarks/commits.py ../before [--pairs 20]

Both checkouts run under the same packages, in turn. Compared is processor time, which other programs on the machine
change less than wall time: of the training thread per `optimizer.step()` (the median), of the process for `measure`, of
the daemon for 170 samples, every fifth with a `gnb` probe. Each time is of new processes; only `measure` runs its pairs
in one process of each checkout, five pairs in each, because the machine's own speed changes within seconds. For each
workload it prints the median of the ratios of the pairs and an upper bound on it: with 20 pairs the 15th smallest,
above which the true median lies with probability 2 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import sharpwatch

_HERE = Path(__file__).parents[1]
_STEPS, _WARM_UP = 150, 20
_DRAWS = 2
_PAIRS_OF_A_PROCESS = 5
_REPEATED = 5


def _model() -> tuple[GPT2LMHeadModel, torch.Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = GPT2Config(vocab_size=256, n_positions=32, n_embd=64, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config), torch.randint(256, (4, 32))


def _train(address: str, probes: tuple[str, ...]) -> list[float]:
    """Processor time of each `optimizer.step()` after the warm-up."""
    model, ids = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = sharpwatch.attach(
        model, optimizer, training_job="commits", address=address, probes=probes, probe_every=5, overhead_budget=1.0
    )
    times = []
    for _ in range(_WARM_UP + _STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        began = time.thread_time()
        optimizer.step()
        times.append(time.thread_time() - began)
        optimizer.zero_grad()
    watch.close()
    return times[_WARM_UP:]


def tap() -> float:
    """Seconds of the training thread for a step, with the daemon absent."""
    return statistics.median(_train("127.0.0.1:9", ()))


def serve_measurements() -> None:
    """Measures a model at each line of stdin, and answers with the seconds of the process."""
    model, ids = _model()
    batch = {"input_ids": ids, "labels": ids}
    sharpwatch.measure(model, [batch], draws=2)
    print(json.dumps({"package": sharpwatch.__file__}), flush=True)
    for _ in sys.stdin:
        began = time.process_time()
        sharpwatch.measure(model, [batch], draws=_DRAWS)
        print(json.dumps({"seconds": time.process_time() - began}), flush=True)


def daemon() -> float:
    """Seconds of the daemon for all samples of a run."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "sharpwatch.yaml"
        config.write_text(
            f'daemon: {{grpc: "127.0.0.1:0", http: "127.0.0.1:0", device: cpu, '
            f'store: "sqlite:///{folder}/journal.db", token_file: "{folder}/token"}}\n',
            encoding="utf-8",
        )
        command = [sys.executable, "-m", "sharpwatch", "serve", "--config", str(config)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            serving = next(event for line in process.stderr if (event := json.loads(line))["event"] == "serving")
            began = _processor_time(process.pid)
            _train(serving["grpc"], ("gnb",))
            return _processor_time(process.pid) - began
        finally:
            process.terminate()
            process.communicate(timeout=20)


def _processor_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _start(workload: str, checkout: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--run", workload]
    return subprocess.Popen(
        command, env=environment, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    return next(json.loads(line) for line in process.stdout if line.startswith("{"))


def _run(workload: str, checkout: Path) -> float:
    """Seconds of a workload in a process of its own."""
    with _start(workload, checkout) as process:
        found = _answer(process)
    assert Path(found["package"]).is_relative_to(checkout), found
    return float(found["seconds"])


def _measured(processes: list[subprocess.Popen[str]]) -> list[float]:
    """Seconds of a measurement in each of the processes, in their order: the least of several, which alternate."""
    seconds = [math.inf for _ in processes]
    for _ in range(_REPEATED):
        for place, process in enumerate(processes):
            assert process.stdin is not None
            print("measure", file=process.stdin, flush=True)
            seconds[place] = min(seconds[place], float(_answer(process)["seconds"]))
    return seconds


def _ratios(workload: str, checkouts: list[Path], pairs: int) -> Iterator[float]:
    """This checkout's seconds over the other's, pair by pair; each checkout is first in every second pair."""
    processes: list[subprocess.Popen[str]] = []
    for pair in range(pairs):
        order = [0, 1] if pair % 2 else [1, 0]
        if workload != "measure":
            found = [_run(workload, checkouts[place]) for place in order]
        else:
            if pair % _PAIRS_OF_A_PROCESS == 0:
                _end(processes)
                processes = [_start(workload, checkout) for checkout in checkouts]
                packages = [_answer(process)["package"] for process in processes]
                assert all(map(Path.is_relative_to, map(Path, packages), checkouts)), packages
            found = _measured([processes[place] for place in order])
        seconds = dict(zip(order, found, strict=True))
        yield seconds[0] / seconds[1]
    _end(processes)


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.communicate(timeout=60)


WORKLOADS: dict[str, Callable[[], float | None]] = {"tap": tap, "measure": serve_measurements, "daemon": daemon}


def upper_bound(ratios: list[float]) -> float:
    """The smallest order statistic that is above the true median with a probability of 95 % or more."""
    n = len(ratios)
    below = 0.0
    for rank, ratio in enumerate(sorted(ratios)):
        below += math.comb(n, rank) / 2**n
        if below >= 0.95:
            return ratio
    return max(ratios)


def main() -> None:
    """Compare the checkouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="the other checkout")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--run", choices=WORKLOADS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        seconds = WORKLOADS[options.run]()
        if seconds is not None:
            print(json.dumps({"seconds": seconds, "package": sharpwatch.__file__}))
        return
    if options.before is None:
        parser.error("name the other checkout")
    for workload in options.workloads:
        ratios = []
        for ratio in _ratios(workload, [_HERE, options.before.resolve()], options.pairs):
            ratios.append(ratio)
            print(f"{workload}: pair {len(ratios)}, {ratio:.3f}", file=sys.stderr, flush=True)
        print(f"{workload}: median {statistics.median(ratios):.3f}, upper bound {upper_bound(ratios):.3f}", flush=True)


if __name__ == "__main__":
    main()
