"""Hutchinson's estimator of the trace of each Hessian block: zᵀHz with random signs z is unbiased for Tr(H_bb).

Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990). Each block has its own probe vector:
one vector over all blocks would add Σ_c ‖H_bc‖²_F to the variance of block b, which is a thousand times more for
`norm`. One draw is the mean over mirror images of a vector, in which products between different matrices of a layer
cancel (`ParameterSpace.mirrored`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.batch import Batch, LossFn
from sharpwatch.curvature.objective.hessian import Hessian, Method, open_hessian
from sharpwatch.curvature.objective.objective import Objective
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace

_DOT_ENTRIES = 2**18
_BASE_PAIRS = 3  # pairs of evaluations of L(θ), whose rounding error all draws share
_CHANGE_IN_ROUNDINGS = 256  # target of ½ε²zᵀHz, in units of the loss's rounding error
_MAX_RELATIVE_STEP = 0.1  # ε relative to the root mean square of the block's weights
_RELATIVE_NUDGE = 1e-6  # relative to the weights' root mean square: changes the rounding, not the loss
_MAX_DISAGREEMENT = 0.05  # of loss differences and an exact product; five times the float32 error of a smooth loss


@dataclass(frozen=True, slots=True, eq=False)
class HutchinsonSample:
    """The result of one probe of one block.

    Attributes:
        block: The block type.
        tokens: Number of predicting positions.
        rows: Number of rows.
        traces: Float64 [draws, L] on the CPU, zero for layer blocks of other types.
        method: How the products were computed.
    """

    block: str
    tokens: int
    rows: int
    traces: Tensor
    method: str


def hutchinson_probe(  # noqa: PLR0913 - settings are keyword-only
    model: nn.Module,
    block_map: BlockMap,
    batch: Batch,
    *,
    block: str,
    draws: int,
    generator: torch.Generator,
    loss_fn: LossFn | None = None,
    method: Method = "auto",
) -> HutchinsonSample:
    """Draw the trace of H_bb for each layer block of one type; leaves `model` unchanged.

    Args:
        model: The model.
        block_map: The division of its parameters into blocks.
        batch: The arguments of the model.
        block: The block type.
        draws: Number of draws.
        generator: Random generator of the probe vectors.
        loss_fn: Computes the loss; None to use the model's own.
        method: How derivatives are computed, see `open_hessian`.

    Returns:
        The draws.

    Raises:
        ProbeError: Every label is ignored, or the derivatives cannot be computed.
    """
    with open_hessian(model, block_map, [batch], loss_fn=loss_fn, method=method) as hessian:
        space = ParameterSpace(block_map, block, hessian.objective.live.leaves).require_trainable()
        # zᵀHz is a sum over layers, and each summand is unbiased for the trace of its own diagonal block.
        traces = [
            quadratic_forms(hessian, space, space.mirrored(space.random_signs(generator)), 0) for _ in range(draws)
        ]
        return HutchinsonSample(block, hessian.objective.tokens[0], batch.rows, torch.stack(traces), hessian.method)


def quadratic_forms(hessian: Hessian, space: ParameterSpace, patterns: Tensor, index: int) -> Tensor:
    """Compute one draw on one batch by Hessian-vector products.

    Args:
        hessian: The Hessian.
        space: The parameters of the block.
        patterns: Probe vectors [K, size].
        index: The batch.

    Returns:
        The mean of zᵀHz over the probe vectors by layer block; float64 [L] on the CPU.
    """
    return space.sum_by_layer(patterns * hessian.products(space, patterns, index)).mean(0)


class Deflation:
    """A control variate for the draws of a block, from a Krylov space V of H_bb: zᵀPHPz − E zᵀPHPz with P = VᵀV.

    Its coefficient is 1, and it is unbiased for any V that is independent of z. It removes the variance that the
    extreme eigenvalues cause. It does no harm if their vectors lie along single weights, which random signs measure
    exactly; projecting z would, for a nearly diagonal H. Meyer et al., "Hutch++" (2021) project; Chen and Hallman,
    "Krylov-aware stochastic trace estimation" (2023), take V from Lanczos too.

    Args:
        space: The parameters of the block.
        basis: V, [k, size] with orthonormal rows.
        projected: VHVᵀ, [k, k].
    """

    def __init__(self, space: ParameterSpace, basis: Tensor, projected: Tensor) -> None:
        self._space = space
        self._basis = basis  # [k, size]
        self._projected = projected.to(basis)  # [k, k]
        # For random signs E zᵀAz is Tr A, whatever lies off the diagonal.
        self._expected = space.sum_by_layer(((self._projected @ basis) * basis).sum(0, keepdim=True))[0]

    def control_variate_total(self, patterns: Tensor) -> float:
        """The sum of `control_variate` over the layer blocks, at lower cost."""
        coefficients = patterns @ self._basis.T
        return float(((coefficients @ self._projected) * coefficients).sum(1).mean().double() - self._expected.sum())

    @property
    def numel(self) -> int:
        """Number of entries of the basis."""
        return self._basis.numel()

    def control_variate(self, patterns: Tensor) -> Tensor:
        """Mean over `patterns` [K, size] of zᵀPHPz, minus its expectation, by layer block; float64 [L] on the CPU."""
        images = (patterns @ self._basis.T @ self._projected) @ self._basis
        return self._space.sum_by_layer(patterns * images).mean(0) - self._expected


@dataclass(frozen=True, slots=True)
class BaseLoss:
    """L_i(θ) with its rounding error: the mean of several evaluations, and the standard error of that mean."""

    value: float
    stderr: float

    @classmethod
    def of(cls, objective: Objective, index: int, space: ParameterSpace, generator: torch.Generator) -> BaseLoss:
        """Evaluate in pairs at points slightly to both sides of θ, so that the slope cancels.

        Args:
            objective: The loss.
            index: The batch.
            space: The parameters of the whole model.
            generator: Random generator of the directions.
        """
        means = []
        for _ in range(_BASE_PAIRS):
            # At the same weights the same rounding would come out each time.
            nudge = _RELATIVE_NUDGE * space.weight_scale * space.random_signs(generator)
            losses = []
            for displacement in (nudge, -nudge):
                with objective.displaced(space, displacement):
                    losses.append(objective.value(index))
            means.append(math.fsum(losses) / 2)
        spread = float(torch.tensor(means, dtype=torch.float64, device="cpu").std())
        # Few evaluations can agree by chance, so the spread alone would call a rounded loss exact.
        resolution = torch.finfo(space.dtype).eps * abs(means[0]) / 4
        return cls(math.fsum(means) / _BASE_PAIRS, max(spread, resolution) / math.sqrt(_BASE_PAIRS))


@dataclass(frozen=True, slots=True, eq=False)
class LossDifferences:
    """Quadratic forms from one forward each: zᵀHz = 2(L(θ + εz) − L(θ) − ε gᵀz)/ε², much cheaper than a product.

    The third-order term is odd in z and averages out. The fourth-order term is below 0.2 % (measured) if ½ε²zᵀHz is a
    few hundred times the rounding error of the loss. No derivative but g is needed, so any kernel works.

    Attributes:
        objective: The loss.
        bases: L_i(θ) of each batch.
        gradients: g of each batch, [size]; None to take the mean over z and −z instead, at twice the cost.
        step: ε.
    """

    objective: Objective
    bases: Sequence[BaseLoss]
    gradients: Sequence[Tensor] | None
    step: float

    @classmethod
    def scaled(
        cls,
        objective: Objective,
        space: ParameterSpace,
        *,
        bases: Sequence[BaseLoss],
        gradients: Sequence[Tensor] | None,
        curvature: float,
    ) -> LossDifferences:
        """Choose ε by the expected size `curvature` of zᵀHz."""
        # The error of a single evaluation, from that of the mean over 2·_BASE_PAIRS of them.
        rounding = max(base.stderr * math.sqrt(2 * _BASE_PAIRS) for base in bases)
        rounding = max(rounding, torch.finfo(space.dtype).eps * max(abs(base.value) for base in bases))
        max_step = _MAX_RELATIVE_STEP * space.weight_scale
        step = math.sqrt(2 * _CHANGE_IN_ROUNDINGS * rounding / curvature) if curvature > 0 else math.inf
        return cls(objective, bases, gradients, min(step, max_step))

    @property
    def stderr(self) -> float:
        """The error that the rounding of L_i(θ) adds to every draw alike."""
        return (
            2
            * math.hypot(*(b.stderr * w for b, w in zip(self.bases, self.objective.shares, strict=True)))
            / self.step**2
        )

    def draw(self, space: ParameterSpace, patterns: Tensor, index: int) -> float:
        """One draw of Tr(H_bb) on batch `index`, from probe vectors `patterns` [K, size]."""
        forms = [self._form(space, pattern, index) for pattern in patterns]
        return math.fsum(forms) / len(forms)

    def agrees(self, space: ParameterSpace, signs: Tensor, exact: float, curvature: float) -> bool:
        """Whether the mean for z and −z is the `exact` zᵀHz up to 5 % of `curvature`; false for a loss with jumps."""
        # z and −z together: the term of third order averages out over draws, but would decide about a single one.
        forms = [
            share * (self._form(space, signs, index) + self._form(space, -signs, index)) / 2
            for index, share in enumerate(self.objective.shares)
        ]
        return abs(math.fsum(forms) - exact) <= _MAX_DISAGREEMENT * curvature + 4 * self.stderr

    def _form(self, space: ParameterSpace, vector: Tensor, index: int) -> float:
        rise = self._rise(space, vector, index)
        if self.gradients is None:
            rise = (rise + self._rise(space, -vector, index)) / 2
        else:
            rise -= self.step * _dot_in_pieces(self.gradients[index], vector)
        return 2 * rise / self.step**2

    def _rise(self, space: ParameterSpace, vector: Tensor, index: int) -> float:
        with self.objective.displaced(space, self.step * vector):
            return self.objective.value(index) - self.bases[index].value


def _dot_in_pieces(left: Tensor, right: Tensor) -> float:
    """⟨left, right⟩ in float32, piece by piece: over many millions of entries a single call is off by about 1e-4."""
    return math.fsum(
        float(a @ b) for a, b in zip(torch.split(left, _DOT_ENTRIES), torch.split(right, _DOT_ENTRIES), strict=True)
    )
