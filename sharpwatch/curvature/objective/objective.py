"""The mean loss over some batches as a function of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.outputs import LossFn, count_tokens, training_loss
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.curvature.state.isolation import Functional, upcast
from sharpwatch.curvature.statistics.estimate import Cost


class Objective:
    """L = Σ_i w_i L_i over `batches`, w_i batch i's share of the positions that predict; `cost` counts what is spent.

    Raises `ProbeError` where no position of a batch predicts.
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
        """L_i at the present weights, a scalar with its graph."""
        self.cost += Cost(forwards=self.shares[index])
        return training_loss(self.live, self.live.inner, self._batches[index], self._loss_fn)

    def value(self, index: int) -> float:
        """L_i at the present weights."""
        with torch.no_grad():
            return float(self.loss(index).double())

    def gradient(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """∇L_i by the parameters `names` at the present weights; one that it does not reach is left out."""
        leaves = [self.live.leaves[name] for name in names]
        raw = torch.autograd.grad(self.loss(index), leaves, allow_unused=True)
        self.cost += Cost(backwards=self.shares[index])
        return {name: to_dense(g) for name, g in zip(names, raw, strict=True) if g is not None}

    @contextmanager
    def displaced(self, space: ParameterSpace, displacement: Tensor) -> Iterator[Mapping[str, Tensor]]:
        """Inside, the weights are θ + `displacement` [space.size], on copies; gives the copies to differentiate by."""
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
    """A gradient as its parameter is, also that of a sparse embedding."""
    return gradient.to_dense() if gradient.is_sparse else gradient
