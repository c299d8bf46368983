"""The losses that `gnb` knows: how each is recognized by its derivatives at the model's output, and its Gauss-Newton.

Every candidate is a sum L = Σ_i w_i c(z_i) over positions i of one output z of the model. Its Gauss-Newton matrix is Jᵀ
(∂²L/∂z²) J with J = ∂z/∂θ (Schraudolph, "Fast curvature matrix-vector products", 2002, section 3). `fits` reads weights
and targets off the derivatives.

A candidate counts as found if its gradient fits at all positions, and if Σ_i w_i c_i reproduces the loss; the caller
checks the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sharpwatch.curvature.objective.factors import OutputGradients, RandomSigns, SampledLabels
from sharpwatch.curvature.objective.fits import (
    Derivatives,
    Fit,
    curves_alike,
    fit_binary,
    fit_cross_entropy,
    fit_log_likelihood,
    fit_squares,
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One form of loss.

    Attributes:
        name: Its name.
        classes: The dimension of the output that holds the classes; None if every entry is a position of its own.
        fit: Finds the weights; None if the gradient is not this loss's.
        draw: Makes the random vectors for an output, weights [positions], a number of draws and a generator.
    """

    name: str
    classes: int | None
    fit: Callable[[Derivatives], Fit | None]
    draw: Callable[[Tensor, Tensor, int, torch.Generator], OutputGradients]

    def takes(self, output: Tensor) -> bool:
        """Whether an output of this shape can be of this form."""
        if self.classes is None:
            return output.dim() >= 1
        # With [B, C] the second dimension is the last.
        enough = output.dim() >= (2 if self.classes == -1 else 3)
        return enough and output.shape[self.classes] > 1

    def positions(self, values: Tensor) -> Tensor:
        """`values` of the output's shape as [positions, classes] or [positions]."""
        return values.reshape(-1) if self.classes is None else values.movedim(self.classes, -1).flatten(0, -2)

    def entries(self, values: Tensor, output: Tensor) -> Tensor:
        """The inverse of `positions`, for values of `output`'s shape."""
        if self.classes is None:
            return values.view(output.shape)
        return values.view(*self.position_shape(output), -1).movedim(-1, self.classes)

    def position_shape(self, output: Tensor) -> torch.Size:
        """The shape of the output without its classes."""
        return output.shape if self.classes is None else output.movedim(self.classes, -1).shape[:-1]


def _cross_entropy(name: str, *, classes: int, soft: bool) -> Candidate:
    return Candidate(name, classes, partial(fit_cross_entropy, soft=soft), partial(SampledLabels, classes=classes))


CROSS_ENTROPY = _cross_entropy("cross-entropy", classes=-1, soft=False)
CHANNELS_CROSS_ENTROPY = _cross_entropy("cross-entropy", classes=1, soft=False)
LOG_LIKELIHOODS = tuple(
    Candidate("negative log-likelihood", classes, fit_log_likelihood, partial(SampledLabels, classes=classes))
    for classes in (-1, 1)
)
SQUARES = Candidate("square", None, fit_squares, partial(RandomSigns, binary=False))
BINARY = Candidate("binary cross-entropy", None, fit_binary, partial(RandomSigns, binary=True))
# In the order in which they are tried.
CANDIDATES = (
    CROSS_ENTROPY,
    CHANNELS_CROSS_ENTROPY,
    _cross_entropy("cross-entropy with soft targets", classes=-1, soft=True),
    _cross_entropy("cross-entropy with soft targets", classes=1, soft=True),
    *LOG_LIKELIHOODS,
    SQUARES,
    BINARY,
)


def find_fits(
    output: Tensor, gradient: Tensor, scale: float, product: Callable[[Tensor], Tensor], *, curvature: bool = False
) -> Iterator[tuple[Candidate, Fit]]:
    """Find the candidates that a loss may be, by its derivatives with respect to one output z.

    Args:
        output: z.
        gradient: `scale` times ∂L/∂z, of the same shape.
        scale: The factor of the gradient.
        product: v -> `scale` times (∂²L/∂z²) v, both of z's shape.
        curvature: Whether the second derivative must fit too where the gradient alone tells the weights.

    Yields:
        Those whose gradient fits at all positions, with their weights, in the order of `CANDIDATES`.
    """
    for candidate in CANDIDATES:
        if candidate.takes(output):
            positions = candidate.positions(output), candidate.positions(gradient)
            known = Derivatives(*positions, scale, partial(_by_position, candidate, output, product))
            fit = candidate.fit(known)
            checked = curvature and candidate in {CROSS_ENTROPY, CHANNELS_CROSS_ENTROPY}
            if fit is not None and (not checked or curves_alike(known, fit.weights)):
                yield candidate, fit


def _by_position(candidate: Candidate, output: Tensor, product: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    return candidate.positions(product(candidate.entries(vector, output)))
