"""What the agent costs a training run: with and without, step about, in one process.

Both trainers do the same work on the same batches and take turns, so that whatever else the machine does hits both
alike. `ratio` is of total step times, which contain the probes; `cpu_ratio` is of the training thread's processor time,
which other processes change less; `counted` is the agent's own account over the same steps, taps and probes apart.
The tap costs the same whatever a step computes, so `--micro-batches` says how many tokens a step has for it. `--swing`
makes steps ten times as long from the middle of the run on, and says both halves. The daemon runs beside it, as in
production.

    python benchmarks/overhead.py [--models small large] [--budgets 0 0.01] [--steps N] [--micro-batches N] [--swing]
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
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import sharpwatch

SIZES = {  # vocabulary, width, layers, rows and length of a batch
    "small": (2048, 128, 4, 8, 128),
    "large": (8192, 256, 6, 8, 256),
}
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
    """A GPT-2 in training, on its own; `attach` has it watched."""

    def __init__(self, size: str) -> None:
        torch.manual_seed(0)
        vocabulary, width, layers, self.rows, self.length = SIZES[size]
        self.vocabulary = vocabulary
        self.model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=self.length,
                n_embd=width,
                n_layer=layers,
                n_head=width // 32,
                bos_token_id=0,
                eos_token_id=0,
            )
        ).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, foreach=True)
        self.data = torch.Generator().manual_seed(1)
        self.watch: Any = None

    def attach(self, address: str, budget: float) -> None:
        """Watch it; a `budget` of 0 is the tap alone."""
        self.watch = sharpwatch.attach(
            self.model,
            self.optimizer,
            training_job="overhead",
            address=address,
            overhead_budget=budget or 0.01,
            probes=("gnb", "direction") if budget else (),
        )
        self.counted: list[tuple[float, float]] = []
        overhead_budget = self.watch._watched.scheduler.budget  # noqa: SLF001 - what it counts has no public face
        record = overhead_budget.record

        def keep(step: float, tap: float, probes: dict[str, float]) -> None:
            self.counted.append((tap, sum(probes.values())))
            record(step, tap, probes)

        overhead_budget.record = keep

    def step(self, times: int = 1) -> tuple[float, float]:
        """One step of `times` micro-batches; returns its seconds by the clock and by the processor."""
        start, cpu = time.perf_counter(), time.thread_time()
        for _ in range(times):
            tokens = torch.randint(self.vocabulary, (self.rows, self.length), generator=self.data)
            (self.model(input_ids=tokens, labels=tokens).loss / times).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - start, time.thread_time() - cpu
        if self.watch is not None:
            # Or the time in which the other trainer steps would be taken for this one's, and the budget for twice what
            # it is: the clock goes on with the next forward.
            self.watch._watched.timer.stop()  # noqa: SLF001 - as above
        return seconds


def compare(  # noqa: PLR0913 - each varies
    size: str, steps: int, address: str, budget: float, *, micro_batches: int, swing: bool
) -> Iterator[dict[str, object]]:
    """Times of a plain and a watched trainer that take turns."""
    plain, watched = Trainer(size), Trainer(size)
    watched.attach(address, budget)
    for trainer in (plain, watched) * _WARM_UP:
        trainer.step()
    for longer in (1, 10) if swing else (1,):
        watched.counted.clear()
        count, times = max(20, steps // longer), longer * micro_batches
        pairs = [(plain.step(times), watched.step(times)) for _ in range(count)]
        (without, cpu), (with_agent, cpu_with) = (
            list(zip(*column, strict=True)) for column in zip(*pairs, strict=True)
        )
        taps, probes = (sum(column) for column in zip(*watched.counted, strict=True))
        yield {
            "model": size,
            "tokens": times * watched.rows * watched.length,
            "budget": budget or "tap alone",
            "step_ms": round(1e3 * statistics.median(without), 1),
            "steps": count,
            "ratio": round(sum(with_agent) / sum(without), 4),
            "cpu_ratio": round(sum(cpu_with) / sum(cpu), 4),
            "ratio_of_medians": round(statistics.median(with_agent) / statistics.median(without), 4),
            "counted_taps": round(taps / sum(without), 4),
            "counted_probes": round(probes / sum(without), 4),
            "probes": sum(seconds > 0 for _, seconds in watched.counted),
        }
    watched.watch.close()


def main() -> None:
    """Print one line of JSON for each model and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0, 0.005, 0.01, 0.05])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step, before --swing")
    parser.add_argument("--swing", action="store_true", help="ten times as long steps from the middle on")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with daemon() as address:
        for size in arguments.models:
            for budget in arguments.budgets:
                times = {"micro_batches": arguments.micro_batches, "swing": arguments.swing}
                for line in compare(size, arguments.steps, address, budget, **times):
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
