"""Which argument of the model holds the targets of a verified loss, and how many positions of another batch predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpwatch.curvature.objective.batch import Batch, named_arguments
from sharpwatch.curvature.objective.fits import Fit


@dataclass(frozen=True, slots=True)
class TargetSource:
    """How the targets of a loss follow from an argument of the model.

    Attributes:
        name: The argument.
        shift: The dimension along which the target of a position is the entry after it; None if it is the entry itself.
        ignored: Entries that are no targets; negative ones are none either.
    """

    name: str
    shift: int | None
    ignored: frozenset[int]

    def __str__(self) -> str:
        return f", {self.name} {'as they stand' if self.shift is None else 'shifted by one'}"

    def count(self, model: nn.Module, batch: Batch) -> int | None:
        """Count the positions of a batch that predict; None if it lacks the argument."""
        labels = named_arguments(model, batch).get(self.name)
        if not isinstance(labels, Tensor):
            return None
        labels = labels if self.shift is None else _after(labels, self.shift)
        skipped = labels.new_tensor(sorted(self.ignored))
        return int(((labels >= 0) & ~torch.isin(labels, skipped)).sum())


def find_source(shape: torch.Size, fit: Fit, model: nn.Module, arguments: Batch) -> TargetSource | None:
    """Find the argument that the targets of a loss are from.

    Args:
        shape: The shape of the positions.
        fit: The loss's weights and targets.
        model: The model, for its signature.
        arguments: What it was called with.

    Returns:
        The source; None if targets are no classes, or in no argument.
    """
    if fit.targets is None:
        return None
    named = named_arguments(model, arguments)
    # Labels first: the inputs of a language model, shifted, are often its targets as well.
    for name in sorted(named, key=lambda each: not any(word in each for word in ("label", "target"))):
        labels = named[name]
        if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.numel() == shape.numel():
            # An output may have all positions in one dimension.
            labels = labels.to(fit.targets.device) if labels.dim() > 1 else labels.view(shape).to(fit.targets.device)
            source = _source(name, labels, fit.predicting.view(labels.shape), fit.targets.view(labels.shape))
            if source is not None:
                return source
    return None


def _source(name: str, labels: Tensor, live: Tensor, targets: Tensor) -> TargetSource | None:
    shifts = [None, labels.dim() - 1, 0] if labels.dim() == 2 else [None]
    for shift in shifts:
        if shift is None:
            given, wanted, where = labels, targets, live
        elif bool(live.select(shift, -1).any()):
            continue  # the last position has no entry after it
        else:
            given, wanted, where = _after(labels, shift), _before(targets, shift), _before(live, shift)
        if bool((given == wanted)[where].all()):
            ignored = set(given[~where].tolist()) - set(given[where].tolist())
            return TargetSource(name, shift, frozenset(ignored))
    return None


def _after(values: Tensor, dimension: int) -> Tensor:
    return values.narrow(dimension, 1, values.shape[dimension] - 1)


def _before(values: Tensor, dimension: int) -> Tensor:
    return values.narrow(dimension, 0, values.shape[dimension] - 1)
