"""What the agent costs training on a GPU, and that it never waits for it: GPT-2 small (124M) or larger.

    python benchmarks/gpu/overhead.py [--model small medium] [--steps 200] [--budgets 0 0.005 0.01 0.05]

A plain and a watched trainer take turns, a step each; times are by the clock between synchronizations. Before that,
steps without a probe run under `torch.cuda.set_sync_debug_mode("error")`, for AdamW foreach, fused and capturable, and
for a compiled model, whose graph breaks are counted with and without the agent; and a step is captured into a CUDA
graph beside an attached agent. Needs CUDA; `--device cpu --tiny` runs the same code on a toy, which says nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel

import sharpwatch

SIZES = {"tiny": (64, 2, 2), "small": (768, 12, 12), "medium": (1024, 24, 16), "large": (1280, 36, 20)}
_WARM_UP = 20  # steps; the first probes fall into them
_NOWHERE = "127.0.0.1:1"  # the daemon's absence must not matter either


class Trainer:
    """GPT-2 in training under bf16 autocast."""

    def __init__(self, size: str, device: str, rows: int, length: int, **options: Any) -> None:
        torch.manual_seed(0)
        width, layers, heads = SIZES[size]
        config = GPT2Config(
            n_embd=width, n_layer=layers, n_head=heads, n_positions=length, bos_token_id=0, eos_token_id=0
        )
        self.device = device
        self.model: Any = GPT2LMHeadModel(config).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, **options)
        self.tokens = torch.randint(config.vocab_size, (rows, length), device=device)

    def attach(self, budget: float) -> Any:
        """Watch it; a `budget` of 0 is the tap alone."""
        return sharpwatch.attach(
            self.model,
            self.optimizer,
            training_job="overhead",
            address=_NOWHERE,
            overhead_budget=budget or 0.01,
            probes=("gnb", "direction") if budget else (),
        )

    def step(self) -> None:
        """One step; nothing of it waits for the device."""
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextmanager
def no_sync(device: str) -> Iterator[None]:
    """Whatever waits for the device raises."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def hold_no_sync(arguments: argparse.Namespace) -> None:
    """Steps without a probe never wait; a compiled model has as many graph breaks as without the agent."""
    kinds: dict[str, dict[str, Any]] = {"foreach": {}, "fused": {"fused": True}}
    if arguments.device == "cuda":
        kinds["capturable"] = {"capturable": True}
    for name, options in kinds.items():
        trainer = Trainer(arguments.model[0], arguments.device, arguments.rows, arguments.length, **options)
        with trainer.attach(0.0) as watch:
            for _ in range(_WARM_UP):
                trainer.step()
            with no_sync(arguments.device):
                for _ in range(20):
                    trainer.step()
            swallowed = watch._watched.barrier.swallowed  # noqa: SLF001 - a sync would end there
        print(json.dumps({"no sync": name, "swallowed_errors": swallowed}), flush=True)
    breaks = {}
    for watched in (False, True):
        torch.compiler.reset()
        counters.clear()
        trainer = Trainer(arguments.model[0], arguments.device, arguments.rows, arguments.length)
        trainer.model = torch.compile(trainer.model)
        with trainer.attach(0.0) if watched else nullcontext():
            for _ in range(_WARM_UP):
                trainer.step()
            with no_sync(arguments.device):
                trainer.step()
        breaks[watched] = sum(counters["graph_break"].values())
    print(json.dumps({"graph breaks": {"plain": breaks[False], "watched": breaks[True]}}), flush=True)


def hold_graphs(arguments: argparse.Namespace) -> None:
    """A whole step captured into a CUDA graph beside an attached agent replays to the same weights as a plain one."""
    weights = []
    for watched in (False, True):
        trainer = Trainer(arguments.model[0], arguments.device, arguments.rows, arguments.length, capturable=True)
        with trainer.attach(0.0) if watched else nullcontext():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    trainer.step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                trainer.step()
            for _ in range(10):
                graph.replay()
        weights.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    same = all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    print(json.dumps({"CUDA graph": "same weights" if same else "OTHER WEIGHTS"}), flush=True)


def timed(trainer: Trainer) -> float:
    """Seconds of one step, the device's work included."""
    start = time.perf_counter()
    trainer.step()
    if trainer.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(size: str, budget: float, arguments: argparse.Namespace) -> dict[str, object]:
    """Times of a plain and a watched trainer that take turns."""
    plain = Trainer(size, arguments.device, arguments.rows, arguments.length, fused=True)
    watched = Trainer(size, arguments.device, arguments.rows, arguments.length, fused=True)
    pairs = []
    with watched.attach(budget) as watch:
        for number in range(_WARM_UP + arguments.steps):
            pair = timed(plain), timed(watched)
            watch._watched.timer.stop()  # noqa: SLF001 - the other trainer's step is no part of this one's
            if number >= _WARM_UP:
                pairs.append(pair)
        ratio = watch._watched.scheduler.budget.overhead_ratio  # noqa: SLF001 - what it counts has no public face
    without, with_agent = (list(column) for column in zip(*pairs, strict=True))
    return {
        "model": size,
        "budget": budget or "tap alone",
        "step_ms": round(1e3 * statistics.median(without), 2),
        "ratio": round(sum(with_agent) / sum(without), 4),
        "ratio_of_medians": round(statistics.median(with_agent) / statistics.median(without), 4),
        "counted": round(ratio, 4),
    }


def main() -> None:
    """Print one line of JSON for each thing held or measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(SIZES), default=["small", "medium"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0, 0.005, 0.01, 0.05])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy, to try the code")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.model, arguments.rows, arguments.length, arguments.steps = ["tiny"], 8, 16, 10
    hold_no_sync(arguments)
    if arguments.device == "cuda":
        hold_graphs(arguments)
    for size in arguments.model:
        for budget in arguments.budgets:
            print(json.dumps(compare(size, budget, arguments)), flush=True)


if __name__ == "__main__":
    main()
