"""Critical sharpness: the inverse of the smallest multiple of a step that raises the loss. Forwards only, any kernel.

Kalra et al., arXiv 2601.16979: λ_c = 1/c, c the smallest scale with L(θ − c·d) > L(θ). Written from the definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.objective import Objective
from sharpwatch.curvature.objective.outputs import LossFn
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.curvature.state.isolation import isolated

_DOUBLINGS = 12  # the search ends at 2^±12 times the step
_BISECTIONS = 4  # from a factor of two to a sixteenth


@dataclass(frozen=True, slots=True)
class CriticalSharpness:
    """1/c and half of its bracket; a step that raises the loss has more than 1.

    Zero: no scale in reach raises it. With an infinite bracket the least that was tried does: the step may ascend.
    NaN: the loss itself is not finite.
    """

    value: float
    half_width: float
    forwards: int


@dataclass(frozen=True, slots=True, eq=False)
class LineSearchSample:
    """One probe; the tensors are float64 [B], NaN for a block that was not asked for."""

    tokens: int
    rows: int
    sharpness: float
    half_width: float
    block_sharpness: Tensor
    block_half_width: Tensor


def linesearch_probe(  # noqa: PLR0913 - what a probe is of, and how it is taken; each named
    model: nn.Module,
    block_map: BlockMap,
    batch: Batch,
    displacement: Mapping[str, Tensor],
    *,
    blocks: Sequence[str],
    loss_fn: LossFn | None = None,
) -> LineSearchSample:
    """Along `displacement` (θ_t − θ_{t+1}, by parameter name), from θ_t, which the model has already left.

    For the whole step, and for each of `blocks` with the others held at θ_t; leaves no trace in `model`.
    """
    values, widths = (
        torch.full((len(block_map.blocks),), torch.nan, dtype=torch.float64, device="cpu") for _ in range(2)
    )
    with isolated(model, exact=True) as live:
        objective = Objective(live, [batch], loss_fn)
        whole = ParameterSpace(block_map, None, live.leaves)
        displacement_vector = whole.flatten(
            {name: step.to(whole.device, torch.float32) for name, step in displacement.items()}
        )
        whole_step = critical_sharpness_along(objective, whole, displacement_vector, origin=displacement_vector)
        for block in blocks:
            index = block_map.blocks.index(block)
            block_step = critical_sharpness_along(
                objective, whole, displacement_vector * whole.mask(block), origin=displacement_vector
            )
            values[index], widths[index] = block_step.value, block_step.half_width
        return LineSearchSample(
            objective.tokens[0], batch.rows, whole_step.value, whole_step.half_width, values, widths
        )


def critical_sharpness_along(
    objective: Objective, space: ParameterSpace, step: Tensor, origin: Tensor | None = None
) -> CriticalSharpness:
    """Critical sharpness of `step` [space.size] from the present weights plus `origin`."""

    def loss(scale: float) -> float:
        offset = -scale * step if origin is None else origin - scale * step
        with objective.displaced(space, offset):
            values = [share * objective.value(index) for index, share in enumerate(objective.shares)]
        return sum(values)

    return critical_sharpness(loss)


def critical_sharpness(loss: Callable[[float], float]) -> CriticalSharpness:
    """From the loss as a function of the step's scale: doubled or halved from 1, then bisected to 1/16."""
    start = loss(0.0)
    forwards = 1
    if not math.isfinite(start):
        return CriticalSharpness(math.nan, math.nan, forwards)

    def rises(scale: float) -> bool:
        nonlocal forwards
        forwards += 1
        return not loss(scale) <= start  # a loss that is no number has risen

    high = 1.0
    factor = 0.5 if rises(high) else 2.0
    for _ in range(_DOUBLINGS):
        high *= factor
        if rises(high) == (factor > 1):
            break
    else:
        return CriticalSharpness(0.0 if factor > 1 else 1 / high, 1 / high if factor > 1 else math.inf, forwards)
    low, high = (high, 2 * high) if factor < 1 else (high / 2, high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if rises(middle) else (middle, high)
    return CriticalSharpness((1 / low + 1 / high) / 2, (1 / low - 1 / high) / 2, forwards)
