"""The atoms of a spectrum, smoothed on the axis they are drawn on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sharpwatch.curvature.statistics.estimate import Spectrum

DECADES = 4  # of eigenvalues on each side of 0 that the axis spreads out; smaller ones lie in its linear middle
_SIGMA = 0.4  # of the Gaussian that stands for an atom, in units of asinh(λ/width): a sixth of a decade
_MARGIN = 6 * _SIGMA
_POINTS = 300


@dataclass(frozen=True, slots=True, eq=False)
class Density:
    """`share` of the eigenvalues per unit of asinh(λ/width), at `eigenvalues`; its integral over that axis is 1.

    An axis with the same width, a power of ten, is linear up to about it and logarithmic beyond, on both sides of 0.
    """

    width: float
    eigenvalues: NDArray[np.float64]
    share: NDArray[np.float64]


def density(spectrum: Spectrum) -> Density:
    """Each atom a Gaussian of one width *on the axis*: on λ itself it would hide all structure near 0, or spread it."""
    values, weights = np.array(spectrum.eigenvalues), np.array(spectrum.weights)
    largest = float(np.abs(values).max())
    width = 10.0 ** (math.floor(math.log10(largest)) - DECADES) if largest > 0 else 1.0
    at = np.arcsinh(values / width)
    axis = np.linspace(at.min() - _MARGIN, at.max() + _MARGIN, _POINTS)
    bells = np.exp(-0.5 * ((axis[:, None] - at) / _SIGMA) ** 2) / (_SIGMA * math.sqrt(2 * math.pi))
    return Density(width, np.sinh(axis) * width, bells @ weights)
