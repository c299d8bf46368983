"""One training of one contender: a cell of the benchmark."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sharpwatch
from benchmarks.autopilot.closed_loop import LR_BOUNDS, ClosedLoop, LayerShares
from benchmarks.autopilot.contenders import APPLIED, CONTENDERS
from benchmarks.autopilot.llr import LayerwiseRates
from benchmarks.autopilot.text import Corpus, corpus
from benchmarks.faults.training import MAX_NORM, build, loss_of
from sharpwatch.daemon.config.settings import CurvatureShareConfig

SHAPES = {"1M": (2, 128), "5M": (4, 128), "gpt2-small": (16, 512)}  # rows and tokens of a row, by size
FLOOR = 0.1  # of the peak rate, where the cosine ends
EVALUATE_EVERY = 100
WINDOWS, LAST_WINDOWS = 32, 128  # held-out rows at each evaluation, and at the end
EARLY_PROBES, PROBE_EVERY = 62, 50


@dataclass(frozen=True, slots=True)
class Cell:
    """A training: what competes, with which constant, at which peak rate, on which seed."""

    model: str
    size: str
    contender: str
    constant: str
    rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Its name in what is printed."""
        contender = self.contender + (f"={self.constant}" if self.constant else "")
        return f"{self.model}-{self.size}-{self.steps}-{contender}-{self.rate:g}-{self.seed}"


@dataclass(slots=True)
class Result:
    """What a training came to.

    Attributes:
        cell: Which one.
        initial: Held-out loss before the first step.
        loss: Held-out loss at the end; infinite where it diverged.
        curve: Held-out loss at each evaluation, on fewer rows.
        seconds: Of all steps, probes included and evaluations not.
        probes, probe_rows, probe_seconds: What probes cost.
        changes: Each step at which multipliers were changed, and to what.
    """

    cell: Cell
    initial: float
    loss: float = math.inf
    curve: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    probes: int = 0
    probe_rows: int = 0
    probe_seconds: float = 0.0
    changes: list[tuple[int, dict[str, float]]] = field(default_factory=list)


def train(cell: Cell, device: str) -> Result:
    """Train a cell; its result."""
    return _Training(cell, device).run()


def shape(step: int, steps: int, warm_up_share: float) -> float:
    """The rate at step 1, 2, 3, … as a share of its peak: a linear warm-up, then a cosine."""
    warm_up = max(1, round(warm_up_share * steps))
    if step <= warm_up:
        return step / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2


class _Training:
    def __init__(self, cell: Cell, device: str) -> None:
        torch.manual_seed(cell.seed)
        self.cell, self.device = cell, device
        self.rows, self.length = SHAPES[cell.size]
        self.model = build(cell.model, cell.size, self.length).train().to(device)
        self.text: Corpus = corpus(cell.size)
        self.data = torch.Generator().manual_seed(1000 + cell.seed)
        self.rule = CONTENDERS[cell.contender]
        self.names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.layerwise = self._layerwise()
        fixed = self._fixed()
        self.optimizer = torch.optim.AdamW(self._groups(fixed), lr=cell.rate, betas=(0.9, 0.95), fused=True)

    def run(self) -> Result:
        cell = self.cell
        found = Result(cell, self._evaluate(WINDOWS))
        loop = self._loop()
        watch = None if loop is None else self._attach(loop)
        for step in range(1, cell.steps + 1):
            started = time.perf_counter()
            loss = self._step(step, watch)
            found.seconds += time.perf_counter() - started
            if not math.isfinite(loss):
                break
            if step % EVALUATE_EVERY == 0:
                found.curve.append((step, round(self._evaluate(WINDOWS), 4)))
        else:
            found.loss = self._evaluate(LAST_WINDOWS)
        if watch is not None and loop is not None:
            watch.close()
            found.probes, found.probe_rows, found.probe_seconds = loop.probes, loop.probe_rows, loop.probe_seconds
            found.changes = [(at, {block: round(m, 4) for block, m in to.items()}) for at, to in loop.changes]
        return found

    def _loop(self) -> ClosedLoop | None:
        if isinstance(self.layerwise, LayerShares):
            return self.layerwise
        config = self.rule.autopilot(self.cell.constant)
        return None if config is None else ClosedLoop(config, of_applied=self.cell.constant.endswith(APPLIED))

    def _attach(self, loop: ClosedLoop) -> Any:
        return sharpwatch.attach(
            self.model,
            self.optimizer,
            training_job="autopilot",
            run=self.cell.name,
            transport=loop,
            seed=self.cell.seed,
            loss_fn=partial(_loss_of, device=self.device),
            lr_bounds=LR_BOUNDS,
            probes=("direction",),
            probe_every=PROBE_EVERY,
            early_probes=EARLY_PROBES,
        )

    def _step(self, step: int, watch: Any) -> float:
        rate = self.cell.rate * shape(step, self.cell.steps, self.rule.warm_up(self.cell.constant))
        layerwise = None if self.layerwise is None else self.layerwise.at(step)
        for group in self.optimizer.param_groups:
            factor = group["factor"] if layerwise is None else layerwise[self.names[id(group["params"][0])]]
            group["lr"] = rate * factor
        tokens = self.text.batch(self.rows, self.length, self.data).to(self.device)
        batch = {"inputs": tokens[:, :-1], "labels": tokens[:, 1:]}
        loss = _loss_of(self.model, batch, device=self.device)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        value = float(loss.detach())
        if watch is not None:
            watch.observe(loss=value, batch=batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    @torch.no_grad()
    def _evaluate(self, windows: int) -> float:
        tokens = self.text.judged(windows, self.length).to(self.device)
        losses = [
            float(_loss_of(self.model, {"inputs": rows[:, :-1], "labels": rows[:, 1:]}, device=self.device))
            for rows in tokens.split(self.rows * 4)
        ]
        return sum(losses) / len(losses)

    def _fixed(self) -> dict[str, float]:
        """By parameter its factor; a fused one takes the smallest of its blocks', as under sharpwatch."""
        factors = self.rule.factors(self.cell.constant)
        found: dict[str, float] = {}
        for part in sharpwatch.classify(self.model).parts:
            factor = factors.get(part.type, 1.0)
            found[part.parameter] = min(found.get(part.parameter, factor), factor)
        return found

    def _layerwise(self) -> LayerwiseRates | LayerShares | None:
        of_layers = self.rule.largest_of_layers(self.cell.constant)
        if of_layers is not None:
            return LayerShares(CurvatureShareConfig(max=of_layers))
        largest = self.rule.largest_of_llr(self.cell.constant)
        if largest is None:
            return None
        parts = sharpwatch.classify(self.model).parts
        ends = frozenset(part.parameter for part in parts if part.type in {"emb", "head"})
        return LayerwiseRates(dict(self.model.named_parameters()), ends, largest)

    def _groups(self, fixed: Mapping[str, float]) -> list[dict[str, Any]]:
        groups: dict[Any, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            apart = name if self.layerwise is not None else ""
            groups[apart, fixed[name], parameter.dim() >= 2].append(parameter)
        return [
            {"params": parameters, "factor": factor, "weight_decay": 0.1 if decayed else 0.0}
            for (_, factor, decayed), parameters in groups.items()
        ]


def _loss_of(model: nn.Module, batch: Mapping[str, Tensor], *, device: str) -> Tensor:
    if device == "cpu":
        return loss_of(model, batch)
    with torch.autocast("cuda", torch.bfloat16):
        return loss_of(model, batch)
