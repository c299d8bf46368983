"""What the backward of a training loop shows of its loss, where the loss is computed outside of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sharpwatch.curvature.objective.batch import count_predicting
from sharpwatch.curvature.objective.candidates import Candidate
from sharpwatch.curvature.objective.fits import Fit
from sharpwatch.curvature.objective.outputs import all_outputs
from sharpwatch.curvature.objective.rows import select_rows
from sharpwatch.curvature.objective.verification import ObjectiveInUse, OutputLoss, Term, scale_in_words
from sharpwatch.errors import ObjectiveError

_SAME = 0.01  # relative difference below which two weights are the same


@dataclass(frozen=True, slots=True, eq=False)
class SeenLoss:
    """The loss of a training step, as its backward showed it.

    Attributes:
        name: The output that it is of.
        candidate: Its form.
        live: Bool, the output's shape without the classes: which positions predict.
        weight: The weight of each of them; their mean if they differ.
        equal: Whether all have the same.
        sure: How many positions count beside those of `live`: the model is so sure of their labels that their gradient
            is zero.
    """

    name: str
    candidate: Candidate
    live: Tensor
    weight: float
    equal: bool = True
    sure: int = 0

    @property
    def tokens(self) -> int:
        """Number of positions that predict."""
        return int(self.live.sum()) + self.sure

    @property
    def share(self) -> float:
        """The part of them that has a gradient; rows of a batch are taken to have the same."""
        return int(self.live.sum()) / self.tokens

    @property
    def total(self) -> float:
        """The summed weight: 1 for a mean."""
        return self.weight * self.tokens

    @property
    def summed(self) -> bool:
        """Whether it is a sum over positions: then that of the whole batch is as many times a mean."""
        return scale_in_words(self.total, self.tokens) == "summed"

    def is_like(self, other: SeenLoss) -> bool:
        """Whether that of another forward is the same loss: each position weighs as much, or each forward."""
        if (self.name, self.candidate) != (other.name, other.candidate):
            return False
        pairs = (self.weight, other.weight), (self.total, other.total)
        return any(abs(one - another) <= _SAME * one for one, another in pairs)

    @property
    def objective(self) -> ObjectiveInUse:
        """The loss in words."""
        scale = scale_in_words(self.total, self.tokens)
        return ObjectiveInUse(f"{scale} {self.candidate.name} of {self.name}", "verified")


@dataclass(frozen=True, slots=True, eq=False)
class SeenRows:
    """A loss that was seen on a whole batch, for a probe on some rows of it.

    Attributes:
        seen: The loss.
        rows: Int64 [n], the rows.
        of: Number of rows of the batch.
        interleaved: As in `RowLayout`.
    """

    seen: SeenLoss
    rows: Tensor
    of: int
    interleaved: bool

    def cut(self, output: Any) -> tuple[Tensor, Tensor]:
        """Find the output on these rows.

        Args:
            output: What the model returned for these rows.

        Returns:
            The output that the loss is of, and a bool mask of the positions that predict.

        Raises:
            ObjectiveError: It does not fit the one that was seen.
        """
        seen, found = self.seen, all_outputs(output).get(self.seen.name)
        if found is None:
            raise ObjectiveError(f"the model returned no {seen.name} to the probe; pass loss_fn")
        like = seen.candidate.position_shape(found)
        mask = select_rows(seen.live, self.rows, self.of, interleaved=self.interleaved, like=like)
        return found, mask.to(found.device)

    def loss(self, output: Any) -> OutputLoss:
        """The mean over the positions of these rows; where the loss is a sum, that of the whole batch.

        A constant factor, as of accumulated gradients or a scaler, is left out.

        Args:
            output: What the model returned for these rows.

        Returns:
            The loss as a function of the output.

        Raises:
            EmptyBatchError: No position of these rows predicts.
            ObjectiveError: The output does not fit the one that was seen.
        """
        found, mask = self.cut(output)
        scale = self.seen.share * (self.seen.tokens if self.seen.summed else 1)
        fit = Fit(mask.reshape(-1).float() * (scale / count_predicting(mask)), math.nan)
        return OutputLoss([Term(self.seen.name, found, self.seen.candidate, fit)], self.seen.objective)
