"""The Gauss-Newton-Bartlett probe: traces and sketches of the Gauss-Newton matrix from sampled labels.

With labels ŷ drawn from the model's own softmax, N‖∇_b L̂‖² is unbiased for Tr(G_bb), L̂ the mean cross-entropy over
the N positions that predict: the score of each position has mean zero, so positions don't mix (Liu et al., "Sophia",
arXiv 2305.14342, section 2.3; Martens, "New insights and perspectives on the natural gradient method", section 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.objective import to_dense
from sharpwatch.curvature.objective.outputs import LogitsFn, count_predicting, predict
from sharpwatch.curvature.parameters.norms import squared_norms, sum_by_index
from sharpwatch.curvature.state.isolation import isolated

_CHUNK_ENTRIES = 2**22  # entries of a temporary when labels are drawn


class Sketcher(Protocol):
    """A linear projection of gradients to a few numbers a block."""

    def sketch(self, gradients: Mapping[str, Tensor], /) -> Tensor:
        """Float32 [B, k] of `gradients`, by parameter name."""


@dataclass(frozen=True, slots=True, eq=False)
class GnbSample:
    """One probe, on the CPU. A number that is not finite says that the model's own are not.

    `tokens` is N; `traces` float64 [draws, L] and `sketches` float32 [draws, B, k] are of N‖∇_b L̂‖² and √N ∇_b L̂.
    """

    tokens: int
    rows: int
    traces: Tensor
    sketches: Tensor | None


def gnb_probe(  # noqa: PLR0913 - what a probe is of, and how it is taken; each named
    model: nn.Module,
    block_map: BlockMap,
    batch: Batch,
    *,
    draws: int,
    generator: torch.Generator,
    sketcher: Sketcher | None = None,
    logits_fn: LogitsFn | None = None,
) -> GnbSample:
    """One forward on `batch` and one backward for each of `draws`; leaves no trace in `model`.

    `generator` lives on the logits' device. Frozen and unused parameters count as zero. Raises `ProbeError` where
    the model gives no logits, or no position predicts.
    """
    traces, sketches = [], []
    with isolated(model) as live:
        logits, mask = predict(live, live.inner, batch.prepared(), logits_fn)
        tokens = count_predicting(mask)
        leaves = live.trainable
        output_gradients = OutputGradients(logits.detach(), mask, draws, generator, scale=1 / math.sqrt(tokens))
        for draw in range(draws):
            raw = torch.autograd.grad(
                logits, list(leaves.values()), output_gradients[draw], retain_graph=draw + 1 < draws, allow_unused=True
            )
            gradients = {name: to_dense(g) for name, g in zip(leaves, raw, strict=True) if g is not None}
            del raw
            traces.append(squared_norms(block_map, gradients))
            if sketcher is not None:
                sketches.append(sketcher.sketch(gradients))
            del gradients
    by_layer = sum_by_index(torch.stack(traces), block_map.layer_block_of, len(block_map.layer_blocks))
    return GnbSample(tokens, batch.rows, by_layer, torch.stack(sketches).cpu() if sketches else None)


class OutputGradients:
    """Gradients by the logits of `scale` times the sum of the positions' cross-entropies, one for each draw of labels.

    They are `scale` (softmax − onehot(ŷ)) where a position predicts, and zero elsewhere. 1/√N gives √N L̂; rather than
    1/N it keeps half precision from underflowing. They share one float32 tensor of the logits' shape.
    """

    def __init__(self, logits: Tensor, mask: Tensor, draws: int, generator: torch.Generator, *, scale: float) -> None:
        self._shape, self._dtype = logits.shape, logits.dtype
        self._values = torch.softmax(logits, -1, dtype=torch.float32).flatten(0, -2)
        self._labels = _sample_labels(self._values, draws, generator)
        self._weights = (mask.flatten().float() * scale)[:, None]
        self._values.mul_(self._weights)
        self._current_labels: Tensor | None = None

    def __getitem__(self, draw: int) -> Tensor:
        """[*logits.shape], valid until the next one is taken."""
        if self._current_labels is not None:
            self._values.scatter_add_(1, self._current_labels, self._weights)
        self._current_labels = self._labels[:, draw, None]
        self._values.scatter_add_(1, self._current_labels, -self._weights)
        return self._values.view(self._shape).to(self._dtype)


def _sample_labels(probabilities: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Labels [N, draws] from rows of `probabilities` [N, V], by inverting their distribution function.

    Not `torch.multinomial`: on an accelerator it stops the process where a probability is not finite.
    """
    rows = max(1, _CHUNK_ENTRIES // probabilities.shape[1])
    labels = []
    for piece in torch.split(probabilities, rows):
        cumulative = piece.cumsum(1)
        uniform = torch.rand(len(piece), draws, generator=generator, dtype=piece.dtype, device=generator.device)
        # Scaled to the last sum, which rounding keeps from 1. `right`: a class of probability zero is never drawn.
        drawn = torch.searchsorted(cumulative, uniform.to(piece.device) * cumulative[:, -1:], right=True)
        labels.append(drawn.clamp_(max=piece.shape[1] - 1))
    return torch.cat(labels)
