"""Curvature along the step that the optimizer has just taken.

With d = θ_t − θ_{t+1}, and g and H at θ_{t+1}: g(θ_t)ᵀd = gᵀd + dᵀHd to second order, for each block alone with H's
row of it. Block b's own curvature d_bᵀH_bb d_b takes a product of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.hessian import Method, open_hessian
from sharpwatch.curvature.objective.outputs import LossFn
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace


@dataclass(frozen=True, slots=True, eq=False)
class DirectionSample:
    """One probe, on the CPU; `tokens` positions predict.

    `descent` is g(θ_t)ᵀd, `curvature` dᵀHd. `block_descent` float64 [B] are g_b(θ_t)ᵀd_b; `block_curvature` float64
    [B] are d_bᵀH_bb d_b, NaN for a block that was not asked for. `method` is how the products were had.
    """

    tokens: int
    rows: int
    descent: float
    curvature: float
    block_descent: Tensor
    block_curvature: Tensor
    method: str


def direction_probe(  # noqa: PLR0913 - what a probe is of, and how it is taken; each named
    model: nn.Module,
    block_map: BlockMap,
    batch: Batch,
    displacement: Mapping[str, Tensor],
    *,
    blocks: Sequence[str],
    loss_fn: LossFn | None = None,
    method: Method = "auto",
) -> DirectionSample:
    """Curvature along `displacement` (θ_t − θ_{t+1}, by parameter name) at the present weights.

    One product for the whole, and one for each of `blocks`; leaves no trace in `model`. A parameter that `displacement`
    lacks has not moved. Raises `ProbeError` where there is no loss, no position predicts, or no derivative can be had.
    """
    with open_hessian(model, block_map, [batch], loss_fn=loss_fn, method=method) as hessian:
        whole = ParameterSpace(block_map, None, hessian.objective.live.leaves)
        step = whole.flatten(displacement).to(whole.device, whole.dtype)
        curvature = whole.sum_by_block(step * hessian.products(whole, step[None])[0])
        descent = whole.sum_by_block(step * whole.flatten(hessian.gradient(0)))
        block_curvature = torch.full((len(block_map.blocks),), torch.nan, dtype=torch.float64, device="cpu")
        for block in blocks:
            space = ParameterSpace(block_map, block, hessian.objective.live.leaves)
            block_step = space.flatten(displacement).to(step)
            image = hessian.products(space, block_step[None])[0]
            block_curvature[block_map.blocks.index(block)] = (block_step.double() * image.double()).sum().cpu()
        tokens, method_used = hessian.objective.tokens[0], hessian.method
    at_start = descent + curvature
    return DirectionSample(
        tokens, batch.rows, float(at_start.sum()), float(curvature.sum()), at_start, block_curvature, method_used
    )
