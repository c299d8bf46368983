"""What of an output's gradient is from the loss directly, and what comes through the model's other outputs.

A loop's loss is a function L(z_1, z_2, …) of what the model returned. Where z_1 are hidden states and z_2 logits that a
head makes of them, autograd brings z_1 the sum of ∂L/∂z_1 and of what comes back from z_2. Hooks of the head's nodes in
the graph see the second; hooks of the nodes between an output and the model's own loss see what that loss brings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

Gradients = tuple[Tensor | None, ...]
Edge = tuple[Node, int]


class Receiver(Protocol):
    """Takes the gradients of one output."""

    def take(self, gradient: Tensor, inner: Tensor | None, own: Tensor | None) -> None:
        """A backward has reached the output.

        Args:
            gradient: All that arrived.
            inner: What of it came through other outputs; None for nothing.
            own: What of it came through the model's own loss, not counting `inner`; None for nothing.
        """


@dataclass(slots=True, eq=False)
class _Parts:
    """What has come through nodes within the model so far, in the backward that runs."""

    backward: int = -1
    inner: Tensor | None = None
    own: Tensor | None = None


def listen(
    outputs: Sequence[tuple[Tensor, Receiver]],
    loss: Tensor | None,
    hook: Callable[[Callable[..., None]], Callable[..., None]],
) -> list[RemovableHandle]:
    """Listen to the gradients of a model's outputs, which are left as they are.

    The hooks are those of the graph's nodes, which are not kept: they would keep the graph of a forward without
    backward. Hooks of tensors would be guards of torch.compile.

    Args:
        outputs: The outputs with their graphs, and who takes their gradients.
        loss: The model's own loss, if it returned one.
        hook: Makes a hook of a function.

    Returns:
        The handles of the hooks.
    """
    edges = [get_gradient_edge(tensor) for tensor, _ in outputs]
    parts = [_Parts() for _ in outputs]
    handles = []
    targets = {(edge.node, edge.output_nr): index for index, edge in enumerate(edges)}
    starts = [edge.node for edge in edges]
    for node, place, taken, is_own in _consumers(targets, starts, None if loss is None else loss.grad_fn):
        returned = partial(_returned, parts[targets[taken]], place, is_own)
        handles.append(node.register_hook(hook(returned)))
    for edge, of_output, (_, receiver) in zip(edges, parts, outputs, strict=True):
        arrived = partial(_arrived, of_output, edge.output_nr, receiver)
        handles.append(edge.node.register_prehook(hook(arrived)))
    return handles


def _returned(parts: _Parts, place: int, is_own: bool, inputs: Gradients, _: Gradients) -> None:
    """A node within the model returned gradients."""
    gradient = inputs[place]
    if gradient is None:
        return
    backward = torch._C._current_graph_task_id()  # noqa: SLF001 - no public way
    if parts.backward != backward:  # an earlier one ended before the output, as that of `torch.autograd.grad` may
        parts.backward, parts.inner, parts.own = backward, None, None
    # Sums are new tensors: autograd goes on with the one that was returned.
    if is_own:
        parts.own = gradient if parts.own is None else parts.own + gradient
    else:
        parts.inner = gradient if parts.inner is None else parts.inner + gradient


def _arrived(parts: _Parts, place: int, receiver: Receiver, gradients: Gradients) -> None:
    """All gradients of an output have come."""
    gradient, inner, own = gradients[place], parts.inner, parts.own
    if parts.backward != torch._C._current_graph_task_id():  # noqa: SLF001 - no public way
        inner = own = None
    parts.inner = parts.own = None
    if gradient is not None:
        # A node may return another format or shape, which autograd then converts as is done here.
        receiver.take(gradient, _like(gradient, inner), _like(gradient, own))


def _like(gradient: Tensor, part: Tensor | None) -> Tensor | None:
    return None if part is None else part.to(gradient.dtype).sum_to_size(gradient.shape)


def _consumers(
    targets: dict[Edge, int], outputs: Sequence[Node], loss: Node | None
) -> Iterator[tuple[Node, int, Edge, bool]]:
    """The nodes that take an output, the place among what they return, and whether only the model's loss needs them."""
    # A node is younger than all that it takes.
    oldest = min((node._sequence_nr() for node in outputs), default=0)  # noqa: SLF001 - no public way
    seen: set[Node] = set()
    for starts, is_own in ((outputs, False), ([] if loss is None else [loss], True)):
        waiting: list[Any] = [*starts]
        while waiting:
            node = waiting.pop()
            if node in seen or node._sequence_nr() <= oldest:  # noqa: SLF001 - no public way
                continue
            seen.add(node)
            for place, (taken, number) in enumerate(node.next_functions):
                if taken is None:
                    continue
                if (taken, number) in targets:
                    yield node, place, (taken, number), is_own
                waiting.append(taken)
