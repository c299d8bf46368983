"""Checks on a loss's autograd graph: operations without a second derivative, and points where it is not smooth.

For its own operators torch raises an error if the second derivative is missing. For a Python `autograd.Function`, whose
backward is marked once-differentiable or calls a custom kernel, the gradient is silently treated as constant, and the
Hessian comes out wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpwatch.errors import ProbeError

# Packages whose backwards are kernels that autograd cannot differentiate.
_KERNEL_PACKAGES = ("flash_attn", "liger_kernel", "xformers", "apex", "transformer_engine")
# Prefixes of the backward nodes of functions with kinks or jumps.
_NONSMOOTH_BACKWARDS: tuple[str, ...] = (
    "Relu",
    "LeakyRelu",
    "Prelu",
    "Rrelu",
    "Elu",
    "Threshold",
    "Hard",
    "Softshrink",
    "Clamp",
)
_NONSMOOTH_BACKWARDS += ("Abs", "Huber", "SmoothL1", "Round", "Floor", "Ceil", "Trunc", "Sign", "Remainder", "Fmod")
_NONSMOOTH_BACKWARDS += (
    "Topk",
    "Sort",
    "Kthvalue",
    "Gather",
    "Max",
    "Min",
    "Amax",
    "Amin",
    "AdaptiveMax",
    "Cummax",
    "Cummin",
)
_NONSMOOTH_BACKWARDS += ("Median", "Mode")
_NO_SECOND_DERIVATIVE = ("not implemented", "differentiate twice", "double backward", "no autograd formula")


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
        if not any(words in str(error) for words in _NO_SECOND_DERIVATIVE):
            raise
        raise ProbeError(f"the model cannot be differentiated twice: {error}") from error


def _is_once_differentiable(function: type[Any]) -> bool:
    code = getattr(function.backward, "__code__", None)
    marked = code is not None and code.co_filename == torch.autograd.function.once_differentiable.__code__.co_filename
    return (marked and hasattr(function.backward, "__wrapped__")) or any(
        package in function.__module__ for package in _KERNEL_PACKAGES
    )
