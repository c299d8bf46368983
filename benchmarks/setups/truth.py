"""What a setup's curvature is, by autograd alone: the setup says what its loss and its outputs are.

Nothing here asks sharpwatch what the objective is. Only the division of parameters into blocks is its own.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharpwatch.blocks import BlockMap

_DRAWS = 4


@dataclass(frozen=True)
class Truth:
    """What is trained, as functions of the model and a batch.

    Attributes:
        loss: The mean loss of the batch; None where it is no function of one model's weights and the batch alone.
        outputs: Logits [N, V] of the N positions that predict, or the outputs of a squared error, of any shape; None
            where the loss is neither, and `gnb` must show nothing.
        kind: What the loss is of the outputs.
    """

    loss: Callable[[Any, Any], Tensor] | None
    outputs: Callable[[Any, Any], Tensor] | None = None
    kind: Literal["cross-entropy", "squared error"] = "cross-entropy"


@dataclass(frozen=True)
class Curvature:
    """The truth at one step.

    Attributes:
        traces: Trace of the Gauss-Newton matrix by block.
        descents: The gradient along the step taken, by block.
        curvature: The Hessian along the step taken.
    """

    traces: Mapping[str, float]
    descents: Mapping[str, float]
    curvature: float


def curvature(
    truth: Truth, model: nn.Module, block_map: BlockMap, before: Mapping[str, Tensor], batch: object
) -> Curvature:
    """Compute the truth of a step that took `model` from the weights `before` to those it has now."""
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(0)
        after, start = _copy(model), _copy(model)
        with torch.no_grad():
            for name, parameter in start.named_parameters():
                parameter.copy_(before[name])
        moved = {name: before[name] - parameter.detach() for name, parameter in after.named_parameters()}
        products, along = _along(truth, start, moved, batch)
        squares = _squares(truth, after, batch)
        return Curvature(_by_block(block_map, squares), _by_block(block_map, products), along)


def _copy(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model).eval()
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _along(
    truth: Truth, model: nn.Module, moved: Mapping[str, Tensor], batch: object
) -> tuple[dict[str, Tensor], float]:
    """Entries g·d by parameter, and d·Hd."""
    trained = _trained(model)
    gradients = torch.autograd.grad(
        truth.loss(model, batch), list(trained.values()), create_graph=True, allow_unused=True
    )
    pairs = {name: (g, moved[name]) for name, g in zip(trained, gradients, strict=True) if g is not None}
    slope = torch.stack([(g * d).sum() for g, d in pairs.values()]).sum()
    products = torch.autograd.grad(slope, list(trained.values()), allow_unused=True)
    along = sum(float((h * moved[name]).sum()) for name, h in zip(trained, products, strict=True) if h is not None)
    return {name: g.detach() * d for name, (g, d) in pairs.items()}, along


def _squares(truth: Truth, model: nn.Module, batch: object) -> dict[str, Tensor]:
    """The diagonal of the Gauss-Newton matrix by parameter, as a mean over draws."""
    if truth.outputs is None:
        return {}
    outputs, trained = truth.outputs(model, batch), _trained(model)
    squares: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for _ in range(_DRAWS):
        raw = torch.autograd.grad(
            outputs, list(trained.values()), _drawn(outputs.detach(), truth.kind), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(trained, raw, strict=True):
            if gradient is not None:
                squares[name] = squares[name] + gradient.float().square() / _DRAWS
    return squares


def _drawn(outputs: Tensor, kind: str) -> Tensor:
    """A random cotangent c of the outputs z with E[c cᵀ] the Hessian of the loss in z.

    For a mean cross-entropy over N rows it is (softmax(z) − onehot(y)) / √N with y drawn from softmax(z); for a mean
    squared error over M entries it is √(2 / M) times random signs.
    """
    if kind == "squared error":
        signs = torch.randint(2, outputs.shape).to(outputs) * 2 - 1
        return signs * (2 / outputs.numel()) ** 0.5
    shares = outputs.float().softmax(-1)
    labels = torch.multinomial(shares, 1)
    return (shares.scatter_add(1, labels, -torch.ones_like(labels, dtype=shares.dtype)) / len(outputs) ** 0.5).to(
        outputs
    )


def _by_block(block_map: BlockMap, entries: Mapping[str, Tensor]) -> dict[str, float]:
    """Sums of `entries` (by parameter, of its shape) over each block."""
    sums: defaultdict[str, float] = defaultdict(float)
    for part in block_map.parts:
        if part.parameter in entries:
            sums[part.type] += float(part.view(entries[part.parameter]).double().sum())
    return dict(sums)
