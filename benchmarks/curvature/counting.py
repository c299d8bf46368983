"""Counting passes, the same way for everybody: calls of the model's forward and of autograd's engine."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn


@dataclass
class Passes:
    """What was called. `vectors` counts a batched backward once for each of its vectors, `backwards` once."""

    forwards: int = 0
    backwards: int = 0
    vectors: int = 0


@contextmanager
def counted(model: nn.Module) -> Iterator[Passes]:
    """Counts within, on `type(model)`: hooks don't do, for not everybody lets them run."""
    passes = Passes()
    kind = type(model)
    forward, backward, grad = kind.forward, torch.autograd.backward, torch.autograd.grad

    @functools.wraps(forward)
    def counting_forward(*args: Any, **kwargs: Any) -> Any:
        passes.forwards += 1
        return forward(*args, **kwargs)

    @functools.wraps(backward)
    def counting_backward(*args: Any, **kwargs: Any) -> Any:
        passes.backwards += 1
        passes.vectors += 1
        return backward(*args, **kwargs)

    @functools.wraps(grad)
    def counting_grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        passes.backwards += 1
        first = grad_outputs if isinstance(grad_outputs, torch.Tensor) else next(iter(grad_outputs or ()), None)
        passes.vectors += len(first) if kwargs.get("is_grads_batched") and first is not None else 1
        return grad(outputs, inputs, grad_outputs, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(kind, "forward", counting_forward))
        stack.enter_context(mock.patch.object(torch.autograd, "backward", counting_backward))
        stack.enter_context(mock.patch.object(torch.autograd, "grad", counting_grad))
        yield passes
