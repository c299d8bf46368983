"""Runs the `gnb` probe in training: traces and sketches of all blocks at once, and the sketch of the step's gradient.

The estimator is `curvature.estimators.gnb`, or `gnb_sharded` where no rank holds whole parameters.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpwatch.agent.optimizers.support import layout_of
from sharpwatch.agent.probes.context import Probe, ProbeContext, ProbedStep, ProbeSpec, ShardReduction
from sharpwatch.curvature.estimators.gnb import GnbSample, gnb_probe
from sharpwatch.curvature.estimators.gnb_sharded import sharded_gnb_probe
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.parameters.shards import Shard, local_gradient_summand, sketch_shards
from sharpwatch.v1 import agent_pb2
from sharpwatch.wire import encode

_DRAWS = 4


@dataclass(frozen=True, slots=True)
class GnbReport:
    """A `gnb` probe, and the sketch [B, k] of the gradient that was stepped on; None where it could not be taken."""

    sample: GnbSample
    gradient_sketch: Tensor | None


class _GnbProbe(Probe):
    """Sketches the gradient before the step, on its device and without waiting for it."""

    _gradient_sketch: Tensor | None = None

    def __init__(self, context: ProbeContext) -> None:
        super().__init__(context)
        self._with_parameters = layout_of(context.optimizers).gradients_in_place

    def before_step(self, step: ProbedStep) -> None:
        """Sketches the gradient as it stands, whatever has been done to its scale."""
        del step
        # What a step that never ended has left must not be taken for this step's.
        self._gradient_sketch = None
        if self._with_parameters:
            self._gradient_sketch = self._sketch()

    def discard(self) -> None:
        """Forgets the gradient."""
        self._gradient_sketch = None

    @abstractmethod
    def _sketch(self) -> Tensor:
        """Float32 [B, k]."""

    def _take(self) -> Tensor | None:
        """The sketch of the gradient that was stepped on, on its device; it is kept no longer."""
        taken, self._gradient_sketch = self._gradient_sketch, None
        return taken


class Gnb(_GnbProbe):
    """Probes every block at once."""

    def run(self, rows: AbstractContextManager[Batch], step: ProbedStep) -> GnbReport:
        """As `Probe.run`."""
        del step
        context, gradient = self.context, self._take()
        with rows as batch:
            sample = gnb_probe(
                context.model,
                context.block_map,
                batch,
                draws=_DRAWS,
                generator=context.source,
                sketcher=context.sketcher,
                logits_fn=context.logits_fn,
                loss_fn=context.loss_fn,
            )
        return GnbReport(sample, None if gradient is None else gradient.cpu())

    def _sketch(self) -> Tensor:
        given = {name: parameter.grad for name, parameter in self.context.model.named_parameters()}
        # The sketch goes by an entry's place in the whole parameter, which a sparse gradient lacks.
        gradients = {name: g.to_dense() if g.is_sparse else g for name, g in given.items() if g is not None}
        return self.context.sketcher.sketch(gradients)


class ShardedGnb(_GnbProbe):
    """Probes every block at once, by all ranks together, where no rank holds whole parameters."""

    def run(self, rows: AbstractContextManager[Batch], step: ProbedStep) -> GnbReport:
        """As `Probe.run`; a failure of one rank is raised on all."""
        del step
        context, shards, own = self.context, self._shards, self._take()
        sample = sharded_gnb_probe(
            context.model,
            context.block_map,
            rows,
            draws=_DRAWS,
            generator=context.source,
            add=shards.add,
            weights=shards.weights,
            sketcher=context.sketcher,
            logits_fn=context.logits_fn,
            loss_fn=context.loss_fn,
        )
        if own is None:  # the sum over ranks is then NaN, so that all of them leave it out
            shape = len(context.block_map.blocks), context.sketcher.size
            own = torch.full(shape, math.nan, dtype=torch.float32, device="cpu")
        gradient = shards.add(own.cpu().double()).float()
        return GnbReport(sample, gradient if gradient.isfinite().all() else None)

    @property
    def _shards(self) -> ShardReduction:
        shards = self.context.shards
        if shards is None:
            raise RuntimeError("a sharded probe needs to know how ranks add up their results")
        return shards

    def _sketch(self) -> Tensor:
        """This rank's summand."""
        parameters = dict(self.context.model.named_parameters())
        shards = {name: Shard.of(parameter) for name, parameter in parameters.items()}
        summands = {name: local_gradient_summand(parameter) for name, parameter in parameters.items()}
        found = {name: gradient for name, (gradient, _) in summands.items() if gradient is not None}
        weights = {name: self._shards.weights[name] * ranks for name, (_, ranks) in summands.items()}
        return sketch_shards(self.context.sketcher, found, shards, weights)


def _encode(report: GnbReport, seconds: float) -> agent_pb2.GnbProbe:
    sample, gradient = report.sample, report.gradient_sketch
    return agent_pb2.GnbProbe(
        tokens=sample.tokens,
        rows=sample.rows,
        traces=encode(sample.traces.cpu().numpy(), "float64"),
        sketches=None if sample.sketches is None else encode(sample.sketches.cpu().numpy(), "float32"),
        gradient_sketch=None if gradient is None else encode(gradient.numpy(), "float32"),
        seconds=seconds,
    )


GNB = ProbeSpec(name="gnb", runner=Gnb, sharded_runner=ShardedGnb, encode=_encode)
