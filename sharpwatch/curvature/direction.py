"""Curvature along the step that the optimizer has just taken, by exact Hessian-vector products.

With d = θ_t − θ_{t+1}, and g and H at θ_{t+1}: g(θ_t)ᵀd = gᵀd + dᵀHd to second order, for each block alone with H's
row of it. Block b's own curvature d_bᵀH_bb d_b takes a product of its own. Pearlmutter, "Fast exact multiplication by
the Hessian" (1994).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.batch import Batch
from sharpwatch.curvature.harmless import undisturbed
from sharpwatch.curvature.inner import products, sum_into
from sharpwatch.curvature.outputs import LossFn, tokens_of, true_loss
from sharpwatch.curvature.twice import require_twice_differentiable
from sharpwatch.errors import ProbeError

_NO_SECOND_DERIVATIVE = ("not implemented", "differentiate twice", "double backward", "no autograd formula")


@dataclass(frozen=True, slots=True, eq=False)
class DirectionSample:
    """One probe, on the CPU; `tokens` positions predict.

    `descent` is g(θ_t)ᵀd, `curvature` dᵀHd. `block_descent` float64 [B] are g_b(θ_t)ᵀd_b; `block_curvature` float64
    [B] are d_bᵀH_bb d_b, NaN for a block that was not asked for.
    """

    tokens: int
    rows: int
    descent: float
    curvature: float
    block_descent: Tensor
    block_curvature: Tensor


def direction_probe(  # noqa: PLR0913 - what a probe is of, and how it is taken; each named
    model: nn.Module,
    block_map: BlockMap,
    batch: Batch,
    displacement: Mapping[str, Tensor],
    *,
    blocks: Sequence[str],
    loss_fn: LossFn | None = None,
) -> DirectionSample:
    """Curvature along `displacement` (θ_t − θ_{t+1}, by parameter name) at the present weights.

    One product for the whole, and one for each of `blocks`; leaves no trace in `model`. A parameter that `displacement`
    lacks has not moved. Raises `ProbeError` where there is no loss, no position predicts, or the model can't be
    differentiated twice.
    """
    with undisturbed(model, double_backward=True) as live:
        batch = batch.usable()
        loss = true_loss(live, live.inner, batch, loss_fn)
        tokens = tokens_of(live.inner, batch)
        require_twice_differentiable(loss)
        field = _Field(loss, live.trainable, displacement)
        whole = field.product(field.step, list(field.leaves), last=not blocks)
        size = len(block_map.blocks)
        descent = sum_into(products(block_map, field.gradients, field.step), block_map.block_of, size)
        along = sum_into(products(block_map, whole, field.step), block_map.block_of, size)
        del whole
        own = torch.full((size,), torch.nan, dtype=torch.float64)
        for count, block in enumerate(blocks, start=1):
            index = block_map.blocks.index(block)
            part = _only(block_map, field.step, block)
            own[index] = products(block_map, field.product(part, list(part), last=count == len(blocks)), part).sum()
    at_start = descent + along
    return DirectionSample(tokens, batch.rows, float(at_start.sum()), float(along.sum()), at_start, own)


class _Field:
    """The gradient of a loss as a function of the weights, and its products with directions."""

    def __init__(self, loss: Tensor, leaves: Mapping[str, Tensor], displacement: Mapping[str, Tensor]) -> None:
        with _second_derivatives():
            found = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
        self._graph = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
        self.leaves = {name: leaves[name] for name in self._graph}
        self.gradients = {name: g.detach() for name, g in self._graph.items()}
        self.step = {
            name: displacement[name].detach().to(g) for name, g in self.gradients.items() if name in displacement
        }

    def product(self, direction: Mapping[str, Tensor], names: Sequence[str], *, last: bool) -> dict[str, Tensor]:
        """H·`direction`, the entries of parameters `names`; a parameter it does not reach is left out."""
        moving = [name for name in direction if self._graph[name].requires_grad]
        if not moving:
            return {}
        with _second_derivatives():
            found = torch.autograd.grad(
                [self._graph[name] for name in moving],
                [self.leaves[name] for name in names],
                [direction[name] for name in moving],
                retain_graph=not last,
                allow_unused=True,
            )
        return {name: h for name, h in zip(names, found, strict=True) if h is not None}


class _second_derivatives:  # noqa: N801 - reads as the context it is
    """Turns torch's complaint about a missing second derivative into a `ProbeError`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_SECOND_DERIVATIVE):
            raise ProbeError(f"the model can't be differentiated twice: {error}") from error


def _only(block_map: BlockMap, tensors: Mapping[str, Tensor], block: str) -> dict[str, Tensor]:
    """`tensors` that hold parts of `block`, with zeros where a fused parameter has others."""
    parts: dict[str, Tensor] = {}
    for part in block_map.parts:
        if part.type != block or part.parameter not in tensors:
            continue
        whole = tensors[part.parameter]
        if part.dim is None:
            parts[part.parameter] = whole
        else:
            masked = parts.setdefault(part.parameter, torch.zeros_like(whole))
            part.view(masked).copy_(part.view(whole))
    return parts
