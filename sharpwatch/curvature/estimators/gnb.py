"""The Gauss-Newton-Bartlett estimator: traces and sketches of the Gauss-Newton matrix G from sampled labels.

Let labels ŷ be drawn from the model's own softmax, and L̂ be the mean cross-entropy with them over the N predicting
positions. Then N‖∇_b L̂‖² is unbiased for Tr(G_bb): the score of each position has mean zero, so cross terms between
positions vanish (Liu et al., "Sophia", arXiv 2305.14342, section 2.3; Martens, "New insights and perspectives on the
natural gradient method", section 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.batch import Batch, LogitsFn, LossFn, count_predicting, predict
from sharpwatch.curvature.parameters.shards import squared_norms, sum_by_index
from sharpwatch.curvature.state.isolation import isolated

_CHUNK_ENTRIES = 2**22  # of the temporary when labels are sampled


class Sketcher(Protocol):
    """A linear projection of gradients to a few numbers for each block."""

    def sketch(self, gradients: Mapping[str, Tensor], /) -> Tensor:
        """Sketch `gradients` by parameter name; float32 [B, k]."""


@dataclass(frozen=True, slots=True, eq=False)
class GnbSample:
    """The result of one probe, on the CPU; a value that is not finite means that the model's own values are not.

    Attributes:
        tokens: N, the number of predicting positions.
        rows: Number of rows.
        traces: Float64 [draws, L], N‖∇_b L̂‖² of each layer block.
        sketches: Float32 [draws, B, k], sketches of √N ∇_b L̂; None without a sketcher.
    """

    tokens: int
    rows: int
    traces: Tensor
    sketches: Tensor | None


def gnb_probe(  # noqa: PLR0913 - settings are keyword-only
    model: nn.Module,
    block_map: BlockMap,
    batch: Batch,
    *,
    draws: int,
    generator: torch.Generator,
    sketcher: Sketcher | None = None,
    logits_fn: LogitsFn | None = None,
    loss_fn: LossFn | None = None,
) -> GnbSample:
    """Draw the trace of G for each layer block; leaves `model` unchanged.

    It takes one forward on `batch`, and one backward for each draw.

    Args:
        model: The model.
        block_map: The division of its parameters into blocks.
        batch: The arguments of the model.
        draws: Number of draws.
        generator: Random generator on the device of the logits.
        sketcher: Sketches each draw's gradient; None for traces alone.
        logits_fn: Computes logits and mask; None to find them, see `predict`.
        loss_fn: Calls the model on a batch that the loop observed, see `predict`.

    Returns:
        The draws. Frozen and unused parameters count as zero.

    Raises:
        ProbeError: The model gives no logits, or every label is ignored.
    """
    traces, sketches = [], []
    with isolated(model) as live:
        leaves = live.trainable
        rows, prepared = batch.rows, batch.prepared()
        logits, mask = predict(live, live.inner, prepared, logits_fn, loss_fn)
        tokens = count_predicting(mask)
        output_gradients = OutputGradients(logits.detach(), mask, draws, generator, scale=1 / math.sqrt(tokens))
        # One forward serves all draws, each a backward of its own through the kept graph. Draws are not batched by
        # vmap: that took 1.1 to 1.8 times as long, since each brings gradients of all parameters, which leave the
        # cache.
        for draw in range(draws):
            raw = torch.autograd.grad(
                logits, list(leaves.values()), output_gradients[draw], retain_graph=draw + 1 < draws, allow_unused=True
            )
            given = {name: g for name, g in zip(leaves, raw, strict=True) if g is not None}
            gradients = {name: g.to_dense() if g.is_sparse else g for name, g in given.items()}
            del raw, given  # sparse ones need not be kept beside their dense copies
            if sketcher is not None:
                sketches.append(sketcher.sketch(gradients))
            traces.append(squared_norms(block_map, gradients))
            del gradients
        by_layer = sum_by_index(torch.stack(traces), block_map.layer_block_of, len(block_map.layer_blocks))
    return GnbSample(tokens, rows, by_layer, torch.stack(sketches).cpu() if sketches else None)


class OutputGradients:
    """Gradients with respect to the logits of `scale` times the summed cross-entropy, one for each draw of labels.

    They are `scale` (softmax − onehot(ŷ)) at predicting positions, and zero elsewhere. The scale 1/√N gives √N L̂;
    unlike 1/N, it does not underflow in half precision. All draws share one float32 tensor of the logits' shape.

    Args:
        logits: [..., V], without a graph.
        mask: Bool [...], True where a position predicts.
        draws: Number of draws.
        generator: Random generator on the device of the logits.
        scale: The factor.
    """

    def __init__(self, logits: Tensor, mask: Tensor, draws: int, generator: torch.Generator, *, scale: float) -> None:
        self._shape, self._dtype = logits.shape, logits.dtype
        self._values = torch.softmax(logits, -1, dtype=torch.float32).flatten(0, -2)
        # Before the next line scales the probabilities, which are not kept beside.
        self._labels = _sample_labels(self._values, draws, generator)
        self._weights = (mask.flatten().float() * scale)[:, None]
        self._values.mul_(self._weights)
        self._current_labels: Tensor | None = None

    def __getitem__(self, draw: int) -> Tensor:
        """The gradient of one draw, of the logits' shape; valid until the next one is taken."""
        # Undo the onehot of the draw before, so that one tensor serves all draws.
        if self._current_labels is not None:
            self._values.scatter_add_(1, self._current_labels, self._weights)
        self._current_labels = self._labels[:, draw, None]
        self._values.scatter_add_(1, self._current_labels, -self._weights)
        return self._values.view(self._shape).to(self._dtype)


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
