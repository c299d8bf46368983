"""The built-in probes by name, and those of them that take products with the Hessian.

To add a probe to the agent, write a `Probe` and its `ProbeSpec`, and list the spec in `PROBES`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from google.protobuf.message import Message
from torch import Tensor

from sharpwatch.agent.probes.context import Probe, ProbeContext, ProbedStep, ProbeSpec
from sharpwatch.agent.probes.gnb import GNB
from sharpwatch.agent.probes.gradient_noise import GRADIENT_NOISE
from sharpwatch.curvature.estimators.directional import (
    DirectionSample,
    LineSearchSample,
    direction_probe,
    linesearch_probe,
)
from sharpwatch.curvature.estimators.hutchinson import HutchinsonSample, hutchinson_probe
from sharpwatch.curvature.estimators.lanczos import LanczosSample, lanczos_probe
from sharpwatch.curvature.estimators.preconditioned import PreconditionedSample, preconditioned_probe, require_adam
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.parameters.shards import squared_norms, sum_by_index
from sharpwatch.curvature.statistics.pooling import least_precise, relative_error, trace_estimates
from sharpwatch.v1 import agent_pb2
from sharpwatch.wire import encode

_HUTCHINSON_DRAWS = 2  # of several products each
_PRODUCTS = 6  # in one probe of a block: a first Lanczos iteration needs 6 to 15, one with a start vector 1 to 3
_VISITS = 6  # probes in a row of one block, at most
_SETTLED = 0.05  # residual over the top eigenvalue below which the next block has its turn
_ROUNDS = 2  # rounds of all blocks after which a trace is measured anew, however well it is known
_WINDOW = 8  # probes of a block that its trace is estimated from, as at the daemon


@dataclass(frozen=True, slots=True)
class DirectionReport:
    """A `direction` probe, and ‖d_b‖/‖θ_b‖ by block."""

    sample: DirectionSample
    update_ratio: npt.NDArray[np.float32]


class _RoundRobin(Probe):
    """Gives each block its turn, in order."""

    def _next(self, names: Sequence[str]) -> str:
        self.turn += 1
        return names[(self.turn - 1) % len(names)]


class DirectionProbe(_RoundRobin):
    """Probes the whole step, and the part of it in one block."""

    share = 4

    def before_step(self, step: ProbedStep) -> None:
        """Keeps the weights."""
        step.keep_weights()

    def run(self, rows: AbstractContextManager[Batch], step: ProbedStep) -> DirectionReport:
        """As `Probe.run`."""
        context = self.context
        with rows as batch:
            moved, block = step.displacement, self._next(context.blocks)
            sample = direction_probe(
                context.model, context.block_map, batch, moved, blocks=(block,), loss_fn=context.loss_fn
            )
            return DirectionReport(sample, self._update_ratio(moved))

    def _update_ratio(self, moved: Mapping[str, Tensor]) -> npt.NDArray[np.float32]:
        # A block of zeros, such as biases at the start, has no ratio; 0 says so without a warning.
        length, size = self._norms(moved), self._norms(self.context.weights)
        return np.divide(length, size, out=np.zeros_like(length), where=size > 0).astype(np.float32)

    def _norms(self, tensors: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
        block_map = self.context.block_map
        by_block = sum_by_index(squared_norms(block_map, tensors), block_map.block_of, len(block_map.blocks))
        norms: npt.NDArray[np.float64] = by_block.sqrt().numpy()
        return norms


class LineSearchProbe(_RoundRobin):
    """Searches along the whole step, and along the part of it in one block."""

    share = 4

    def before_step(self, step: ProbedStep) -> None:
        """Keeps the weights."""
        step.keep_weights()

    def run(self, rows: AbstractContextManager[Batch], step: ProbedStep) -> LineSearchSample:
        """As `Probe.run`."""
        context = self.context
        with rows as batch:
            moved, block = step.displacement, self._next(context.blocks)
            return linesearch_probe(
                context.model, context.block_map, batch, moved, blocks=(block,), loss_fn=context.loss_fn
            )


class HutchinsonProbe(Probe):
    """Probes the block whose trace estimate has the largest relative error.

    A block that was not probed for two rounds goes first.
    """

    def __init__(self, context: ProbeContext) -> None:
        super().__init__(context)
        self._draws: deque[tuple[str, Tensor]] = deque(maxlen=_WINDOW * len(context.block_map.blocks))

    def run(self, rows: AbstractContextManager[Batch], step: ProbedStep) -> HutchinsonSample:
        """As `Probe.run`."""
        del step
        context = self.context
        with rows as batch:
            sample = hutchinson_probe(
                context.model,
                context.block_map,
                batch,
                block=least_precise({block: self._relative_error(block) for block in context.blocks}),
                draws=_HUTCHINSON_DRAWS,
                generator=context.source,
                loss_fn=context.loss_fn,
            )
        # One draw that is not finite would make the block's error NaN for a whole window.
        if sample.traces.isfinite().all():
            self._draws.append((sample.block, sample.traces.sum(1)))
        return sample

    def _relative_error(self, block: str) -> float:
        probed = [of for of, _ in self._draws]
        if block not in probed[-_ROUNDS * len(self.context.blocks) :]:
            return math.inf  # never probed, or so long ago that the weights have changed
        draws = [values for of, values in self._draws if of == block][-_WINDOW:]
        window = torch.stack(draws)[None]
        known = trace_estimates(window, torch.ones_like(window, dtype=torch.bool))
        return relative_error(float(known.value), float(known.stderr))


class LanczosProbe(_RoundRobin):
    """Probes one block, or the whole model, until its top eigenvalue has settled; then the next.

    Each probe starts from the two Ritz vectors of the one before. No more than these is kept, and on the host: memory
    of an accelerator that is held between probes could be missing in the step.
    """

    def __init__(self, context: ProbeContext) -> None:
        super().__init__(context)
        self._unsettled: tuple[str, Tensor, int] | None = None  # the block, its vectors, and how many probes it had

    def run(self, rows: AbstractContextManager[Batch], step: ProbedStep) -> LanczosSample:
        """As `Probe.run`."""
        del step
        context = self.context
        with rows as batch:
            unsettled, self._unsettled = self._unsettled, None  # if this probe fails, the next block has its turn
            block, start, visits = unsettled or (self._next((*context.blocks, "")), None, 0)
            sample = lanczos_probe(
                context.model,
                context.block_map,
                batch,
                block=block,
                products=_PRODUCTS,
                generator=context.source,
                start=start,
                loss_fn=context.loss_fn,
            )
        settled = sample.top_residual <= _SETTLED * abs(sample.top)
        if not settled and visits + 1 < _VISITS and sample.vectors.isfinite().all():
            self._unsettled = (block, sample.vectors.cpu(), visits + 1)
        return replace(sample, vectors=torch.empty(2, 0, device="cpu"))  # not kept until the report is sent


class PreconditionedProbe(Probe):
    """Probes the whole model; each probe starts from the vector of the one before, which is kept on the host."""

    def __init__(self, context: ProbeContext) -> None:
        super().__init__(context)
        self._vector: Tensor | None = None

    def run(self, rows: AbstractContextManager[Batch], step: ProbedStep) -> PreconditionedSample:
        """As `Probe.run`."""
        del step
        context = self.context
        with rows as batch:
            start, self._vector = self._vector, None  # if this probe fails, the next has no start
            sample = preconditioned_probe(
                context.model,
                context.block_map,
                batch,
                context.optimizers,
                products=_PRODUCTS,
                generator=context.source,
                start=start,
                loss_fn=context.loss_fn,
            )
        if sample.vector.isfinite().all():
            self._vector = sample.vector.cpu()
        return replace(sample, vector=torch.empty(0, device="cpu"))  # not kept until the report is sent


def _encode(
    message: Callable[..., Message], names: Collection[str], sample: object, seconds: float, **others: Any
) -> Message:
    """Makes the message of a sample.

    Args:
        message: The class of the message.
        names: Its fields that are attributes of the sample by the same name; tensors become float64 arrays.
        sample: What an estimator returned.
        seconds: How long the probe took.
        **others: Its other fields.
    """
    values = {name: getattr(sample, name) for name in ("tokens", "rows", *names)}
    arrays = {name: encode(v.cpu().numpy(), "float64") for name, v in values.items() if isinstance(v, Tensor)}
    return message(**values | arrays | others, seconds=seconds)


def _encode_direction(report: DirectionReport, seconds: float) -> Message:
    sample = report.sample
    return _encode(
        agent_pb2.DirectionProbe,
        ("block_descent", "block_curvature", "method", "curvature_parts"),
        sample,
        seconds,
        descent=float(sample.descent),
        curvature=float(sample.curvature),
        update_ratio=encode(report.update_ratio, "float32"),
    )


_encode_hutchinson = partial(_encode, agent_pb2.HutchinsonProbe, ("block", "traces", "method"))
_encode_lanczos = partial(
    _encode, agent_pb2.LanczosProbe, ("block", "top", "top_residual", "bottom", "bottom_residual", "products", "method")
)
_encode_line_search = partial(
    _encode, agent_pb2.LineSearchProbe, ("sharpness", "half_width", "block_sharpness", "block_half_width")
)
_encode_preconditioned = partial(_encode, agent_pb2.PreconditionedProbe, ("ratio", "residual", "products", "method"))

DEFAULT_PROBES = ("gnb", "direction")
PROBES: dict[str, ProbeSpec] = {
    spec.name: spec
    for spec in (
        GNB,
        ProbeSpec(name="direction", runner=DirectionProbe, encode=_encode_direction),
        ProbeSpec(name="hutchinson", runner=HutchinsonProbe, encode=_encode_hutchinson),
        ProbeSpec(name="lanczos", runner=LanczosProbe, encode=_encode_lanczos),
        ProbeSpec(name="linesearch", runner=LineSearchProbe, encode=_encode_line_search),
        GRADIENT_NOISE,
        ProbeSpec(name="preconditioned", runner=PreconditionedProbe, encode=_encode_preconditioned, check=require_adam),
    )
}


def sharded_probes() -> tuple[str, ...]:
    """Returns the names of the probes that can run where no rank holds whole parameters."""
    return tuple(name for name, spec in PROBES.items() if spec.sharded_runner is not None)
