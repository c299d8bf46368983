"""Windows of sketches whose Gauss-Newton matrix is known."""

from __future__ import annotations

import torch

SIZE = 256
ENTRIES = 600


def spectrum(name, n=ENTRIES):
    """Eigenvalues [n] with sum 1."""
    index = torch.arange(1, n + 1, dtype=torch.float64)
    rest = torch.full((n,), 1.0 / n, dtype=torch.float64)
    match name:
        case "spike":  # a tenth of the trace
            values = torch.cat([torch.tensor([0.1]), 0.9 * rest[1:]])
        case "large spike":
            values = torch.cat([torch.tensor([0.3]), 0.7 * rest[1:]])
        case "flat":
            values = rest
        case "power 1":
            values = index.reciprocal()
        case "power 1.5":
            values = index.pow(-1.5)
        case "two":
            values = torch.cat([torch.tensor([0.4, 0.4]), 0.2 * rest[2:]])
        case "ten":
            values = torch.cat([torch.full((10,), 0.05), 0.5 * rest[10:]])
    return values.double() / values.sum()


def sketched(covariances, windows, probes, draws, *, seed, directions=None):
    """Sketches [W, P, D, SIZE] of Gaussian gradients, and [W, P, SIZE] of `directions` [P, n] if they are given.

    `covariances` are diagonals: [n], or [P, n] for each probe. Eigenvectors that spread over many entries have sketches
    with independent Gaussian entries; each window gets new ones.
    """
    generator = torch.Generator().manual_seed(seed)
    roots = covariances.sqrt().float().expand(probes, -1)[:, None]
    gradients = torch.empty(windows, probes, draws, SIZE)
    along = torch.empty(windows, probes, SIZE)
    for window in range(windows):
        projection = torch.randn(roots.shape[-1], SIZE, generator=generator) / SIZE**0.5
        gradients[window] = (torch.randn(probes, draws, roots.shape[-1], generator=generator) * roots) @ projection
        if directions is not None:
            along[window] = directions.float() @ projection
    return gradients if directions is None else (gradients, along)


def full(sketches):
    """A mask of windows without missing draws."""
    return torch.ones(sketches.shape[:3], dtype=torch.bool)


def covered(value, stderr, truth):
    """The fraction of windows within two standard errors of the truth."""
    return ((value - truth).abs() < 2 * stderr).double().mean()


def least_coverage(windows):
    """Three binomial deviations below the coverage of two standard errors with 7 degrees of freedom (0.914)."""
    return 0.914 - 3 * (0.914 * 0.086 / windows) ** 0.5
