"""How much batches count beside each other in a mean loss, found on two rows of one batch of each kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sharpwatch.curvature.objective.batch import Batch, LossFn
from sharpwatch.curvature.objective.verification import OutputLoss, output_loss
from sharpwatch.errors import EmptyBatchError, ProbeError


@dataclass(frozen=True, slots=True)
class Weight:
    """What a batch counts.

    Attributes:
        tokens: Number of predicting positions.
        share: Its weight beside others: the positions of a mean, 1 of a sum.
    """

    tokens: int
    share: float


class Weighing:
    """Weighs batches by what their mean loss is a mean over: tokens, or rows as in question answering.

    Args:
        loss_fn: Computes the loss; None for the model's own.

    Attributes:
        objective: The loss in words; empty if it is none that is known.
        rows: On how many rows a forward was run.
    """

    def __init__(self, loss_fn: LossFn | None) -> None:
        self.objective = ""
        self.rows = 0
        self._loss_fn = loss_fn
        self._found: dict[object, tuple[OutputLoss, int] | None] = {}  # by the batch's structure, with its rows

    def weigh(self, call: Callable[..., Any], model: nn.Module, batch: Batch) -> Weight | None:
        """Weigh a batch.

        Args:
            call: Called in place of `model`.
            model: The model.
            batch: The batch.

        Returns:
            The weight; None if the loss is none that is known.
        """
        structure = tuple((name, tensor.dim(), tensor.dtype) for tensor, name in batch.named_tensors())
        if self._found.get(structure) is None:
            self._found[structure] = self._find(call, model, batch)
        found = self._found[structure]
        if found is None:
            return None
        loss, rows = found
        tokens = None if loss.targets is None else loss.targets.count(model, batch)
        # Without labels to count, rows have as many positions as those that were seen.
        tokens = tokens if tokens is not None else round(loss.tokens / rows * batch.rows)
        mean = abs(loss.share / loss.tokens - 1) < abs(loss.share - 1)
        return Weight(tokens, float(tokens) if mean else 1.0)

    def _find(self, call: Callable[..., Any], model: nn.Module, batch: Batch) -> tuple[OutputLoss, int] | None:
        try:
            two = batch.slice(torch.tensor([0, batch.rows - 1][: batch.rows], device="cpu"))
            self.rows += two.rows
            found = output_loss(call, model, two, loss_fn=self._loss_fn)
        except EmptyBatchError:  # the next batch of this kind may have labels in these rows
            return None
        except (ProbeError, RuntimeError):  # the measurement itself says what is wrong with a loss
            return None
        if found.objective.state != "verified":
            return None
        self.objective = str(found.objective)
        # Only the numbers are kept: the graph would hold the model's activations.
        terms = [replace(term, output=term.output.detach()) for term in found.terms]
        return replace(found, terms=terms), two.rows
