"""The kinds of probe as the agent runs them: whose turn it is, and what is kept from one probe to the next."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sharpwatch.agent.probes.context import ProbeContext, ShardReduction, TakenStep
from sharpwatch.curvature.estimators.direction import DirectionSample, direction_probe
from sharpwatch.curvature.estimators.gnb import GnbSample, gnb_probe
from sharpwatch.curvature.estimators.gnb_sharded import sharded_gnb_probe
from sharpwatch.curvature.estimators.hutchinson import HutchinsonSample, hutchinson_probe
from sharpwatch.curvature.estimators.lanczos import LanczosSample, lanczos_probe
from sharpwatch.curvature.estimators.linesearch import LineSearchSample, linesearch_probe
from sharpwatch.curvature.estimators.preconditioned import PreconditionedSample, preconditioned_probe
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.parameters.norms import squared_norms, sum_by_index
from sharpwatch.curvature.statistics.gnb_estimators import trace_estimates
from sharpwatch.curvature.statistics.pooling import least_precise, relative_error

MOVING = ("direction", "linesearch")  # kinds that look at the step itself: they need the weights before it
_GNB_DRAWS = 4
_HUTCHINSON_DRAWS = 2  # of several products each
_PRODUCTS = 6  # of one visit: a cold Lanczos iteration takes 6 to 15, a warm one 1 to 3
_VISITS = 6  # to one block, at most
_SETTLED = 0.05  # residual over the top eigenvalue at which the next block has its turn
_ROUNDS = 2  # after which a trace has to be measured anew, however well it was known
_WINDOW = 8  # probes of a block that tell how well its trace is known: what the daemon estimates from


@dataclass(frozen=True, slots=True)
class GnbReport:
    """A `gnb` probe, and of the step's own mean gradient its sketch [B, k] and noise [L], where they could be taken."""

    sample: GnbSample
    gradient_sketch: Tensor | None
    gradient_noise: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class DirectionReport:
    """A `direction` probe, and ‖d_b‖/‖θ_b‖ by block type."""

    sample: DirectionSample
    update_ratio: npt.NDArray[np.float32]


Report = GnbReport | DirectionReport | HutchinsonSample | LanczosSample | LineSearchSample | PreconditionedSample


class Probe(Protocol):
    """A probe on one row in `share` of the batch: its cost goes with them. Raises whatever the probe raises.

    `turn` counts how often a block's turn was given.
    """

    share: int
    turn: int

    def run(self, part: Batch, step: TakenStep) -> Report:
        """Probe once."""


class _RoundRobin:
    """Whose turn it is, one after the other, among names that may change."""

    turn = 0

    def _next(self, names: Sequence[str]) -> str:
        self.turn += 1
        return names[(self.turn - 1) % len(names)]


class Gnb:
    """Every block at once."""

    turn = 0

    share = 8

    def __init__(self, subject: ProbeContext) -> None:
        self._subject = subject

    def run(self, part: Batch, step: TakenStep) -> GnbReport:
        """Probe once."""
        subject = self._subject
        sample = gnb_probe(
            subject.model,
            subject.block_map,
            part,
            draws=_GNB_DRAWS,
            generator=subject.source,
            sketcher=subject.sketcher,
            logits_fn=subject.logits_fn,
        )
        return GnbReport(sample, step.gradient_sketch, step.gradient_noise)


class ShardedGnb:
    """Every block at once, by all ranks together."""

    share = 8
    turn = 0

    def __init__(self, subject: ProbeContext, together: ShardReduction) -> None:
        self._subject = subject
        self._together = together

    def run(self, part: AbstractContextManager[Batch], step: TakenStep) -> GnbReport:
        """Probe once, in the context that gives `part`: a failure of one rank, there too, is raised on all."""
        subject, together = self._subject, self._together
        sample = sharded_gnb_probe(
            subject.model,
            subject.block_map,
            part,
            draws=_GNB_DRAWS,
            generator=subject.source,
            add=together.add,
            weights=together.weights,
            sketcher=subject.sketcher,
            logits_fn=subject.logits_fn,
        )
        own = step.gradient_sketch
        if own is None:  # this rank's share in what all add up, as a number that shows
            shape = len(subject.block_map.blocks), subject.sketcher.size
            own = torch.full(shape, math.nan, dtype=torch.float32, device="cpu")
        sketch = together.add(own.double()).float()
        return GnbReport(sample, sketch if sketch.isfinite().all() else None)


class Direction(_RoundRobin):
    """The whole step, and one block's part of it in turn."""

    share = 4

    def __init__(self, subject: ProbeContext) -> None:
        self._subject = subject

    def run(self, part: Batch, step: TakenStep) -> DirectionReport:
        """Probe once."""
        subject, moved = self._subject, step.displacement
        turn = self._next(subject.blocks)
        sample = direction_probe(subject.model, subject.block_map, part, moved, blocks=(turn,), loss_fn=subject.loss_fn)
        return DirectionReport(sample, self._update_ratio(moved))

    def _update_ratio(self, moved: Mapping[str, Tensor]) -> npt.NDArray[np.float32]:
        length, size = self._norms(moved), self._norms(self._subject.weights)
        return np.divide(length, size, out=np.zeros_like(length), where=size > 0).astype(np.float32)

    def _norms(self, tensors: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
        block_map = self._subject.block_map
        by_block = sum_by_index(squared_norms(block_map, tensors), block_map.block_of, len(block_map.blocks))
        norms: npt.NDArray[np.float64] = by_block.sqrt().numpy()
        return norms


class Hutchinson:
    """The block whose trace is known worst, from its newest probes, or that has waited for two rounds of all."""

    share = 8
    turn = 0

    def __init__(self, subject: ProbeContext) -> None:
        self._subject = subject
        self._draws: deque[tuple[str, Tensor]] = deque(maxlen=_WINDOW * len(subject.block_map.blocks))

    def run(self, part: Batch, step: TakenStep) -> HutchinsonSample:
        """Probe once."""
        del step
        subject = self._subject
        sample = hutchinson_probe(
            subject.model,
            subject.block_map,
            part,
            block=least_precise({block: self._relative_error(block) for block in subject.blocks}),
            draws=_HUTCHINSON_DRAWS,
            generator=subject.source,
            loss_fn=subject.loss_fn,
        )
        if sample.traces.isfinite().all():
            self._draws.append((sample.block, sample.traces.sum(1)))
        return sample

    def _relative_error(self, block: str) -> float:
        probed = [of for of, _ in self._draws]
        if block not in probed[-_ROUNDS * len(self._subject.blocks) :]:
            return math.inf  # never probed, or so long ago that the weights are others
        draws = [values for of, values in self._draws if of == block][-_WINDOW:]
        window = torch.stack(draws)[None]
        known = trace_estimates(window, torch.ones_like(window, dtype=torch.bool))
        return relative_error(float(known.value), float(known.stderr))


class Lanczos(_RoundRobin):
    """One block, or the whole model, for as many probes as its top eigenvalue takes; then the next.

    Each of them goes on from the Ritz vectors of the one before. No more is kept than these two, and on the host: what
    an accelerator holds between probes, the step may miss.
    """

    share = 8

    def __init__(self, subject: ProbeContext) -> None:
        self._subject = subject
        self._stay: tuple[str, Tensor, int] | None = None  # the block, its vectors, and the probes it has had

    def run(self, part: Batch, step: TakenStep) -> LanczosSample:
        """Probe once."""
        del step
        subject = self._subject
        stay, self._stay = self._stay, None  # where this fails, the next has its turn
        block, start, visits = stay or (self._next((*subject.blocks, "")), None, 0)
        sample = lanczos_probe(
            subject.model,
            subject.block_map,
            part,
            block=block,
            products=_PRODUCTS,
            generator=subject.source,
            start=start,
            loss_fn=subject.loss_fn,
        )
        settled = sample.top_residual <= _SETTLED * abs(sample.top)
        if not settled and visits + 1 < _VISITS and sample.vectors.isfinite().all():
            self._stay = (block, sample.vectors.cpu(), visits + 1)
        return replace(sample, vectors=torch.empty(2, 0, device="cpu"))  # they must not wait with the report


class LineSearch(_RoundRobin):
    """The whole step, and one block's part of it in turn."""

    share = 4

    def __init__(self, subject: ProbeContext) -> None:
        self._subject = subject

    def run(self, part: Batch, step: TakenStep) -> LineSearchSample:
        """Probe once."""
        subject, moved = self._subject, step.displacement
        turn = self._next(subject.blocks)
        return linesearch_probe(subject.model, subject.block_map, part, moved, blocks=(turn,), loss_fn=subject.loss_fn)


class Preconditioned:
    """The whole model; each probe goes on from the vector of the one before, which is kept on the host."""

    share = 8
    turn = 0

    def __init__(self, subject: ProbeContext) -> None:
        self._subject = subject
        self._vector: Tensor | None = None

    def run(self, part: Batch, step: TakenStep) -> PreconditionedSample:
        """Probe once."""
        del step
        subject = self._subject
        start, self._vector = self._vector, None  # where this fails, the next begins anew
        sample = preconditioned_probe(
            subject.model,
            subject.block_map,
            part,
            subject.optimizers,
            products=_PRODUCTS,
            generator=subject.source,
            start=start,
            loss_fn=subject.loss_fn,
        )
        if sample.vector.isfinite().all():
            self._vector = sample.vector.cpu()
        return replace(sample, vector=torch.empty(0, device="cpu"))  # it must not wait with the report


KINDS: Mapping[str, Callable[[ProbeContext], Probe]] = {
    "gnb": Gnb,
    "direction": Direction,
    "hutchinson": Hutchinson,
    "lanczos": Lanczos,
    "linesearch": LineSearch,
    "preconditioned": Preconditioned,
}
SHARDED: Mapping[str, Callable[[ProbeContext, ShardReduction], ShardedGnb]] = {"gnb": ShardedGnb}
PROBES = tuple(KINDS)
SHARDED_PROBES = tuple(SHARDED)  # that can run where no rank has whole parameters
DEFAULT_PROBES = ("gnb", "direction")
