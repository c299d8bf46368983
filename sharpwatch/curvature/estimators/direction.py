"""Curvature along the step that the optimizer has just taken.

Let d = θ_t − θ_{t+1}, with g and H at θ_{t+1}. To second order, g(θ_t)ᵀd = gᵀd + dᵀHd. The same holds for each block
with its rows of H. The curvature of block b alone, d_bᵀH_bb d_b, takes a product of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.batch import Batch, LossFn
from sharpwatch.curvature.objective.hessian import Method, open_hessian
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace


@dataclass(frozen=True, slots=True, eq=False)
class DirectionSample:
    """The result of one probe, on the CPU.

    Attributes:
        tokens: Number of predicting positions.
        rows: Number of rows.
        descent: g(θ_t)ᵀd.
        curvature: dᵀHd.
        block_descent: Float64 [B], g_b(θ_t)ᵀd_b.
        block_curvature: Float64 [B], d_bᵀH_bb d_b; NaN for a block that was not requested.
        method: How the products were computed.
    """

    tokens: int
    rows: int
    descent: float
    curvature: float
    block_descent: Tensor
    block_curvature: Tensor
    method: str


def direction_probe(  # noqa: PLR0913 - settings are keyword-only
    model: nn.Module,
    block_map: BlockMap,
    batch: Batch,
    displacement: Mapping[str, Tensor],
    *,
    blocks: Sequence[str],
    loss_fn: LossFn | None = None,
    method: Method = "auto",
) -> DirectionSample:
    """Measure the curvature along `displacement` at the present weights.

    It takes one Hessian-vector product for the whole model and one for each of `blocks`, and leaves `model`
    unchanged.

    Args:
        model: The model.
        block_map: The division of its parameters into blocks.
        batch: The arguments of the model.
        displacement: θ_t − θ_{t+1} by parameter name; a missing parameter has not moved.
        blocks: Block types whose own curvature is measured.
        loss_fn: Computes the loss; None to use the model's own.
        method: How derivatives are computed, see `open_hessian`.

    Returns:
        The curvature and the descent.

    Raises:
        ProbeError: There is no loss, every label is ignored, or the derivatives cannot be computed.
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
