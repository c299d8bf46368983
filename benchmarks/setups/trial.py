"""One training of a setup, plain or watched, and what each of its models' watches sent."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import sharpwatch
from benchmarks.setups.truth import Curvature, Truth, curvature
from sharpwatch.blocks import BlockMap
from sharpwatch.errors import AttachError
from sharpwatch.integrations.huggingface import SharpwatchCallback, train
from sharpwatch.testing import InMemoryTransport

STEPS = 32
PROBE_EVERY = 4


@dataclass
class Record:
    """One model of a trial: what it was trained on, and what its watch says.

    Attributes:
        model: The model.
        blocks: The blocks that it has, by what its layers do.
        truth: What is trained.
        watched: Whether sharpwatch was asked to watch it.
        watch: The watch; None in a plain trial, and where `attach` refused.
        refusal: Why `attach` refused.
        transport: What the watch sent.
        losses: The loss that each optimizer step was taken on, as the setup computed it.
        curvatures: In a plain trial, the truth by step.
        weights: The weights and buffers at the end.
    """

    model: nn.Module
    blocks: frozenset[str]
    truth: Truth
    watched: bool
    watch: Any = None
    refusal: str = ""
    transport: InMemoryTransport = field(default_factory=InMemoryTransport)
    losses: list[float] = field(default_factory=list)
    curvatures: dict[int, Curvature] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    _before: dict[str, Tensor] = field(default_factory=dict)

    @functools.cached_property
    def _block_map(self) -> BlockMap:
        return sharpwatch.classify(self.model)

    def observe(self, **values: Any) -> None:
        """As `watch.observe`; nothing in a plain trial."""
        if self.watch is not None:
            self.watch.observe(**values)

    def stepped(self, loss: float | Tensor, batch: object) -> None:
        """The setup has taken an optimizer step, on `loss` of `batch`; no gradient need be there any more."""
        self.losses.append(loss.item() if isinstance(loss, Tensor) else loss)
        step = len(self.losses)
        if self.watched or self.truth.loss is None:
            return
        if self._before:
            self.curvatures[step] = curvature(self.truth, self.model, self._block_map, self._before, batch)
        probed_next = (step + 1) % PROBE_EVERY == 0
        # Before the first step there is no copy, and none is needed: no probe comes that early.
        self._before = {name: p.detach().clone() for name, p in self.model.named_parameters()} if probed_next else {}

    def close(self) -> None:
        """Training is over."""
        self.weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        if self.watch is not None:
            self.watch.close()


class Trial:
    """One training of a setup.

    Args:
        name: The setup's.
        folder: An empty folder for what a trainer writes.
        watched: Whether sharpwatch watches.

    Attributes:
        records: One for each model that was to be watched, in the order of `attach`.
        steps: Optimizer steps to take.
    """

    def __init__(self, name: str, folder: Path, *, watched: bool) -> None:
        self.records: list[Record] = []
        self.steps = STEPS
        self.folder = folder
        self._name = name
        self._watched = watched
        torch.manual_seed(0)

    def attach(self, model: nn.Module, optimizer: Any, *, blocks: str, truth: Truth, **options: Any) -> Record:
        """Attach without a rule, as a user would; a plain trial only keeps a record.

        Args:
            model: As for `sharpwatch.attach`.
            optimizer: As for `sharpwatch.attach`.
            blocks: The blocks that the model should be divided into, with spaces between them.
            truth: What is trained.
            **options: Others of `sharpwatch.attach`.
        """
        record = self._record(model, blocks, truth)
        if self._watched:
            try:
                record.watch = sharpwatch.attach(model, optimizer, **self._options(record), **options)
            except AttachError as error:
                record.refusal = str(error)
        return record

    def run(self, trainer: Trainer, *, blocks: str, truth: Truth, **options: Any) -> None:
        """Train with Hugging Face's Trainer, under the callback in a watched trial."""
        record = self._record(trainer.model, blocks, truth)
        told = _Told(record)
        trainer.compute_loss = told.listening(trainer.compute_loss)
        if self._watched:
            callback = _Watching(record, **self._options(record), **options)
            trainer.add_callback(callback)
            trainer.add_callback(told)  # after it, so that there is a watch
            train(trainer)
        else:
            trainer.add_callback(told)
            trainer.train()
        record.close()

    def _record(self, model: nn.Module, blocks: str, truth: Truth) -> Record:
        self.records.append(Record(model, frozenset(blocks.split()), truth, self._watched))
        return self.records[-1]

    def _options(self, record: Record) -> dict[str, Any]:
        return {"training_job": self._name, "probe_every": PROBE_EVERY, "transport": record.transport}


class _Watching(SharpwatchCallback):
    """The callback, whose refusal is kept and does not end the training."""

    def __init__(self, record: Record, **options: Any) -> None:
        super().__init__(**options)
        self._kept = record

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Attach."""
        try:
            super().on_train_begin(*args, **kwargs)
        except AttachError as error:
            self._kept.refusal = str(error)
        self._kept.watch = self.watch


class _Told(TrainerCallback):
    """Tells the record of each step of a Trainer, with the loss that `compute_loss` returned."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._last: tuple[Any, Any] = (None, None)

    def listening(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        """`compute_loss`, overheard."""

        @functools.wraps(compute_loss)
        def overheard(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            given = dict(inputs)
            result = compute_loss(model, inputs, *args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            self._last = (loss.detach(), given)
            return result

        return overheard

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """A step was taken."""
        self._record.stepped(*self._last)
