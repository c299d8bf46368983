"""Random vectors at a model's output whose second moment is the second derivative of a loss."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_CHUNK_ENTRIES = 2**22  # of the temporary when labels are sampled


class OutputGradients(Protocol):
    """Random vectors u with E[u uᵀ] = ∂²L/∂z², one for each draw."""

    def __getitem__(self, draw: int, /) -> Tensor:
        """The vector of one draw, of the output's shape; valid until the next one is taken."""


class SampledLabels:
    """√w_i (softmax(z_i) − onehot(y_i)), with labels y_i drawn from the softmax (Bartlett's identity gives E[u uᵀ]).

    The root of w, unlike w = 1/N, does not underflow in half precision. All draws share one float32 tensor of the
    output's shape.
    """

    def __init__(
        self, output: Tensor, weights: Tensor, draws: int, generator: torch.Generator, *, classes: int
    ) -> None:
        self._dtype, self._classes = output.dtype, classes
        probabilities = torch.softmax(output, classes, dtype=torch.float32).movedim(classes, -1)
        self._shape = probabilities.shape
        self._values = probabilities.flatten(0, -2)
        # Before the next line scales the probabilities, which are not kept beside.
        self._labels = _sample_labels(self._values, draws, generator)
        self._roots = weights.to(self._values).sqrt()[:, None]
        self._values.mul_(self._roots)
        self._current_labels: Tensor | None = None

    def __getitem__(self, draw: int) -> Tensor:
        """As `OutputGradients`."""
        # Undo the onehot of the draw before, so that one tensor serves all draws.
        if self._current_labels is not None:
            self._values.scatter_add_(1, self._current_labels, self._roots)
        self._current_labels = self._labels[:, draw, None]
        self._values.scatter_add_(1, self._current_labels, -self._roots)
        return self._values.view(self._shape).movedim(-1, self._classes).to(self._dtype)


class RandomSigns:
    """√d ∘ ε with random signs ε, for a diagonal second derivative d (Hutchinson 1990)."""

    def __init__(
        self, output: Tensor, weights: Tensor, draws: int, generator: torch.Generator, *, binary: bool
    ) -> None:
        del draws
        diagonal = 2 * weights.to(device=output.device, dtype=torch.float32)
        if binary:
            flat = output.reshape(-1).float()
            diagonal *= torch.sigmoid(flat) * torch.sigmoid(-flat) / 2
        self._roots = diagonal.sqrt_().view(output.shape)
        self._dtype, self._generator = output.dtype, generator

    def __getitem__(self, draw: int) -> Tensor:
        """As `OutputGradients`; the signs follow from the generator's state."""
        del draw
        shape, device = self._roots.shape, self._generator.device
        signs = torch.randint(0, 2, shape, generator=self._generator, device=device).to(self._roots) * 2 - 1
        return (self._roots * signs).to(self._dtype)


def _sample_labels(probabilities: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Sample labels [N, draws] from `probabilities` [N, V] by inverting the cumulative distribution.

    `torch.multinomial` is not used: on an accelerator it aborts the process if a probability is not finite.
    """
    rows = max(1, _CHUNK_ENTRIES // probabilities.shape[1])
    labels = []
    # In pieces: the cumulative sums of all rows would take as much memory as the probabilities.
    for piece in torch.split(probabilities, rows):
        cumulative = piece.cumsum(1)
        uniform = torch.rand(len(piece), draws, generator=generator, dtype=piece.dtype, device=generator.device)
        # Scaled to the last sum, which is not exactly 1. With `right`, a class of probability zero is never drawn.
        drawn = torch.searchsorted(cumulative, uniform.to(piece.device) * cumulative[:, -1:], right=True)
        # A row that is not finite finds no place among its sums. Its label only has to be a valid index.
        labels.append(drawn.clamp_(max=piece.shape[1] - 1))
    return torch.cat(labels)
