"""The Gauss-Newton-Bartlett estimator: traces and sketches of the Gauss-Newton matrix G from sampled labels.

Let labels be drawn from the model's own softmax, c_i be the cross-entropy with that of position i, and w_i the weight
of that position in the loss. Then ‖Σ_i √w_i ∇_b c_i‖² is unbiased for Tr(G_bb): the score of each position has mean
zero, so cross terms between positions vanish. For a mean over N positions it is N‖∇_b L‖² of the loss L with these
labels (Liu et al., "Sophia", arXiv 2305.14342, section 2.3; Martens, "New insights and perspectives on the natural
gradient method", section 5). For squares and binary cross-entropy, whose ∂²L/∂z² is diagonal, random signs take the
place of labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.batch import Batch, LogitsFn, LossFn
from sharpwatch.curvature.objective.verification import ObjectiveInUse, OutputLoss, output_loss
from sharpwatch.curvature.parameters.shards import squared_norms, sum_by_index
from sharpwatch.curvature.state.isolation import isolated


class Sketcher(Protocol):
    """A linear projection of gradients to a few numbers for each block."""

    def sketch(self, gradients: Mapping[str, Tensor], /) -> Tensor:
        """Sketch `gradients` by parameter name; float32 [B, k]."""


@dataclass(frozen=True, slots=True, eq=False)
class RowGroups:
    """Groups of rows of one matrix, whose traces are measured apart.

    Attributes:
        parameter: The matrix, by name.
        rows: Int64 [n] for each group, indices of its rows, on the device of the matrix.
    """

    parameter: str
    rows: Sequence[Tensor]

    def squared_norms(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """‖·‖² of each group of rows.

        Args:
            gradients: Whole gradients by parameter name; a missing one counts as zero.

        Returns:
            Float64 [groups], computed asynchronously. The one temporary has an entry for each row.
        """
        gradient = gradients.get(self.parameter)
        if gradient is None:
            return torch.zeros(len(self.rows), dtype=torch.float64, device=self.rows[0].device)
        exact = torch.promote_types(gradient.dtype, torch.float32)
        squares = torch.linalg.vector_norm(gradient, dim=-1, dtype=exact).double().square()
        # Not by `index_add_`, whose order of summing varies on an accelerator.
        return torch.stack([squares[rows].sum() for rows in self.rows])


@dataclass(frozen=True, slots=True, eq=False)
class GnbSample:
    """The result of one probe, on the CPU; a value that is not finite means that the model's own values are not.

    Attributes:
        tokens: N, the number of predicting positions.
        rows: Number of rows.
        traces: Float64 [draws, L], ‖Σ_i √w_i ∇_b c_i‖² of each layer block.
        sketches: Float32 [draws, B, k], sketches of Σ_i √w_i ∇_b c_i; None without a sketcher.
        objective: The loss, in words.
        share: How much this batch counts beside others in the mean loss.
        row_traces: Float64 [draws, groups], the trace of each of the `row_groups`; None without them.
    """

    tokens: int
    rows: int
    traces: Tensor
    sketches: Tensor | None
    objective: ObjectiveInUse | None = None
    share: float = 1.0
    row_traces: Tensor | None = None


def gnb_probe(  # noqa: PLR0913 - settings are keyword-only
    model: nn.Module,
    block_map: BlockMap,
    batch: Batch,
    *,
    draws: int,
    generator: torch.Generator,
    sketcher: Sketcher | None = None,
    row_groups: RowGroups | None = None,
    logits_fn: LogitsFn | None = None,
    loss_fn: LossFn | None = None,
    find: Callable[[Any, nn.Module, Batch], OutputLoss] | None = None,
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
        row_groups: Groups of a matrix's rows, whose traces are measured apart as well.
        logits_fn: Computes logits and mask; None to find them.
        loss_fn: Computes the loss; None for the model's own.
        find: Runs the forward in place of `output_loss`, and returns the loss as a function of the outputs.

    Returns:
        The draws. Frozen and unused parameters count as zero.

    Raises:
        ObjectiveError: The loss is none whose Gauss-Newton matrix is known.
        ProbeError: The model gives no logits, or every label is ignored.
    """
    traces, sketches, row_traces = [], [], []
    with isolated(model) as live:
        leaves = live.trainable
        rows, prepared = batch.rows, batch.prepared()
        if find is None:
            loss = output_loss(live, live.inner, prepared, loss_fn=loss_fn, logits_fn=logits_fn)
        else:
            loss = find(live, live.inner, prepared)
        outputs = loss.outputs
        output_gradients = [term.gradients(draws, generator) for term in loss.terms]
        # One forward serves all draws, each a backward of its own through the kept graph. Draws are not batched by
        # vmap: that took 1.1 to 1.8 times as long, since each brings gradients of all parameters, which leave the
        # cache.
        for draw in range(draws):
            raw = torch.autograd.grad(
                outputs,
                list(leaves.values()),
                [each[draw] for each in output_gradients],
                retain_graph=draw + 1 < draws,
                allow_unused=True,
            )
            given = {name: g for name, g in zip(leaves, raw, strict=True) if g is not None}
            gradients = {name: g.to_dense() if g.is_sparse else g for name, g in given.items()}
            del raw, given  # sparse ones need not be kept beside their dense copies
            if sketcher is not None:
                sketches.append(sketcher.sketch(gradients))
            traces.append(squared_norms(block_map, gradients))
            if row_groups is not None:
                row_traces.append(row_groups.squared_norms(gradients))
            del gradients
        by_layer = sum_by_index(torch.stack(traces), block_map.layer_block_of, len(block_map.layer_blocks))
    sketch = torch.stack(sketches).cpu() if sketches else None
    by_rows = torch.stack(row_traces).cpu() if row_traces else None
    return GnbSample(loss.tokens, rows, by_layer, sketch, loss.objective, loss.share, by_rows)
