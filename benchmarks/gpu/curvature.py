"""What each probe costs a training step on one GPU: GPT-2 small (124M), under bf16 autocast and in float32.

    python benchmarks/gpu/curvature.py [--rows 8] [--train 300] [--rounds 20]

Trains on Python's documentation and sources first, then takes steps and probes in turn and times both by CUDA events:
medians, and medians of the ratio to the neighbouring step. Peak memory is what the allocator held at most during a
probe or a step, both over the same state before (weights and optimizer). Needs CUDA; `--device cpu --tiny` runs the
same code on a toy, which says nothing about costs.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from sharpwatch import classify
from sharpwatch.curvature.estimators.directional import direction_probe, linesearch_probe
from sharpwatch.curvature.estimators.gnb import gnb_probe
from sharpwatch.curvature.estimators.hutchinson import hutchinson_probe
from sharpwatch.curvature.estimators.lanczos import lanczos_probe
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.demo.train import Corpus, load_corpus
from sharpwatch.errors import ProbeError

CACHE = Path(".bench")
_PRODUCTS = 8  # of a lanczos probe: a cold start's


@dataclass(frozen=True)
class Scale:
    """The model and its batch."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int
    rows: int
    train: int  # steps before anything is measured


SMALL = Scale(layers=12, width=768, heads=12, vocabulary=50257, length=1024, rows=8, train=300)
TINY = Scale(layers=2, width=32, heads=2, vocabulary=2048, length=32, rows=4, train=5)


@dataclass(frozen=True)
class Reading:
    """One call: seconds, and bytes at the peak over what was held before (NaN on a CPU)."""

    seconds: float
    peak: float


class Trainer:
    """The training that probes are held against."""

    def __init__(self, scale: Scale, device: torch.device, *, half: bool) -> None:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=scale.vocabulary,
            n_positions=scale.length,
            n_embd=scale.width,
            n_layer=scale.layers,
            n_head=scale.heads,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
        self.model: nn.Module = GPT2LMHeadModel(config).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
        self.corpus: Corpus = load_corpus(CACHE)
        self.data = torch.Generator().manual_seed(0)
        self.scale, self.device, self.half = scale, device, half

    def batch(self) -> dict[str, Tensor]:
        """Rows of real text."""
        ids = self.corpus.batch(self.scale.rows, self.scale.length, self.data).to(self.device)
        return {"input_ids": ids, "labels": ids}

    def autocast(self) -> AbstractContextManager[object]:
        """As the run has it."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.half else nullcontext()

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """One step of training; its loss."""
        with self.autocast():
            loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def read(call: Callable[[], object], device: torch.device) -> Reading:
    """Time `call` to the end of the work that it has queued."""
    gc.collect()
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return Reading(time.perf_counter() - start, float("nan"))
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    call()
    end_event.record()
    torch.cuda.synchronize(device)
    return Reading(1e-3 * start_event.elapsed_time(end_event), float(torch.cuda.max_memory_allocated(device) - held))


def probes(trainer: Trainer, batch: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """Every probe, and the block it is of where it is of one."""
    model, block_map = trainer.model, classify(trainer.model)
    generator = torch.Generator(trainer.device).manual_seed(1)
    whole = Batch((), batch)
    quarter = whole.slice(torch.arange(max(1, whole.rows // 4)))
    displacement = {name: 1e-4 * parameter.detach().sign() for name, parameter in model.named_parameters()}
    found: dict[str, Callable[[], object]] = {}
    for label, part in (("all rows", whole), ("a quarter of the rows", quarter)):
        for draws in (1, 4):
            found[f"gnb, {draws} draws, {label}"] = lambda part=part, draws=draws: gnb_probe(
                model, block_map, part, draws=draws, generator=generator
            )
        found[f"direction, whole and ffn, {label}"] = lambda part=part: direction_probe(
            model, block_map, part, displacement, blocks=("ffn",)
        )
        found[f"linesearch, {label}"] = lambda part=part: linesearch_probe(
            model, block_map, part, displacement, blocks=()
        )
        for block in block_map.blocks:
            found[f"hutchinson, 1 draw, {block}, {label}"] = lambda part=part, block=block: hutchinson_probe(
                model, block_map, part, block=block, draws=1, generator=generator
            )
        for block in ("qk", "ffn"):
            found[f"lanczos, {_PRODUCTS} products, {block}, {label}"] = lambda part=part, block=block: lanczos_probe(
                model, block_map, part, block=block, products=_PRODUCTS, generator=generator
            )
    return found


def measure(trainer: Trainer, rounds: int) -> None:
    """Print a row for every probe."""
    batch, device = trainer.batch(), trainer.device
    for _ in range(trainer.scale.train):
        loss = trainer.step(trainer.batch())
    step = lambda: trainer.step(batch)  # noqa: E731 - as the probes
    for _ in range(3):
        step()
    print(f"\n**{'bf16 autocast' if trainer.half else 'float32'}**, loss {loss.item():.3f}\n")
    print("| probe | ms | × a step (quartiles) | peak memory, MiB | × a step's |")
    print("|---|---|---|---|---|")
    plain = [read(step, device) for _ in range(rounds)]
    step_peak = max(reading.peak for reading in plain)
    print(f"| a training step | {1e3 * statistics.median(r.seconds for r in plain):.1f} | 1 | {_mib(step_peak)} | 1 |")
    for name, probe in probes(trainer, batch).items():
        try:
            with trainer.autocast():
                probe()
                pairs = [(read(probe, device), _outside(step, device)) for _ in range(rounds)]
        except (ProbeError, torch.OutOfMemoryError) as error:
            print(f"| {name} | can't: {type(error).__name__}: {str(error)[:100]} | – | – | – |", flush=True)
            continue
        ratios = [mine.seconds / theirs.seconds for mine, theirs in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        peak = max(mine.peak for mine, _ in pairs)
        seconds = statistics.median(mine.seconds for mine, _ in pairs)
        print(
            f"| {name} | {1e3 * seconds:.1f} | {middle:.2f} ({low:.2f}–{high:.2f}) "
            f"| {_mib(peak)} | {_number(peak / step_peak, '.2f')} |",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy, to try the code")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and torch sees none (--device cpu --tiny tries the code alone)")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    scale = TINY if arguments.tiny else SMALL
    print(f"{name}, torch {torch.__version__}; {scale.rows} rows of {scale.length} tokens")
    for half in (True, False):
        measure(Trainer(scale, device, half=half), arguments.rounds)


def _outside(step: Callable[[], object], device: torch.device) -> Reading:
    """A step as the run takes it, not within the autocast around a probe."""
    with torch.autocast(device.type, enabled=False):
        return read(step, device)


def _mib(peak: float) -> str:
    return _number(peak / 2**20, ".0f")


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


if __name__ == "__main__":
    main()
