"""Sharpness along the step that an optimizer has taken, or will take next.

For the step d = θ_t − θ_{t+1}, with g and H at θ_{t+1}: to second order, g(θ_t)ᵀd = gᵀd + dᵀHd. The same holds for each
block with its rows of H. The curvature of block b alone, d_bᵀH_bb d_b, takes a product of its own.

Critical sharpness (Kalra et al., arXiv 2601.16979) is λ_c = 1/c, where c is the smallest scale with L(θ − c·d) > L(θ).
It takes forwards only, so any kernel works. Implemented from the definition.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.objective.batch import Batch, LossFn
from sharpwatch.curvature.objective.hessian import Method, open_hessian
from sharpwatch.curvature.objective.objective import Objective
from sharpwatch.curvature.parameters.parameter_space import ParameterSpace
from sharpwatch.curvature.parameters.shards import sum_by_index
from sharpwatch.curvature.state.hooks import hooks_disabled
from sharpwatch.curvature.state.isolation import isolated
from sharpwatch.errors import ProbeError

_DOUBLINGS = 12  # the search covers 2^-12 to 2^12 times the step
_BISECTIONS = 4  # reduce a bracket of a factor 2 to one sixteenth
# Global hooks on optimizers, which must not run for the step of a copy.
_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


@dataclass(frozen=True, slots=True, eq=False)
class DirectionSample:
    """The result of one probe, on the CPU.

    Attributes:
        tokens: Number of predicting positions.
        rows: Number of rows.
        descent: g(θ_t)ᵀd.
        curvature: dᵀHd.
        block_descent: Float64 [B], g_b(θ_t)ᵀd_b.
        block_curvature: Float64 [B], d_bᵀH_bb d_b; NaN for a block that was not requested.
        method: How the products were computed.
        curvature_parts: Float64 [L], d_lᵀ(Hd)_l by layer block: its part of the curvature, with half of what it shares
            with each other layer block. The parts add up to the curvature.
    """

    tokens: int
    rows: int
    descent: float
    curvature: float
    block_descent: Tensor
    block_curvature: Tensor
    method: str
    curvature_parts: Tensor


def direction_probe(  # noqa: PLR0913 - settings are keyword-only
    model: nn.Module,
    block_map: BlockMap,
    batch: Batch,
    displacement: Mapping[str, Tensor],
    *,
    blocks: Sequence[str],
    loss_fn: LossFn | None = None,
    method: Method = "auto",
) -> DirectionSample:
    """Measure the curvature along `displacement` at the present weights.

    It takes one Hessian-vector product for the whole model and one for each of `blocks`, and leaves `model`
    unchanged.

    Args:
        model: The model.
        block_map: The division of its parameters into blocks.
        batch: The arguments of the model.
        displacement: θ_t − θ_{t+1} by parameter name; a missing parameter has not moved.
        blocks: Block types whose own curvature is measured.
        loss_fn: Computes the loss; None to use the model's own.
        method: How derivatives are computed, see `open_hessian`.

    Returns:
        The curvature and the descent.

    Raises:
        ProbeError: There is no loss, every label is ignored, or the derivatives cannot be computed.
    """
    with open_hessian(model, block_map, [batch], loss_fn=loss_fn, method=method) as hessian:
        whole = ParameterSpace(block_map, None, hessian.objective.live.leaves)
        step = whole.flatten(displacement).to(whole.device, whole.dtype)
        parts = whole.sum_by_layer(step * hessian.products(whole, step[None]))[0]
        types = [block_map.blocks.index(each.type) for each in block_map.layer_blocks]
        curvature = sum_by_index(parts, types, len(block_map.blocks))
        descent = whole.sum_by_block(step * whole.flatten(hessian.gradient(0)))
        block_curvature = torch.full((len(block_map.blocks),), torch.nan, dtype=torch.float64, device="cpu")
        for block in blocks:
            space = ParameterSpace(block_map, block, hessian.objective.live.leaves)
            block_step = space.flatten(displacement).to(step)
            image = hessian.products(space, block_step[None])[0]
            # Summed in float64: the terms have both signs, and cancel.
            block_curvature[block_map.blocks.index(block)] = (block_step.double() * image.double()).sum().cpu()
        tokens, method_used = hessian.objective.tokens[0], hessian.method
    # g(θ_t) by the expansion above: a gradient at the old weights would take another backward.
    at_start = descent + curvature
    return DirectionSample(
        tokens,
        batch.rows,
        float(at_start.sum()),
        float(curvature.sum()),
        at_start,
        block_curvature,
        method_used,
        parts,
    )


@dataclass(frozen=True, slots=True)
class CriticalSharpness:
    """1/c with half the width of its bracket; a step that raises the loss has more than 1.

    Attributes:
        value: 1/c. 0 if no scale within the search range raises the loss; NaN if the loss is not finite.
        half_width: Half the width of the bracket of 1/c; infinite if even the smallest scale raises the loss, as for an
            ascent direction.
        forwards: Number of loss evaluations.
    """

    value: float
    half_width: float
    forwards: int


@dataclass(frozen=True, slots=True, eq=False)
class LineSearchSample:
    """The result of one probe.

    Attributes:
        tokens: Number of predicting positions.
        rows: Number of rows.
        sharpness: Critical sharpness of the whole step.
        half_width: Half the width of its bracket.
        block_sharpness: Float64 [B], of each block's part of the step; NaN for a block that was not requested.
        block_half_width: Float64 [B], likewise.
    """

    tokens: int
    rows: int
    sharpness: float
    half_width: float
    block_sharpness: Tensor
    block_half_width: Tensor


def linesearch_probe(  # noqa: PLR0913 - settings are keyword-only
    model: nn.Module,
    block_map: BlockMap,
    batch: Batch,
    displacement: Mapping[str, Tensor],
    *,
    blocks: Sequence[str],
    loss_fn: LossFn | None = None,
) -> LineSearchSample:
    """Measure the critical sharpness of the step just taken, from the weights θ_t before it.

    It leaves `model` unchanged.

    Args:
        model: The model, at θ_{t+1}.
        block_map: The division of its parameters into blocks.
        batch: The arguments of the model.
        displacement: θ_t − θ_{t+1} by parameter name; a missing parameter has not moved.
        blocks: Block types that are also measured alone, with the others held at θ_t.
        loss_fn: Computes the loss; None to use the model's own.

    Returns:
        The critical sharpness of the step and of each block.

    Raises:
        ProbeError: There is no loss.
        EmptyBatchError: Every label is ignored.
    """
    values, widths = (
        torch.full((len(block_map.blocks),), torch.nan, dtype=torch.float64, device="cpu") for _ in range(2)
    )
    # In float32: in half precision the loss takes the same value at neighbouring scales, and never seems to rise.
    with isolated(model, exact=True) as live:
        objective = Objective(live, [batch], loss_fn)
        whole = ParameterSpace(block_map, None, live.leaves)
        displacement_vector = whole.flatten(
            {name: step.to(whole.device, torch.float32) for name, step in displacement.items()}
        )
        whole_step = critical_sharpness_along(objective, whole, displacement_vector, origin=displacement_vector)
        for block in blocks:
            index = block_map.blocks.index(block)
            block_step = critical_sharpness_along(
                objective, whole, displacement_vector * whole.mask(block), origin=displacement_vector
            )
            values[index], widths[index] = block_step.value, block_step.half_width
        return LineSearchSample(
            objective.tokens[0], batch.rows, whole_step.value, whole_step.half_width, values, widths
        )


def critical_sharpness_along(
    objective: Objective, space: ParameterSpace, step: Tensor, origin: Tensor | None = None
) -> CriticalSharpness:
    """Measure the critical sharpness of `step`.

    Args:
        objective: The loss.
        space: The parameters that the step moves.
        step: The descent step d, [space.size].
        origin: Displacement of the starting point from the present weights, [space.size]; None to start there.

    Returns:
        The critical sharpness.
    """

    def loss(scale: float) -> float:
        offset = -scale * step if origin is None else origin - scale * step
        with objective.displaced(space, offset):
            values = [share * objective.value(index) for index, share in enumerate(objective.shares)]
        return sum(values)

    return critical_sharpness(loss)


def critical_sharpness(loss: Callable[[float], float]) -> CriticalSharpness:
    """Search the critical sharpness of a loss along a line.

    The scale is doubled or halved from 1 until the loss passes its start value, then the bracket is bisected to 1/16.

    Args:
        loss: The loss as a function of the step's scale.

    Returns:
        The critical sharpness.
    """
    start = loss(0.0)
    forwards = 1
    if not math.isfinite(start):
        return CriticalSharpness(math.nan, math.nan, forwards)

    def rises(scale: float) -> bool:
        nonlocal forwards
        forwards += 1
        return not loss(scale) <= start  # NaN counts as a rise

    high = 1.0
    # The loss at the step itself says on which side of it the answer lies.
    factor = 0.5 if rises(high) else 2.0
    for _ in range(_DOUBLINGS):
        high *= factor
        if rises(high) == (factor > 1):
            break
    else:
        # No scale raises the loss, or the smallest does.
        return CriticalSharpness(0.0 if factor > 1 else 1 / high, 1 / high if factor > 1 else math.inf, forwards)
    low, high = (high, 2 * high) if factor < 1 else (high / 2, high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if rises(middle) else (middle, high)
    # The middle in 1/c, not in c: the half width must bound the value's own error.
    return CriticalSharpness((1 / low + 1 / high) / 2, (1 / low - 1 / high) / 2, forwards)


def next_step(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Compute the step −Δθ that `gradients` lead to, on copies of the optimizers and the weights.

    Learning rates, weight decay and momentum are included.

    Args:
        model: The model.
        optimizers: Its optimizers.
        gradients: Gradients by parameter name.

    Returns:
        −Δθ by parameter name.

    Raises:
        ProbeError: An optimizer cannot step with gradients alone, for example because it needs a closure.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    step: dict[str, Tensor] = {}
    for optimizer in optimizers:
        # Copies its parameters too, and keeps the state by the copies; schedules and momenta stay as they are.
        copied_optimizer = copy.deepcopy(optimizer)
        pairs = [
            (names[id(old)], old, new)
            for group, copied_group in zip(optimizer.param_groups, copied_optimizer.param_groups, strict=True)
            for old, new in zip(group["params"], copied_group["params"], strict=True)
            if id(old) in names
        ]
        for name, _, new in pairs:
            # A clone, since a step may write into its gradients.
            new.grad = gradients[name].to(new).clone() if name in gradients else None
        try:
            with hooks_disabled(sys.modules[torch.optim.Optimizer.__module__], _GLOBAL_HOOKS):
                copied_optimizer.step()
        except (TypeError, RuntimeError) as error:
            raise ProbeError(f"{type(optimizer).__name__} cannot step with gradients alone: {error}") from error
        step |= {name: old.detach() - new.detach() for name, old, new in pairs}
    return step
