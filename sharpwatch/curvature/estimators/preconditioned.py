"""The top eigenvalue of Adam's preconditioned Hessian, in units of the edge of stability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.estimators.lanczos import Lanczos, Matvec
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.hessian import Hessian, Method, open_hessian
from sharpwatch.curvature.objective.next_step import preconditioner
from sharpwatch.curvature.objective.outputs import LossFn
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace


@dataclass(frozen=True, slots=True, eq=False)
class PreconditionedSample:
    """One probe of the whole model: `ratio` is 1 at the edge; `vector` float32 [n] starts the next probe."""

    tokens: int
    rows: int
    ratio: float
    residual: float
    products: int
    method: str
    vector: Tensor


def preconditioned_probe(  # noqa: PLR0913 - what a probe is of, and how it is taken; each named
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
    """At most `products` Lanczos steps with D H D, D from the optimizers' present rates and second moments.

    Raises `ProbeError` for an optimizer that is not of Adam's family or has not stepped yet.
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
    """The product with D H D within `space`, D the diagonal of `scales`."""
    diagonal = space.flatten(diagonals)
    return lambda vector: diagonal * hessian.products(space, (diagonal * vector)[None])[0]
