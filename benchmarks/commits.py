"""Whether this checkout is slower than another one: the tap, `measure` and a sample's way through the daemon.

    git worktree add ../before COMMIT
    python benchmarks/commits.py ../before [--pairs 20]

Both checkouts run under the same packages, in turn, each time in new processes. Compared is processor time, which other
programs on the machine change less than wall time: of the training thread per `optimizer.step()` (the median), of the
process for `measure`, of the daemon for 170 samples, every fifth with a `gnb` probe. For each workload it prints the
median of the ratios of the pairs and an upper bound on it: with 20 pairs the 15th smallest, above which the true median
lies with probability 2 %.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from math import comb
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import sharpwatch

_HERE = Path(__file__).parents[1]
_STEPS, _WARM_UP = 150, 20
_DRAWS = 4


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


def measure() -> float:
    """Seconds of the process for one measurement of a model, the least of three."""
    model, ids = _model()
    batch = {"input_ids": ids, "labels": ids}
    sharpwatch.measure(model, [batch], draws=2)
    times = []
    for _ in range(3):
        began = time.process_time()
        sharpwatch.measure(model, [batch], draws=_DRAWS)
        times.append(time.process_time() - began)
    return min(times)


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


WORKLOADS = {"tap": tap, "measure": measure, "daemon": daemon}


def _run(workload: str, checkout: Path) -> float:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--run", workload]
    output = subprocess.run(command, env=environment, cwd=checkout, check=True, capture_output=True, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    assert Path(found["package"]).is_relative_to(checkout), found
    return float(found["seconds"])


def upper_bound(ratios: list[float]) -> float:
    """The smallest order statistic that is above the true median with a probability of 95 % or more."""
    n = len(ratios)
    below = 0.0
    for rank, ratio in enumerate(sorted(ratios)):
        below += comb(n, rank) / 2**n
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
        print(json.dumps({"seconds": seconds, "package": sharpwatch.__file__}))
        return
    if options.before is None:
        parser.error("name the other checkout")
    for workload in options.workloads:
        ratios = []
        for pair in range(options.pairs):
            checkouts = [_HERE, options.before.resolve()]
            seconds = {checkout: _run(workload, checkout) for checkout in checkouts[:: 1 if pair % 2 else -1]}
            ratios.append(seconds[checkouts[0]] / seconds[checkouts[1]])
            print(f"{workload}: pair {pair + 1}, {ratios[-1]:.3f}", file=sys.stderr, flush=True)
        print(f"{workload}: median {statistics.median(ratios):.3f}, upper bound {upper_bound(ratios):.3f}", flush=True)


if __name__ == "__main__":
    main()
