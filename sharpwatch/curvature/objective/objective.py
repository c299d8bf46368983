"""The mean loss over batches as a function of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sharpwatch.curvature.objective.batch import Batch, LossFn, count_tokens, training_loss
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.curvature.state.isolation import Functional, upcast
from sharpwatch.curvature.statistics.estimate import Cost


class Objective:
    """The loss L = Σ_i w_i L_i over `batches`, where w_i is batch i's share of the predicting positions.

    Args:
        live: The stand-in for the model.
        batches: The batches.
        loss_fn: Computes the loss; None to use the model's own, see `training_loss`.

    Attributes:
        tokens: Number of predicting positions of each batch.
        shares: The weights w_i.
        cost: Passes over the data so far.

    Raises:
        EmptyBatchError: Every label of a batch is ignored.
    """

    def __init__(self, live: Functional, batches: Sequence[Batch], loss_fn: LossFn | None = None) -> None:
        self.live = live
        self._batches = [batch.prepared().map_tensors(upcast) if live.exact else batch.prepared() for batch in batches]
        self._loss_fn = loss_fn
        self.tokens = [count_tokens(live.inner, batch) for batch in batches]
        self.shares = [tokens / sum(self.tokens) for tokens in self.tokens]
        self.cost = Cost()

    def __len__(self) -> int:
        return len(self._batches)

    def loss(self, index: int) -> Tensor:
        """L_i at the present weights: a scalar with its graph."""
        self.cost += Cost(forwards=self.shares[index])
        return training_loss(self.live, self.live.inner, self._batches[index], self._loss_fn)

    def value(self, index: int) -> float:
        """L_i at the present weights, without a graph."""
        with torch.no_grad():
            return float(self.loss(index).double())

    def gradient(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """∇L_i with respect to the parameters `names`; a parameter that the loss does not depend on is missing."""
        leaves = [self.live.leaves[name] for name in names]
        raw = torch.autograd.grad(self.loss(index), leaves, allow_unused=True)
        self.cost += Cost(backwards=self.shares[index])
        return {name: to_dense(g) for name, g in zip(names, raw, strict=True) if g is not None}

    @contextmanager
    def displaced(self, space: ParameterSpace, displacement: Tensor) -> Iterator[Mapping[str, Tensor]]:
        """A context in which the weights are θ + `displacement`, on copies.

        Args:
            space: The parameters that are displaced.
            displacement: Vector [space.size].

        Yields:
            The displaced leaves by parameter name, to be differentiated by.
        """
        leaves = self.live.leaves
        moved = {
            name: (leaves[name].detach() + step[0]).to(leaves[name].dtype).requires_grad_()
            for name, step in space.unflatten(displacement[None]).items()
        }
        saved = {name: leaves[name] for name in moved}
        try:
            for name, tensor in moved.items():
                leaves[name] = tensor
                self.live.set_parameter(name, tensor)
            yield moved
        finally:
            for name, tensor in saved.items():
                leaves[name] = tensor
                self.live.set_parameter(name, tensor)


def to_dense(gradient: Tensor) -> Tensor:
    """A dense gradient; that of a sparse embedding is converted."""
    return gradient.to_dense() if gradient.is_sparse else gradient
