"""What the agent costs a training run: with and without, step about, in one process.

Both trainers do the same work on the same batches and take turns, so that whatever else the machine does hits both
alike. The ratio is of total step times, which contain the probes; the tap alone is the ratio of medians. The daemon
runs beside it, as in production.

    python benchmarks/overhead.py [--steps N] [--rows ROWS]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import sharpwatch
from sharpwatch.demo.models import LENGTH, build

VOCABULARY = 2048
_WARM_UP = 10  # steps of each that are not counted; the first probes, cold ones among them, fall into them


@contextmanager
def daemon() -> Iterator[str]:
    """The address of a real daemon."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "sharpwatch.yaml"
        config.write_text(
            f'daemon: {{grpc: "127.0.0.1:0", http: "127.0.0.1:0", store: "sqlite:///{folder}/sharpwatch.db",'
            f' token_file: "{folder}/operator.token"}}\n',
            encoding="utf-8",
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "sharpwatch", "serve", "--config", str(config)], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if '"serving"' in line:
                    yield json.loads(line)["grpc"]
                    break
        finally:
            process.terminate()
            process.communicate()


class Trainer:
    """A small transformer in training."""

    def __init__(self, name: str, rows: int) -> None:
        torch.manual_seed(0)
        self.model = build(name, VOCABULARY).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, foreach=True)
        self.data = torch.Generator().manual_seed(1)
        self.rows = rows

    def step(self) -> float:
        """One step; returns its seconds."""
        start = time.perf_counter()
        tokens = torch.randint(VOCABULARY, (self.rows, LENGTH), generator=self.data)
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def compare(name: str, rows: int, steps: int, address: str, budget: float | None) -> dict[str, object]:
    """Times of a plain and a watched trainer that take turns; `budget` None: the tap alone."""
    plain, watched = Trainer(name, rows), Trainer(name, rows)
    watch = sharpwatch.attach(
        watched.model,
        watched.optimizer,
        training_job="overhead",
        address=address,
        overhead_budget=budget or 0.01,
        probes=("gnb", "direction") if budget else (),
    )
    for trainer in (plain, watched) * _WARM_UP:
        trainer.step()
    pairs = [(plain.step(), watched.step()) for _ in range(steps)]
    watch.close()
    without, with_agent = (list(times) for times in zip(*pairs, strict=True))
    return {
        "model": name,
        "budget": budget or "tap alone",
        "step_ms": round(1e3 * statistics.median(without), 1),
        "ratio_of_totals": round(sum(with_agent) / sum(without), 4),
        "ratio_of_medians": round(statistics.median(with_agent) / statistics.median(without), 4),
    }


def main() -> None:
    """Print one line of JSON for each model and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8, help="rows of 128 tokens in a batch")
    arguments = parser.parse_args()
    with daemon() as address:
        for name in ("gpt2", "llama"):
            for budget in (None, 0.005, 0.01, 0.05):
                print(json.dumps(compare(name, arguments.rows, arguments.steps, address, budget)), flush=True)


if __name__ == "__main__":
    main()
