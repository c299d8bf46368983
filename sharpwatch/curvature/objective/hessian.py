"""Products with the Hessian of a mean loss, by differentiating twice or by finite differences of gradients."""

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
from sharpwatch.curvature.objective.batch import Batch, LossFn
from sharpwatch.curvature.objective.objective import (
    Objective,
    custom_functions,
    is_smooth,
    require_twice_differentiable,
    to_dense,
    twice_differentiable,
)
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.curvature.state.isolation import isolated
from sharpwatch.curvature.statistics.estimate import Cost
from sharpwatch.errors import ProbeError

Method = Literal["auto", "autograd", "differences"]
METHODS: tuple[Method, ...] = ("auto", "autograd", "differences")
_MAX_DISAGREEMENT = 0.05  # relative, of an autograd product and a finite difference; rounding gives below 0.001
_VECTORS_PER_BATCH = 8  # for batched products; 16 were not faster
_TWICE_DIFFERENTIABLE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # result of the first trial
_RELATIVE_STEP = 7e-3  # ε‖v‖ of a difference, relative to the norm of the block's weights
# Fourth-order central difference: offsets in steps, and weights (Fornberg 1988, table 1).
_STENCIL = ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12))


class Hessian(Protocol):
    """The Hessian H of an objective at the present weights, accessed by matrix products."""

    objective: Objective
    method: str

    @property
    def smooth(self) -> bool:
        """Whether the loss has no jumps and no kinks, so that differences of losses agree with derivatives."""
        ...

    def products(self, space: ParameterSpace, vectors: Tensor, index: int | None = None) -> Tensor:
        """H·`vectors`, restricted to the rows and columns of `space`.

        Args:
            space: The parameters.
            vectors: [p, space.size].
            index: A batch, for its own Hessian H_i; None for H of the mean loss.

        Returns:
            The products [p, space.size].
        """
        ...

    def gradient(self, index: int) -> dict[str, Tensor]:
        """∇L_index by parameter name; a parameter that the loss does not depend on is missing."""
        ...


@contextmanager
def open_hessian(  # noqa: PLR0913 - settings are keyword-only
    model: nn.Module,
    block_map: BlockMap,
    batches: Sequence[Batch],
    *,
    loss_fn: LossFn | None = None,
    method: Method = "auto",
    shares: Sequence[float] | None = None,
) -> Iterator[Hessian]:
    """Open the Hessian of `model`'s mean loss over `batches`, in float32 or wider; leaves `model` unchanged.

    Args:
        model: The model.
        block_map: The division of its parameters into blocks.
        batches: The batches of the loss.
        loss_fn: Computes the loss; None to use the model's own, see `training_loss`.
        method: "autograd" differentiates twice, "differences" takes finite differences of gradients, and "auto" takes
            the first that works, tried with one product once for each model.
        shares: The weights of the batches; None to weigh them by labels and rows.

    Yields:
        The Hessian.

    Raises:
        ProbeError: The derivatives cannot be computed.
    """
    known_twice_differentiable = _TWICE_DIFFERENTIABLE.get(model)
    if method == "autograd" or (method == "auto" and known_twice_differentiable is not False):
        with isolated(model, exact=True) as live:
            hessian = AutogradHessian(Objective(live, batches, loss_fn, shares))
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
                    _TWICE_DIFFERENTIABLE.pop(model, None)  # the model may have changed: try again next time
                    raise
                return
            if method == "autograd":
                raise ProbeError(f"{failure_reason}; method='differences', gnb and linesearch do not need that")
            del hessian
    with isolated(model, exact=True) as live:
        differences = FiniteDifferenceHessian(Objective(live, batches, loss_fn, shares))
        if known_twice_differentiable is None:
            differences.require_float32()
        yield differences
        if method == "auto":
            _TWICE_DIFFERENTIABLE[model] = False  # only now: if differences fail too, batch or memory may be the cause


class AutogradHessian:
    """Exact products by reverse-over-reverse differentiation.

    Pearlmutter, "Fast exact multiplication by the Hessian" (1994). The graph of the gradient of the last used batch is
    kept for further products.
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
        """Whether the loss of the batches used so far has no jumps and no kinks."""
        self._gradient_graph(max(self._graph_index, 0))
        return self._smooth

    def failure_reason(self, space: ParameterSpace) -> str | None:
        """Try a product over all of `space`.

        A custom function whose backward autograd cannot differentiate would silently be treated as constant. So if the
        graph has custom functions, the product is compared with a finite difference of gradients.

        Args:
            space: The parameters to differentiate by.

        Returns:
            The reason why the model cannot be differentiated twice, or None if it can.
        """
        try:
            along = space.flatten(self.gradient(0))
            product = self._product(0, space, along[None])[0]
        except ProbeError as error:
            return str(error)  # the error's traceback would keep the graph alive
        # Memory says nothing about derivatives: a smaller batch may do.
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return f"the model cannot be differentiated twice in float32: {error}"
        if not self._custom_functions:
            return None
        # Along the gradient: it has a part in every parameter that the loss depends on.
        reference = FiniteDifferenceHessian(self.objective).products(space, along[None], 0)[0]
        if torch.linalg.vector_norm(product - reference) <= _MAX_DISAGREEMENT * torch.linalg.vector_norm(reference):
            return None
        names = ", ".join(sorted(self._custom_functions))
        return f"the model cannot be differentiated twice: autograd finds no second derivative of {names}"

    def gradient(self, index: int) -> dict[str, Tensor]:
        """∇L_index by parameter name; a parameter that the loss does not depend on is missing."""
        return {name: g.detach() for name, g in self._gradient_graph(index).items()}

    def products(self, space: ParameterSpace, vectors: Tensor, index: int | None = None) -> Tensor:
        """H·`vectors` within `space`; see `Hessian.products`."""
        if index is not None:
            return self._products(index, space, vectors)
        # Batch by batch: only one batch's graph is held at a time. The batch whose graph is held comes first, so that
        # it isn't built again, and is added in its turn, so that the sum is the same whichever it was.
        held = self._graph_index
        first = self._products(held, space, vectors) if held >= 0 else vectors
        total = torch.zeros_like(vectors)
        for i, share in enumerate(self.objective.shares):
            total += share * (first if i == held else self._products(i, space, vectors))
        return total

    def _products(self, index: int, space: ParameterSpace, vectors: Tensor) -> Tensor:
        """Products on one batch, batched if possible: that takes 0.6 to 0.9 of the time.

        Batching fails if an operator has no batching rule, or memory runs out; then vectors go one by one.
        """
        if len(vectors) > 1 and self._batched:
            try:
                return torch.cat(
                    [
                        self._product(index, space, chunk, batched=True)
                        for chunk in torch.split(vectors, _VECTORS_PER_BATCH)
                    ]
                )
            except (RuntimeError, NotImplementedError, ProbeError):  # a real failure is raised again below
                self._batched = False
        return torch.cat([self._product(index, space, vector[None]) for vector in vectors])

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
            self._graph, self._graph_index = {}, -1  # frees the old graph before the next one is built
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
    """Products from gradients at θ ± εv and θ ± 2εv, with ε‖v‖ = 0.007‖θ_b‖; the weights are copies.

    A fixed absolute ε, as other tools use, is off by 5 % in float32 and by 98 % in bfloat16. The second-order central
    difference has no ε that suits every block: it was off by 0.4 % where this one is off by 0.06 %.
    """

    method = "gradient differences"

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def require_float32(self) -> None:
        """Raise `ProbeError` if the model cannot run in float32, for example because its kernels need bfloat16."""
        try:
            self.objective.value(0)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ProbeError(
                f"the model cannot run in float32, which finite differences need (gnb does not): {error}"
            ) from error

    @cached_property
    def smooth(self) -> bool:
        """Whether the loss of the first batch has no jumps and no kinks."""
        return is_smooth(self.objective.loss(0))

    def gradient(self, index: int) -> dict[str, Tensor]:
        """∇L_index by parameter name; a parameter that the loss does not depend on is missing."""
        return self.objective.gradient(index, list(self.objective.live.trainable))

    def products(self, space: ParameterSpace, vectors: Tensor, index: int | None = None) -> Tensor:
        """H·`vectors` within `space`; see `Hessian.products`."""
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
    """The step ε of a difference along `vector`: it moves the weights by a small fraction of their norm."""
    # weight_scale·√size is ‖θ_b‖, with a bound from below for blocks near zero: scaled by their own norm, their
    # differences were rounding alone.
    length = float(torch.linalg.vector_norm(vector))
    return _RELATIVE_STEP * space.weight_scale * math.sqrt(space.size) / length if length > 0 else 1.0
