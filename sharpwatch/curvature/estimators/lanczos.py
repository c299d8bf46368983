"""Lanczos iteration for the extreme eigenvalues of a symmetric operator, with warm starts and thick restarts.

It finds the largest *algebraic* eigenvalue. A Hessian is indefinite, and power iteration returns the most negative
eigenvalue if that is larger in magnitude. Lanczos (1950), with full orthogonalization and thick restarts as in Wu and
Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems" (2000). A Ritz value θ never exceeds
λ_max, and some eigenvalue is within its residual ‖Hu − θu‖ (Parlett, "The symmetric eigenvalue problem", theorem
4.5.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.batch import Batch, LossFn
from sharpwatch.curvature.objective.hessian import Hessian, Method, open_hessian
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.curvature.statistics.estimate import Spectrum
from sharpwatch.errors import ProbeError

Matvec = Callable[[Tensor], Tensor]  # [n] -> [n]
_BASIS_BYTES = 4 * 2**30
_MAX_BASIS, _MIN_BASIS = 48, 6  # vectors
_KEPT_PAIRS = 2  # Ritz vectors of each end that a restart keeps
_BREAKDOWN = 1e-6  # a residual below this fraction of ‖H‖ is rounding error: the space is invariant


@dataclass(frozen=True, slots=True, eq=False)
class RitzPair:
    """An approximate eigenpair.

    Attributes:
        value: The Ritz value λ.
        residual: ‖Hu − λu‖.
        vector: The Ritz vector u, [n] of length 1.
    """

    value: float
    residual: float
    vector: Tensor


class Lanczos:
    """A Krylov space that grows by one matrix-vector product at a time.

    Args:
        start: First vector [n], of any length.

    Attributes:
        products: Number of products so far.
    """

    def __init__(self, start: Tensor) -> None:
        capacity = _BASIS_BYTES // max(1, 4 * start.numel())
        self._capacity = min(_MAX_BASIS, max(_MIN_BASIS, capacity), start.numel())
        # Grown by doubling, since most iterations end after about a dozen products.
        self._basis = start.new_empty(min(self._capacity + 1, 8), start.numel())
        self._basis[0] = start / torch.linalg.vector_norm(start)
        self._projected = torch.zeros(self._capacity, self._capacity, dtype=torch.float64, device="cpu")  # VᵀHV
        self._used = 0  # number of basis vectors whose product is known
        self._residual_norm = math.inf  # norm of the last product's component outside of the space
        self._quadrature: tuple[Tensor, Tensor] | None = None
        self._restarted = False
        self._captured_norms: list[float] = [0.0]  # ‖VᵀHV‖²_F after each product
        self.products = 0

    @property
    def is_invariant(self) -> bool:
        """Whether the space is invariant under H, so that its Ritz values are eigenvalues."""
        return self.products > 0 and self._residual_norm == 0.0

    @property
    def is_full(self) -> bool:
        """Whether the next product needs a restart."""
        return self._used == self._capacity

    @property
    def captured_per_product(self) -> float:
        """The part of ‖H‖²_F that each of the last two products added to ‖VᵀHV‖²_F, on average."""
        return (self._captured_norms[-1] - self._captured_norms[-3]) / 2 if len(self._captured_norms) > 2 else math.inf

    @property
    def projection(self) -> tuple[Tensor, Tensor]:
        """V [k, n] with orthonormal rows, and VHVᵀ float64 [k, k]."""
        return self._basis[: self._used], self._projected[: self._used, : self._used]

    @property
    def next_vector(self) -> Tensor:
        """The basis vector [n] to be multiplied next."""
        return self._basis[self._used]

    def step(self, product: Matvec) -> None:
        """Multiply the next basis vector by H and extend the space."""
        if self.is_full:
            self._restart()
        image = product(self.next_vector)
        self.products += 1
        self._used += 1
        basis = self._basis[: self._used]
        coefficients = torch.zeros(self._used, dtype=torch.float64, device="cpu")
        # Against all earlier vectors, although exact arithmetic needs the last two alone: with rounding, eigenvectors
        # that have converged come back as copies otherwise.
        for _ in range(2):  # twice, because of rounding
            overlap = basis @ image
            image = image - overlap @ basis
            coefficients += overlap.double().cpu()
        self._projected[: self._used, self._used - 1] = coefficients
        self._projected[self._used - 1, : self._used] = coefficients
        self._captured_norms.append(float(self.projection[1].square().sum()))
        self._extend(image)
        # A restart replaces the random start by Ritz vectors, from which the weights of a density can't be read.
        if not self._restarted:
            values, vectors = self._decomposed()
            self._quadrature = values, vectors[0].square()

    def run(self, product: Matvec, products: int) -> None:
        """Take steps until the space has seen `products` products, or is invariant."""
        while self.products < products and not self.is_invariant:
            self.step(product)

    def top(self) -> RitzPair:
        """The pair with the largest Ritz value, a lower bound of λ_max."""
        return self._ritz_pair(-1)

    def bottom(self) -> RitzPair:
        """The pair with the smallest Ritz value, an upper bound of λ_min."""
        return self._ritz_pair(0)

    def converged(self, tolerance: float, bottom_tolerance: float | None = None) -> bool:
        """Whether the residuals of both ends are small enough.

        The sharper bound residual²/gap is not used, since it assumes that the Ritz values show every neighbour. On 36
        blocks with 12 starts each it stopped at an eigenvalue other than the largest in 2 % of the runs; a residual
        below 0.003 did in none.

        Args:
            tolerance: Largest residual of the top, relative to the larger end in magnitude.
            bottom_tolerance: The same for the bottom; None for the same value.

        Returns:
            Whether both converged, or the space is invariant.
        """
        top, bottom = self.top(), self.bottom()
        scale = max(abs(top.value), abs(bottom.value))
        bottom_limit = tolerance if bottom_tolerance is None else bottom_tolerance
        return self.is_invariant or (top.residual <= tolerance * scale and bottom.residual <= bottom_limit * scale)

    def spectrum(self) -> Spectrum | None:
        """The spectral density seen from the start, which must have been random; None before the first product.

        Its atoms are the eigenvalues of T, weighted by the squared first entries of its eigenvectors.
        """
        if self._quadrature is None:
            return None
        values, weights = self._quadrature
        return Spectrum(tuple(values.tolist()), tuple(weights.tolist()), draws=1)

    def _decomposed(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self._projected[: self._used, : self._used])
        return values, vectors

    def _ritz_pair(self, which: int) -> RitzPair:
        values, vectors = self._decomposed()
        weights = vectors[:, which]
        residual = self._residual_norm * abs(float(weights[-1]))
        vector = weights.to(self._basis) @ self._basis[: self._used]
        return RitzPair(float(values[which]), residual, vector)

    def _extend(self, image: Tensor) -> None:
        norm = float(torch.linalg.vector_norm(image))
        scale = float(self._projected[: self._used, : self._used].abs().max())
        if not math.isfinite(norm):
            raise ProbeError("a Hessian-vector product is not finite: the loss or its derivatives are not finite")
        # What is left is rounding: scaled up to a basis vector, it would be a direction of noise.
        if norm <= _BREAKDOWN * scale or self._used >= self._basis.shape[1]:
            self._residual_norm = 0.0
            return
        self._residual_norm = norm
        if self._used == len(self._basis):
            growth = min(self._capacity + 1, 2 * len(self._basis)) - len(self._basis)
            self._basis = torch.cat([self._basis, self._basis.new_empty(growth, self._basis.shape[1])])
        self._basis[self._used] = image / norm

    def _restart(self) -> None:
        """Continue from the Ritz vectors of both ends and the last residual vector, which span a Krylov space too."""
        values, vectors = self._decomposed()
        kept = [*range(_KEPT_PAIRS), *range(len(values) - _KEPT_PAIRS, len(values))]
        next_vector = self.next_vector.clone()
        self._basis[: len(kept)] = vectors[:, kept].T.to(self._basis) @ self._basis[: self._used]
        self._basis[len(kept)] = next_vector
        self._projected.zero_()
        self._projected[range(len(kept)), range(len(kept))] = values[kept]
        self._used = len(kept)
        self._restarted = True


@dataclass(frozen=True, slots=True, eq=False)
class LanczosSample:
    """The ends of the spectrum of H_bb on one batch.

    Attributes:
        block: The block type; "" for the whole model.
        tokens: Number of predicting positions.
        rows: Number of rows.
        top: Largest Ritz value.
        top_residual: Its residual.
        bottom: Smallest Ritz value.
        bottom_residual: Its residual.
        products: Number of Hessian-vector products.
        method: How the products were computed.
        vectors: Float32 [2, n_b], Ritz vectors of top and bottom, from which the next probe can start.
    """

    block: str
    tokens: int
    rows: int
    top: float
    top_residual: float
    bottom: float
    bottom_residual: float
    products: int
    method: str
    vectors: Tensor


def lanczos_probe(  # noqa: PLR0913 - settings are keyword-only
    model: nn.Module,
    block_map: BlockMap,
    batch: Batch,
    *,
    block: str,
    products: int,
    generator: torch.Generator,
    start: Tensor | None = None,
    loss_fn: LossFn | None = None,
    method: Method = "auto",
) -> LanczosSample:
    """Estimate the ends of the spectrum of H_bb; leaves `model` unchanged.

    Args:
        model: The model.
        block_map: The division of its parameters into blocks.
        batch: The arguments of the model.
        block: The block type; "" for the whole model.
        products: Largest number of Hessian-vector products.
        generator: Random generator of the first vector.
        start: `vectors` of an earlier sample to start from; None for random signs.
        loss_fn: Computes the loss; None to use the model's own.
        method: How derivatives are computed, see `open_hessian`.

    Returns:
        The extreme eigenvalues with their residuals.

    Raises:
        ProbeError: Every label is ignored, or the derivatives cannot be computed.
    """
    with open_hessian(model, block_map, [batch], loss_fn=loss_fn, method=method) as hessian:
        space = ParameterSpace(block_map, block or None, hessian.objective.live.leaves).require_trainable()
        # A warm start has both Ritz vectors in it, as its space must reach both ends. The gradient as a first start
        # saved no products, 5 against 4 to 5 (docs/log.md).
        initial = space.random_signs(generator) if start is None else start.to(space.device).sum(0)
        lanczos = Lanczos(initial)
        lanczos.run(hessian_matvec(hessian, space), products)
        top, bottom = lanczos.top(), lanczos.bottom()
        return LanczosSample(
            block=block,
            tokens=hessian.objective.tokens[0],
            rows=batch.rows,
            top=top.value,
            top_residual=top.residual,
            bottom=bottom.value,
            bottom_residual=bottom.residual,
            products=lanczos.products,
            method=hessian.method,
            vectors=torch.stack([top.vector, bottom.vector]),
        )


def hessian_matvec(hessian: Hessian, space: ParameterSpace) -> Matvec:
    """`hessian` restricted to `space`, as a function of one vector."""
    return lambda vector: hessian.products(space, vector[None])[0]
