"""The top eigenvalue of Adam's preconditioned Hessian DHD, in units of the edge of stability.

Cohen et al., "Adaptive gradient methods at the edge of stability", arXiv 2207.14484; `preconditioner` gives D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.estimators.lanczos import Lanczos, Matvec
from sharpwatch.curvature.objective.batch import Batch, LossFn
from sharpwatch.curvature.objective.hessian import Hessian, Method, open_hessian
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.errors import ProbeError


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
    # Before the Hessian is opened: without a second moment nothing is to run.
    scales = preconditioner(model, optimizers)
    with open_hessian(model, block_map, [batch], loss_fn=loss_fn, method=method) as hessian:
        space = ParameterSpace(block_map, None, hessian.objective.live.leaves).require_trainable()
        lanczos = Lanczos(space.random_signs(generator) if start is None else start.to(space.device))
        lanczos.run(preconditioned_matvec(hessian, space, scales), products)
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
    # DHD is symmetric, as Lanczos needs, and has the eigenvalues of D²H, which is what Adam's step sees.
    diagonal = space.flatten(diagonals)
    return lambda vector: diagonal * hessian.products(space, (diagonal * vector)[None])[0]


def preconditioner(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Compute the diagonal D = (η(1 − β₁) / ((2 + 2β₁)(√v̂ + ε)))^½ of Adam and its variants.

    λ_max(DHD) is 1 at the edge of stability (Cohen et al., "Adaptive gradient methods at the edge of stability", arXiv
    2207.14484, equation 3).

    Args:
        model: The model.
        optimizers: Its optimizers.

    Returns:
        Entries of D by parameter name, each of the parameter's shape; zero for a parameter that never had a gradient.

    Raises:
        ProbeError: An optimizer has no second moment, or has not stepped yet.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: _preconditioner_diagonal(optimizer, group, parameter, names[id(parameter)])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in names and parameter.requires_grad
    }


def require_adam(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Check that every optimizer is a variant of Adam: its groups have `lr`, `betas` and `eps`.

    Raises:
        ProbeError: One is not.
    """
    for optimizer in optimizers:
        if not all({"betas", "eps", "lr"} <= set(group) for group in optimizer.param_groups):
            raise ProbeError(
                f"preconditioned needs Adam or a variant with betas and eps, got {type(optimizer).__name__}; "
                "direction and linesearch work with any optimizer"
            )


def _preconditioner_diagonal(
    optimizer: torch.optim.Optimizer, group: Mapping[str, object], parameter: Tensor, name: str
) -> Tensor:
    require_adam([optimizer])
    state = optimizer.state.get(parameter, {})
    # AMSGrad divides by the running maximum.
    moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if moment is None and optimizer.state:  # the parameter never had a gradient, so Adam does not move it
        return torch.zeros_like(parameter, dtype=torch.float32)
    if not isinstance(moment, Tensor) or moment.shape != parameter.shape:
        raise ProbeError(f"{type(optimizer).__name__} has no second moment of {name} yet: take an optimizer step first")
    (first, second), epsilon, rate = cast("Any", (group["betas"], group["eps"], group["lr"]))
    # Without a count of steps the moment is taken as it is: β₂^∞ = 0.
    correction = 1 - float(second) ** float(state.get("step", torch.inf))
    # With momentum as an average the edge is at (2 + 2β₁)/(1 − β₁) over the rate, so D² is Adam's rate over that.
    root: Tensor = (moment.float() / correction).sqrt().add_(float(epsilon))
    return root.reciprocal_().mul_(float(rate) * (1 - float(first)) / (2 + 2 * float(first))).sqrt_()
