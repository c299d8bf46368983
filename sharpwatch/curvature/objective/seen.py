"""What the backward of a training loop shows of its loss, where the loss is computed outside of the model.

The gradient that reaches an output of the model is ∂L/∂z of the loss that is stepped on. A few positions of it, with
the output there, are held against `CANDIDATES`; which positions get a gradient at all is seen for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sharpwatch.curvature.objective.batch import count_predicting
from sharpwatch.curvature.objective.candidates import BINARY, CANDIDATES, SQUARES, Candidate, Derivatives, Fit
from sharpwatch.curvature.objective.outputs import named_outputs
from sharpwatch.curvature.objective.rows import select_rows
from sharpwatch.curvature.objective.verification import ObjectiveInUse, OutputLoss, Term, scale_in_words
from sharpwatch.errors import EmptyBatchError, ObjectiveError, UndecidedError

_KEPT_ENTRIES = 2**23  # of output and gradient, at whole positions
_MIN_POSITIONS, _MAX_POSITIONS = 32, 1024
_ENTRIES = 1024  # of an output without classes
_NICE = 1e-3  # relative error of the scale of a mean square
_MAX_ZEROS = 0.05  # share of entries without a gradient in a mean square; more have a mask, or are of one column
_MAX_COMPARED = 2**22  # entries of a gradient that are looked at for a mean over one dimension


@dataclass(slots=True, eq=False)
class _Part:
    """Some positions of an output, for one choice of the dimension that holds the classes."""

    classes: int | None
    index: tuple[Tensor, ...]
    output: Tensor
    gradient: Tensor | None = None
    live: Tensor | None = None  # which of all positions get a gradient


class OutputSample:
    """Samples of one output and of its gradient; holds no reference to the output itself.

    Args:
        name: The output's name.
        output: The output; copies of some positions are taken.
        generator: Draws the positions, on the CPU.
    """

    def __init__(self, name: str, output: Tensor, generator: torch.Generator) -> None:
        self.name = name
        self.shape = output.shape
        self.gradients = 0  # how many have come
        self._square: Tensor | None = None
        self._pooled: Tensor | None = None  # whether the gradient is alike along a dimension
        forms = dict.fromkeys(candidate.classes for candidate in CANDIDATES if candidate.takes(output))
        self._parts = [_part(output.detach(), classes, generator) for classes in forms]

    @torch.no_grad()
    def take(self, gradient: Tensor) -> None:
        """Take the gradient of the output; temporaries are of the size of its positions."""
        self.gradients += 1
        self._square = torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
        if gradient.numel() <= _MAX_COMPARED:
            alike = [(gradient == gradient.narrow(dim, 0, 1)).all() for dim, n in enumerate(gradient.shape) if n > 1]
            self._pooled = torch.stack(alike).any() if alike else None
        for part in self._parts:
            values = gradient if part.classes is None else gradient.movedim(part.classes, -1)
            part.gradient = values[part.index]
            if part.classes is not None:
                part.live = torch.linalg.vector_norm(gradient, torch.inf, dim=part.classes) != 0

    def seen(self, loss: float | None) -> SeenLoss:
        """Tell which loss it was.

        Args:
            loss: The value of the loss, where it is known: a mean square is told by it.

        Returns:
            The loss.

        Raises:
            ObjectiveError: It is none of the candidates, or positions have different weights.
            UndecidedError: The samples do not show it.
            EmptyBatchError: No position predicts.
        """
        if self.gradients > 1:
            raise ObjectiveError(f"{self.name} got several gradients in one step: pass loss_fn")
        for candidate in CANDIDATES:
            part = next((part for part in self._parts if part.classes == candidate.classes), None)
            if part is not None and part.gradient is not None:
                found = self._fit(candidate, part, loss)
                if found is not None:
                    return found
        what = f"the gradient of {self.name} {tuple(self.shape)} is not that of a cross-entropy"
        if loss is None:
            raise UndecidedError(
                f"{what}; a mean square is told by its value: call watch.observe(loss=...) before the step"
            )
        raise ObjectiveError(f"{what} nor of a mean square, which gnb knows: pass loss_fn, or logits_fn")

    def seen_again(self, known: SeenLoss) -> SeenLoss | None:
        """The loss of an earlier batch, of which this one shows no more than which positions predict."""
        part = next((part for part in self._parts if part.classes == known.candidate.classes), None)
        if part is None or part.live is None or self.name != known.name or not bool(part.live.any()):
            return None
        if part.gradient is None or bool(part.gradient.any()):
            return None  # it shows another loss
        return replace(known, live=part.live, weight=known.total / int(part.live.sum()))

    def _fit(self, candidate: Candidate, part: _Part, loss: float | None) -> SeenLoss | None:
        if candidate is SQUARES:
            return self._squares(loss)
        if candidate is BINARY:
            return self._binary(part)
        gradient, live = part.gradient, part.live
        if gradient is None or live is None:
            return None
        if not bool(live.any()):
            raise EmptyBatchError(f"{self.name} got no gradient: no position predicts")
        if not bool(gradient.any()):
            raise UndecidedError("none of the positions that were looked at predicts")
        known = Derivatives(part.output, gradient)
        fit = candidate.fit(known)
        return None if fit is None else self._checked(candidate, live, fit.weights[fit.predicting], known.tolerance)

    def _checked(self, candidate: Candidate, live: Tensor, weights: Tensor, tolerance: float) -> SeenLoss:
        weight = float(weights.double().mean())
        if float((weights - weight).abs().max()) > tolerance * weight:
            raise ObjectiveError(f"the positions of {self.name} have different weights in the loss: pass loss_fn")
        return SeenLoss(self.name, candidate, live, weight)

    def _binary(self, part: _Part) -> SeenLoss | None:
        """Weights |g| / |σ − y|, with targets y of 0 or 1 by the gradient's sign."""
        if part.gradient is None:
            return None
        known = Derivatives(part.output, part.gradient)
        gradient, output = part.gradient.float(), part.output.float()
        weights = gradient.abs() / torch.sigmoid(torch.where(gradient < 0, -output, output))
        live = gradient != 0
        mean = float(weights[live].mean()) if bool(live.any()) else 0.0
        if not mean > 0 or not bool(live.all()) or float((weights - mean).abs().max()) > known.tolerance * mean:
            return None
        return SeenLoss(self.name, BINARY, torch.ones(self.shape, dtype=torch.bool, device=output.device), mean)

    def _squares(self, loss: float | None) -> SeenLoss | None:
        """L = w Σ(z − y)² has ‖∂L/∂z‖² = 4 w L; w must be 1/M of a mean over the M entries, or 1 of a sum."""
        if loss is None or not loss > 0 or self._square is None:
            return None
        # The norm alone would be that of a square of a mean over some entries too, or of some of them alone.
        sampled = next(part.gradient for part in self._parts if part.classes is None)
        some = sampled is None or float((sampled == 0).float().mean()) > _MAX_ZEROS
        if some or (self._pooled is not None and bool(self._pooled)):
            return None
        entries = math.prod(self.shape)
        weight = float(self._square) / (4 * loss)
        if not any(abs(weight / nice - 1) < _NICE for nice in (1 / entries, 0.5 / entries, 1.0, 0.5)):
            return None
        return SeenLoss(
            self.name, SQUARES, torch.ones(self.shape, dtype=torch.bool, device=self._square.device), weight
        )


@dataclass(frozen=True, slots=True, eq=False)
class SeenLoss:
    """The loss of a training step, as its backward showed it.

    Attributes:
        name: The output that it is of.
        candidate: Its form.
        live: Bool, the output's shape without the classes: which positions predict.
        weight: The weight of each of them.
    """

    name: str
    candidate: Candidate
    live: Tensor
    weight: float

    @property
    def total(self) -> float:
        """The summed weight: 1 for a mean."""
        return self.weight * int(self.live.sum())

    @property
    def summed(self) -> bool:
        """Whether it is a sum over positions: then that of the whole batch is as many times a mean."""
        return scale_in_words(self.total, int(self.live.sum())) == "summed"

    @property
    def objective(self) -> ObjectiveInUse:
        """The loss in words."""
        scale = scale_in_words(self.total, int(self.live.sum()))
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
        seen, found = self.seen, named_outputs(output).get(self.seen.name)
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
        tokens = count_predicting(mask)
        scale = int(self.seen.live.sum()) if self.seen.summed else 1
        fit = Fit(mask.reshape(-1).float() * (scale / tokens), math.nan)
        return OutputLoss([Term(self.seen.name, found, self.seen.candidate, fit)], self.seen.objective)


def seen_loss(samples: Sequence[OutputSample], loss: float | None, known: SeenLoss | None = None) -> SeenLoss | None:
    """Tell which loss a backward was from.

    Args:
        samples: Samples of the outputs of one forward.
        loss: The loss's value, if it is known.
        known: That of an earlier batch; taken where the samples do not show it.

    Returns:
        The loss; None if no gradient came to any output.

    Raises:
        ObjectiveError: The loss can't be told.
        EmptyBatchError: No position predicts.
    """
    reached = [sample for sample in samples if sample.gradients]
    if len(reached) > 1:
        names = ", ".join(sample.name for sample in reached)
        raise ObjectiveError(f"the loop's loss depends on several outputs of the model, {names}: pass loss_fn")
    if not reached:
        return None
    try:
        return reached[0].seen(loss)
    except UndecidedError:
        again = None if known is None else reached[0].seen_again(known)
        if again is None:
            raise
        return again


def _part(output: Tensor, classes: int | None, generator: torch.Generator) -> _Part:
    values = output if classes is None else output.movedim(classes, -1)
    shape = values.shape if classes is None else values.shape[:-1]
    count, wanted = math.prod(shape), _ENTRIES
    if classes is not None:
        wanted = min(max(_KEPT_ENTRIES // values.shape[-1], _MIN_POSITIONS), _MAX_POSITIONS)
    # Drawn with replacement where there are many: a permutation of all would take memory for each.
    if count <= 4 * wanted:
        chosen = torch.randperm(count, generator=generator, device="cpu")[:wanted]
    else:
        chosen = torch.randint(count, (wanted,), generator=generator, device="cpu")
    index = tuple(each.to(output.device) for each in torch.unravel_index(chosen, shape))
    return _Part(classes, index, values[index])
