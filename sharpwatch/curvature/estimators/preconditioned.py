"""The top eigenvalue of Adam's preconditioned Hessian DHD, in units of the edge of stability.

Cohen et al., "Adaptive gradient methods at the edge of stability", arXiv 2207.14484; `preconditioner` gives D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.estimators.lanczos import Lanczos, Matvec
from sharpwatch.curvature.objective.batch import Batch, LossFn
from sharpwatch.curvature.objective.hessian import Hessian, Method, open_hessian
from sharpwatch.curvature.objective.next_step import preconditioner
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace


@dataclass(frozen=True, slots=True, eq=False)
class PreconditionedSample:
    """The result of one probe of the whole model.

    Attributes:
        tokens: Number of predicting positions.
        rows: Number of rows.
        ratio: λ_max(DHD); 1 is the edge of stability.
        residual: Residual of the Ritz pair.
        products: Number of Hessian-vector products.
        method: How the products were computed.
        vector: Float32 [n], the Ritz vector, from which the next probe can start.
    """

    tokens: int
    rows: int
    ratio: float
    residual: float
    products: int
    method: str
    vector: Tensor


def preconditioned_probe(  # noqa: PLR0913 - settings are keyword-only
    model: nn.Module,
    block_map: BlockMap,
    batch: Batch,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    products: int,
    generator: torch.Generator,
    start: Tensor | None = None,
    loss_fn: LossFn | None = None,
    method: Method = "auto",
) -> PreconditionedSample:
    """Estimate the largest eigenvalue of DHD by Lanczos iteration; leaves `model` unchanged.

    Args:
        model: The model.
        block_map: The division of its parameters into blocks.
        batch: The arguments of the model.
        optimizers: The optimizers, whose present learning rates and second moments give D.
        products: Largest number of Hessian-vector products.
        generator: Random generator of the first vector.
        start: `vector` of an earlier sample to start from; None for random signs.
        loss_fn: Computes the loss; None to use the model's own.
        method: How derivatives are computed, see `open_hessian`.

    Returns:
        The eigenvalue with its residual.

    Raises:
        ProbeError: An optimizer is not a variant of Adam, or has not stepped yet.
    """
    scales = preconditioner(model, optimizers)
    with open_hessian(model, block_map, [batch], loss_fn=loss_fn, method=method) as hessian:
        space = ParameterSpace(block_map, None, hessian.objective.live.leaves).require_trainable()
        lanczos = Lanczos(space.random_signs(generator) if start is None else start.to(space.device))
        while lanczos.products < products and not lanczos.is_invariant:
            lanczos.step(preconditioned_matvec(hessian, space, scales))
        top = lanczos.top()
        return PreconditionedSample(
            tokens=hessian.objective.tokens[0],
            rows=batch.rows,
            ratio=top.value,
            residual=top.residual,
            products=lanczos.products,
            method=hessian.method,
            vector=top.vector,
        )


def preconditioned_matvec(hessian: Hessian, space: ParameterSpace, diagonals: Mapping[str, Tensor]) -> Matvec:
    """The product with DHD within `space` as a function of one vector; `diagonals` are D by parameter name."""
    diagonal = space.flatten(diagonals)
    return lambda vector: diagonal * hessian.products(space, (diagonal * vector)[None])[0]
