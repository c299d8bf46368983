"""The mean loss over batches as a function of the weights; whether it is smooth and can be differentiated twice.

For its own operators torch raises an error if the second derivative is missing. For a Python `autograd.Function`, whose
backward is marked once-differentiable or calls a custom kernel, the gradient is silently treated as constant, and the
Hessian comes out wrong. The checks walk the loss's autograd graph to find these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpwatch.common.rng_state import rng_state_restored
from sharpwatch.curvature.objective.batch import Batch, LossFn, count_tokens, training_loss
from sharpwatch.curvature.objective.fits import NO_SECOND_DERIVATIVE
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.curvature.state.isolation import Functional, upcast
from sharpwatch.curvature.statistics.estimate import Cost
from sharpwatch.errors import ProbeError

# Packages whose backwards are kernels that autograd cannot differentiate.
_KERNEL_PACKAGES = ("flash_attn", "liger_kernel", "xformers", "apex", "transformer_engine")
# Prefixes of the backward nodes of functions with kinks or jumps.
_NONSMOOTH_BACKWARDS = (
    *("Relu", "LeakyRelu", "Prelu", "Rrelu", "Elu", "Threshold", "Hard", "Softshrink", "Clamp"),
    *("Abs", "Huber", "SmoothL1", "Round", "Floor", "Ceil", "Trunc", "Sign", "Remainder", "Fmod"),
    *("Topk", "Sort", "Kthvalue", "Gather", "Max", "Min", "Amax", "Amin", "AdaptiveMax", "Cummax", "Cummin"),
    *("Median", "Mode"),
)


class Objective:
    """The loss L = Σ_i w_i L_i over `batches`, where w_i is the share of batch i.

    Args:
        live: The stand-in for the model.
        batches: The batches.
        loss_fn: Computes the loss; None to use the model's own, see `training_loss`.
        shares: The weights w_i; None for the shares of the predicting positions, by the labels.

    Attributes:
        tokens: Number of predicting positions of each batch, by the labels; empty if `shares` were given.
        shares: The weights w_i.
        cost: Passes over the data so far.

    Raises:
        EmptyBatchError: Every label of a batch is ignored.
    """

    def __init__(
        self,
        live: Functional,
        batches: Sequence[Batch],
        loss_fn: LossFn | None = None,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.live = live
        self._batches = [batch.prepared().map_tensors(upcast) if live.exact else batch.prepared() for batch in batches]
        self._loss_fn = loss_fn
        if shares is None:
            self.tokens = [count_tokens(live.inner, batch) for batch in batches]
            # By positions, so that L is the mean loss of all rows in one batch, however they are split.
            self.shares = [tokens / sum(self.tokens) for tokens in self.tokens]
        else:
            self.tokens, self.shares = [], list(shares)
        self.cost = Cost()

    def __len__(self) -> int:
        return len(self._batches)

    def loss(self, index: int) -> Tensor:
        """L_i at the present weights: a scalar with its graph."""
        self.cost += Cost(forwards=self.shares[index])
        # Each call draws the same random numbers, as a diffusion's noise: L must be one function of the weights.
        with rng_state_restored(self.live.inner, self._loss_fn):
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
        # New tensors in place of the leaves: adding to the weights and subtracting again would leave rounding errors.
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


def require_twice_differentiable(loss: Tensor) -> None:
    """Check that no function in the graph of `loss` lacks a second derivative.

    Args:
        loss: A scalar with its graph.

    Raises:
        ProbeError: A function has no second derivative; the message names it.
    """
    for node in _nodes(loss):
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and _is_once_differentiable(function):
            name = f"{function.__module__}.{function.__qualname__}"
            raise ProbeError(f"the model cannot be differentiated twice: {name} has no second derivative")


def custom_functions(loss: Tensor) -> list[str]:
    """Names of the Python `autograd.Function`s in the graph of `loss`, sorted."""
    functions = (getattr(type(node), "_forward_cls", None) for node in _nodes(loss))
    return sorted({f"{function.__module__}.{function.__qualname__}" for function in functions if function is not None})


def is_smooth(loss: Tensor) -> bool:
    """Whether no operation in the graph of `loss` has a kink or makes a choice, as ReLU or a top-k router does.

    Finite differences step across kinks and jumps, and measure a curvature there that derivatives do not have.
    """
    return not any(type(node).__name__.startswith(_NONSMOOTH_BACKWARDS) for node in _nodes(loss))


def _nodes(loss: Tensor) -> Iterator[Any]:
    # No recursion: a deep model's graph is deeper than Python's stack.
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """A context for a loss and its derivatives: attention uses the kernel that has a second derivative.

    This holds for attention that is recomputed in the backward too.

    Raises:
        ProbeError: torch reports a missing second derivative.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_SECOND_DERIVATIVE):
            raise
        raise ProbeError(f"the model cannot be differentiated twice: {error}") from error


def _is_once_differentiable(function: type[Any]) -> bool:
    # `once_differentiable` leaves no mark but its wrapper, whose code is in its file.
    code = getattr(function.backward, "__code__", None)
    marked = code is not None and code.co_filename == torch.autograd.function.once_differentiable.__code__.co_filename
    return (marked and hasattr(function.backward, "__wrapped__")) or any(
        package in function.__module__ for package in _KERNEL_PACKAGES
    )
