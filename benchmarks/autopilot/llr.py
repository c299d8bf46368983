"""Layerwise learning rates from the spectra of weights (LLR, arXiv 2605.22297), from the paper's definition.

For each matrix but embedding and head: with λ the eigenvalues of WᵀW in ascending order and the upper half of them as
the tail, Hill's estimator α = 1 + n/Σ ln(λ_i/λ_min) says how heavy the tail is. The factor on the rate is linear in α,
from 1 at the smallest α to `largest` at the largest; embedding and head take the largest, vectors take 1. It is
measured at every 40th step, and reached in 20 steps. `largest` is 3 for 60M parameters there, and 5 for 1B.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

EVERY, REACHED_IN = 40, 20


def hill(weight: Tensor) -> float:
    """The tail's exponent of the spectrum of a matrix, by the upper half of its eigenvalues."""
    logs = torch.linalg.svdvals(weight.detach().float()).square().log().sort().values
    tail = logs[len(logs) // 2 :]
    return 1 + len(tail) / float((tail - tail[0]).sum())


def targets(parameters: Mapping[str, nn.Parameter], ends: frozenset[str], largest: float) -> dict[str, float]:
    """By parameter the factor on the rate; `ends` names those of embedding and head."""
    alphas = {name: hill(each) for name, each in parameters.items() if each.dim() == 2 and name not in ends}
    low, high = min(alphas.values()), max(alphas.values())
    spread = max(high - low, 1e-12)
    matrices = {name: 1 + (largest - 1) * (alpha - low) / spread for name, alpha in alphas.items()}
    vectors = {name: 1.0 for name in parameters if name not in ends}
    return vectors | matrices | dict.fromkeys(ends, largest)


class LayerwiseRates:
    """The factors at each step, which move linearly to what was measured last."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], ends: frozenset[str], largest: float) -> None:
        self._parameters, self._ends, self._largest = parameters, ends, largest
        self._start = self._target = dict.fromkeys(parameters, 1.0)
        self._since = 0

    def at(self, step: int) -> dict[str, float]:
        """By parameter the factor at step 1, 2, 3, …, called once for each."""
        share = min(1.0, (step - self._since) / REACHED_IN)
        now = {name: start + share * (self._target[name] - start) for name, start in self._start.items()}
        if step % EVERY == 0:
            self._start, self._since = now, step
            self._target = targets(self._parameters, self._ends, self._largest)
        return now
