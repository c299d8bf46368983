"""Products with the Hessian of a mean loss: by differentiating twice, or by differences of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.autograd_graph import (
    custom_functions,
    is_smooth,
    require_twice_differentiable,
    twice_differentiable,
)
from sharpwatch.curvature.objective.batch import Batch
from sharpwatch.curvature.objective.objective import Objective, to_dense
from sharpwatch.curvature.objective.outputs import LossFn
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.curvature.state.isolation import isolated
from sharpwatch.curvature.statistics.estimate import Cost
from sharpwatch.errors import ProbeError

Method = Literal["auto", "autograd", "differences"]
METHODS: tuple[Method, ...] = ("auto", "autograd", "differences")
_MAX_DISAGREEMENT = 0.05  # of product and difference; rounding makes less than a thousandth
_VECTORS_PER_BATCH = 8  # vectors: measured, 16 bring nothing more
_TWICE_DIFFERENTIABLE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # whether a model was seen to go
_RELATIVE_STEP = 7e-3  # of a difference, over the norm of the block's weights
# Central differences of the fourth order: offsets in steps, and weights (Fornberg 1988, table 1).
_STENCIL = ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12))


class Hessian(Protocol):
    """H of an objective at the present weights, block by block."""

    objective: Objective
    method: str

    @property
    def smooth(self) -> bool:
        """Whether the loss has neither jumps nor kinks, so that differences of it see what derivatives do."""
        ...

    def products(self, space: ParameterSpace, vectors: Tensor, index: int | None = None) -> Tensor:
        """The rows and columns of `space` in H (of batch `index` alone, where given), times `vectors`; [p, size]."""
        ...

    def gradient(self, index: int) -> dict[str, Tensor]:
        """∇L_index by parameter name; one that the loss does not reach is left out."""
        ...


@contextmanager
def open_hessian(
    model: nn.Module,
    block_map: BlockMap,
    batches: Sequence[Batch],
    *,
    loss_fn: LossFn | None = None,
    method: Method = "auto",
) -> Iterator[Hessian]:
    """The Hessian of `model`'s mean loss over `batches`, in float32 at least; leaves no trace in `model`.

    "auto" differentiates twice where that goes, and takes differences elsewhere; which of them is tried with one
    product, once for each model. Raises `ProbeError` where no derivative can be had.
    """
    known_twice_differentiable = _TWICE_DIFFERENTIABLE.get(model)
    if method == "autograd" or (method == "auto" and known_twice_differentiable is not False):
        with isolated(model, exact=True) as live:
            hessian = AutogradHessian(Objective(live, batches, loss_fn))
            failure_reason = (
                None
                if known_twice_differentiable
                else hessian.failure_reason(ParameterSpace(block_map, None, live.leaves))
            )
            if failure_reason is None:
                _TWICE_DIFFERENTIABLE[model] = True
                try:
                    yield hessian
                except ProbeError:
                    _TWICE_DIFFERENTIABLE.pop(model, None)  # it may have changed since: to be tried again
                    raise
                return
            if method == "autograd":
                raise ProbeError(f"{failure_reason}; differences of gradients, gnb and linesearch can do without")
            del hessian
    with isolated(model, exact=True) as live:
        differences = FiniteDifferenceHessian(Objective(live, batches, loss_fn))
        if known_twice_differentiable is None:
            differences.require_float32()
        yield differences
        if method == "auto":
            _TWICE_DIFFERENTIABLE[model] = False  # where these fail too, it may be the batch's doing, or memory's


class AutogradHessian:
    """Exact products, by reverse over reverse mode (Pearlmutter, "Fast exact multiplication by the Hessian", 1994).

    The graph of one batch's gradient is kept, for all blocks and vectors; of several batches, the last one's.
    """

    method = "autograd"

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._graph_index = -1
        self._graph: dict[str, Tensor] = {}
        self._batched = True
        self._smooth = True
        self._custom_functions: set[str] = set()

    @property
    def smooth(self) -> bool:
        """Whether the loss of the batches seen so far has neither jumps nor kinks."""
        self._gradient_graph(max(self._graph_index, 0))
        return self._smooth

    def failure_reason(self, space: ParameterSpace) -> str | None:
        """Why the model can't be differentiated twice, or None; tried with a product over all of `space`.

        A function of the model's own whose backward autograd can't see into would be left out without a word: where
        there is one, the product is compared with a difference of gradients.
        """
        try:
            along = space.flatten(self.gradient(0))
            product = self._product(0, space, along[None])[0]
        except ProbeError as error:
            return str(error)  # not the error itself, whose traceback holds the graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return f"the model can't be differentiated twice in float32: {error}"
        if not self._custom_functions:
            return None
        reference = FiniteDifferenceHessian(self.objective).products(space, along[None], 0)[0]
        if torch.linalg.vector_norm(product - reference) <= _MAX_DISAGREEMENT * torch.linalg.vector_norm(reference):
            return None
        names = ", ".join(sorted(self._custom_functions))
        return f"the model can't be differentiated twice: of {names} autograd sees no second derivative"

    def gradient(self, index: int) -> dict[str, Tensor]:
        """∇L_index by parameter name; one that the loss does not reach is left out."""
        return {name: g.detach() for name, g in self._gradient_graph(index).items()}

    def products(self, space: ParameterSpace, vectors: Tensor, index: int | None = None) -> Tensor:
        """H·`vectors` within `space`, [p, size]."""
        if index is not None:
            return self._products(index, space, vectors)
        total = torch.zeros_like(vectors)
        for each, share in enumerate(self.objective.shares):
            total += share * self._products(each, space, vectors)
        return total

    def _products(self, index: int, space: ParameterSpace, vectors: Tensor) -> Tensor:
        """Several at once, which takes 0.6 to 0.9 of the time, unless an operator has no rule for it or memory ends."""
        if len(vectors) > 1 and self._batched:
            try:
                return torch.cat(
                    [
                        self._product(index, space, some, batched=True)
                        for some in torch.split(vectors, _VECTORS_PER_BATCH)
                    ]
                )
            except (RuntimeError, NotImplementedError, ProbeError):  # if it can't be had at all, it raises again below
                self._batched = False
        return torch.cat([self._product(index, space, one[None]) for one in vectors])

    def _product(self, index: int, space: ParameterSpace, vectors: Tensor, *, batched: bool = False) -> Tensor:
        graph = self._gradient_graph(index)
        names = [name for name in space.names if name in graph and graph[name].requires_grad]
        if not names:
            return torch.zeros_like(vectors)
        unflatten = space.unflatten(vectors)
        leaves = [self.objective.live.leaves[name] for name in space.names]
        with twice_differentiable():
            raw = torch.autograd.grad(
                [graph[name] for name in names],
                leaves,
                [unflatten[name].to(graph[name]) if batched else unflatten[name][0].to(graph[name]) for name in names],
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
        self.objective.cost += Cost(backwards=self.objective.shares[index] * len(vectors))
        reached = {
            name: to_dense(h) if batched else to_dense(h)[None]
            for name, h in zip(space.names, raw, strict=True)
            if h is not None
        }
        return space.flatten_stacked(reached).to(vectors.dtype) if reached else torch.zeros_like(vectors)

    def _gradient_graph(self, index: int) -> dict[str, Tensor]:
        if index != self._graph_index:
            self._graph, self._graph_index = {}, -1  # before the next is built
            leaves = self.objective.live.trainable
            with twice_differentiable():
                loss = self.objective.loss(index)
                require_twice_differentiable(loss)
                raw = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
            self._smooth = self._smooth and is_smooth(loss)
            self._custom_functions.update(custom_functions(loss))
            self.objective.cost += Cost(backwards=self.objective.shares[index])
            self._graph = {name: to_dense(g) for name, g in zip(leaves, raw, strict=True) if g is not None}
            self._graph_index = index
        return self._graph


class FiniteDifferenceHessian:
    """FiniteDifferenceHessian of gradients at θ ± εv and θ ± 2εv, with ε‖v‖ = 0.007‖θ_b‖; the weights are copies.

    An absolute ε, as others take it, is off by 5 % in float32 and by 98 % in bfloat16. The plain central difference
    has no ε that is right for every block: measured, off by 0.4 % where this one is by 0.06 %.
    """

    method = "gradient differences"

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def require_float32(self) -> None:
        """Raise `ProbeError` where the model can't be run in float32, as with kernels for half precision alone."""
        try:
            self.objective.value(0)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ProbeError(
                f"the model can't be run in float32, as differences need; gnb can be had: {error}"
            ) from error

    @cached_property
    def smooth(self) -> bool:
        """Whether the first batch's loss has neither jumps nor kinks."""
        return is_smooth(self.objective.loss(0))

    def gradient(self, index: int) -> dict[str, Tensor]:
        """∇L_index by parameter name; one that the loss does not reach is left out."""
        return self.objective.gradient(index, list(self.objective.live.trainable))

    def products(self, space: ParameterSpace, vectors: Tensor, index: int | None = None) -> Tensor:
        """H·`vectors` within `space`, [p, size]."""
        shares = self.objective.shares
        weights = dict(enumerate(shares)) if index is None else {index: 1.0}
        return torch.stack([self._product(space, vector, weights) for vector in vectors])

    def _product(self, space: ParameterSpace, vector: Tensor, weights: Mapping[int, float]) -> Tensor:
        step = difference_step(space, vector)
        total = torch.zeros_like(vector)
        for index, share in weights.items():
            for offset, weight in _STENCIL:
                with self.objective.displaced(space, offset * step * vector):
                    gradient = space.flatten(self.objective.gradient(index, space.names))
                    total += (weight * share / step) * gradient
        return total


def difference_step(space: ParameterSpace, vector: Tensor) -> float:
    """ε of a difference along `vector`, which moves the weights by a small share of what they are."""
    length = float(torch.linalg.vector_norm(vector))
    return _RELATIVE_STEP * space.weight_scale * math.sqrt(space.size) / length if length > 0 else 1.0
