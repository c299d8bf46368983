"""Traces of a Hessian's blocks from random signs in the block alone: zᵀHz is unbiased for Tr(H_bb).

Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990). A probe over all blocks at once would
add Σ_c ‖H_bc‖²_F to the variance of block b, which is a thousand times as much for `norm`. Signs come in patterns that
cancel the products of different matrices of a layer (`ParameterSpace.patterns`); one draw is the mean over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.hessian import Hessian, Method, open_hessian
from sharpwatch.curvature.objective.objective import Objective
from sharpwatch.curvature.objective.outputs import LossFn
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace

_DOT_ENTRIES = 2**18
_BASE_PAIRS = 3  # of evaluations of L(θ): what rounding makes of it is common to all draws
_CHANGE_IN_ROUNDINGS = 256  # ½ε²zᵀHz in units of the loss's rounding
_MAX_RELATIVE_STEP = 0.1  # ε over the root mean square of the block's weights
_RELATIVE_NUDGE = 1e-6  # over the weights' root mean square: moves the rounding, not the loss
_MAX_DISAGREEMENT = 0.05  # of loss differences and exact product; 5 times what float32 makes of a smooth loss


@dataclass(frozen=True, slots=True, eq=False)
class HutchinsonSample:
    """One probe of one block: float64 [draws, L] on the CPU, zero for layer blocks of other types."""

    block: str
    tokens: int
    rows: int
    traces: Tensor
    method: str


def hutchinson_probe(  # noqa: PLR0913 - what a probe is of, and how it is taken; each named
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
    """`draws` draws of Tr(H_bb) by layer block, with products; leaves no trace in `model`.

    Raises `ProbeError` where no position predicts or no derivative can be had.
    """
    with open_hessian(model, block_map, [batch], loss_fn=loss_fn, method=method) as hessian:
        space = ParameterSpace(block_map, block, hessian.objective.live.leaves).require_trainable()
        traces = [
            quadratic_forms(hessian, space, space.mirrored(space.random_signs(generator)), 0) for _ in range(draws)
        ]
        return HutchinsonSample(block, hessian.objective.tokens[0], batch.rows, torch.stack(traces), hessian.method)


def quadratic_forms(hessian: Hessian, space: ParameterSpace, patterns: Tensor, index: int) -> Tensor:
    """One draw on batch `index` from `patterns` [K, size] by products: zᵀHz by layer block; float64 [L] on the CPU."""
    return space.sum_by_layer(patterns * hessian.products(space, patterns, index)).mean(0)


class Deflation:
    """What a Krylov space V of H_bb knows, taken out of each draw: zᵀPHPz − E zᵀPHPz with P = VᵀV.

    A control variate with the coefficient 1: unbiased whatever V is, as long as z is drawn apart from it. It takes away
    what the extreme eigenvalues put into the variance, and nothing where their vectors lie along single weights, which
    random signs measure exactly: a near-diagonal H is not made worse, as projecting z would. Meyer et al., "Hutch++"
    (2021) project; Chen and Hallman, "Krylov-aware stochastic trace estimation" (2023), take V from Lanczos too.
    """

    def __init__(self, space: ParameterSpace, basis: Tensor, projected: Tensor) -> None:
        self._space = space
        self._basis = basis  # [k, size]
        self._projected = projected.to(basis)  # [k, k]
        self._expected = space.sum_by_layer(((self._projected @ basis) * basis).sum(0, keepdim=True))[0]

    def control_variate_total(self, patterns: Tensor) -> float:
        """The same of all layers together, for less."""
        coefficients = patterns @ self._basis.T
        return float(((coefficients @ self._projected) * coefficients).sum(1).mean().double() - self._expected.sum())

    @property
    def numel(self) -> int:
        """Numbers that it keeps."""
        return self._basis.numel()

    def control_variate(self, patterns: Tensor) -> Tensor:
        """The mean over `patterns` [K, size], less its expectation, by layer block; float64 [L] on the CPU."""
        images = (patterns @ self._basis.T @ self._projected) @ self._basis
        return self._space.sum_by_layer(patterns * images).mean(0) - self._expected


@dataclass(frozen=True, slots=True)
class BaseLoss:
    """L_i(θ) as the mean of several roundings of it, and the error of that mean."""

    value: float
    stderr: float

    @classmethod
    def of(cls, objective: Objective, index: int, space: ParameterSpace, generator: torch.Generator) -> BaseLoss:
        """From pairs of evaluations a little to both sides of θ, whose slope cancels; `space` is the whole model's."""
        means = []
        for _ in range(_BASE_PAIRS):
            nudge = _RELATIVE_NUDGE * space.weight_scale * space.random_signs(generator)
            losses = []
            for displacement in (nudge, -nudge):
                with objective.displaced(space, displacement):
                    losses.append(objective.value(index))
            means.append(math.fsum(losses) / 2)
        spread = float(torch.tensor(means, dtype=torch.float64, device="cpu").std())
        resolution = torch.finfo(space.dtype).eps * abs(means[0]) / 4
        return cls(math.fsum(means) / _BASE_PAIRS, max(spread, resolution) / math.sqrt(_BASE_PAIRS))


@dataclass(frozen=True, slots=True, eq=False)
class LossDifferences:
    """zᵀHz from one forward a batch: 2(L(θ + εz) − L(θ) − ε gᵀz)/ε², for a fraction of what a product takes.

    The third-order term is odd in z and averages out; of the fourth order, what is left is below 0.2 % (measured) as
    long as ½ε²zᵀHz is kept at a few hundred roundings of the loss. Needs no derivative but g, and any kernel will do.
    Without `gradients` each form is the mean of z's and −z's, at twice the price.
    """

    objective: Objective
    bases: Sequence[BaseLoss]  # of each batch
    gradients: Sequence[Tensor] | None  # of each batch, [size]
    step: float  # ε

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
        """With ε from the size that zᵀHz is expected to have."""
        rounding = max(base.stderr * math.sqrt(2 * _BASE_PAIRS) for base in bases)
        rounding = max(rounding, torch.finfo(space.dtype).eps * max(abs(base.value) for base in bases))
        max_step = _MAX_RELATIVE_STEP * space.weight_scale
        step = math.sqrt(2 * _CHANGE_IN_ROUNDINGS * rounding / curvature) if curvature > 0 else math.inf
        return cls(objective, bases, gradients, min(step, max_step))

    @property
    def stderr(self) -> float:
        """What the errors of the L_i(θ) make of every draw alike."""
        return (
            2
            * math.hypot(*(b.stderr * w for b, w in zip(self.bases, self.objective.shares, strict=True)))
            / self.step**2
        )

    def draw(self, space: ParameterSpace, patterns: Tensor, index: int) -> float:
        """One draw of Tr(H_bb) on batch `index` from `patterns` [K, size]."""
        forms = [self._form(space, pattern, index) for pattern in patterns]
        return math.fsum(forms) / len(forms)

    def agrees(self, space: ParameterSpace, signs: Tensor, exact: float, curvature: float) -> bool:
        """Whether the mean of z and −z is the `exact` zᵀHz, to 5 % of `curvature`: for a loss that jumps it is not."""
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
            rise -= self.step * _dot(self.gradients[index], vector)
        return 2 * rise / self.step**2

    def _rise(self, space: ParameterSpace, vector: Tensor, index: int) -> float:
        with self.objective.displaced(space, self.step * vector):
            return self.objective.value(index) - self.bases[index].value


def _dot(left: Tensor, right: Tensor) -> float:
    """⟨left, right⟩ in float32 by pieces: of many millions of entries in one call it is off by parts in 10⁴."""
    return math.fsum(
        float(a @ b) for a, b in zip(torch.split(left, _DOT_ENTRIES), torch.split(right, _DOT_ENTRIES), strict=True)
    )
