"""The next step of an optimizer and Adam's preconditioner, computed without taking a step."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sharpwatch.curvature.state.isolation import hooks_disabled
from sharpwatch.errors import ProbeError

# Global hooks on optimizers, which must not run for the step of a copy.
_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


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
        copied_optimizer = copy.deepcopy(optimizer)
        pairs = [
            (names[id(old)], old, new)
            for group, copied_group in zip(optimizer.param_groups, copied_optimizer.param_groups, strict=True)
            for old, new in zip(group["params"], copied_group["params"], strict=True)
            if id(old) in names
        ]
        for name, _, new in pairs:
            new.grad = gradients[name].to(new).clone() if name in gradients else None
        try:
            with hooks_disabled(sys.modules[torch.optim.Optimizer.__module__], _GLOBAL_HOOKS):
                copied_optimizer.step()
        except (TypeError, RuntimeError) as error:
            raise ProbeError(f"{type(optimizer).__name__} cannot step with gradients alone: {error}") from error
        step |= {name: old.detach() - new.detach() for name, old, new in pairs}
    return step


def preconditioner(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Compute the diagonal D = (η(1 − β₁) / ((2 + 2β₁)(√v̂ + ε)))^½ of Adam and its variants.

    λ_max(DHD) is 1 at the edge of stability (Cohen et al., "Adaptive gradient methods at the edge of stability", arXiv
    2207.14484, equation 3).

    Args:
        model: The model.
        optimizers: Its optimizers.

    Returns:
        Entries of D by parameter name, each of the parameter's shape; zero for a parameter that never had a gradient.

    Raises:
        ProbeError: An optimizer has no second moment, or has not stepped yet.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: _preconditioner_diagonal(optimizer, group, parameter, names[id(parameter)])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in names and parameter.requires_grad
    }


def require_adam(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Check that every optimizer is a variant of Adam: its groups have `lr`, `betas` and `eps`.

    Raises:
        ProbeError: One is not.
    """
    for optimizer in optimizers:
        if not all({"betas", "eps", "lr"} <= set(group) for group in optimizer.param_groups):
            raise ProbeError(
                f"preconditioned needs Adam or a variant with betas and eps, got {type(optimizer).__name__}; "
                "direction and linesearch work with any optimizer"
            )


def _preconditioner_diagonal(
    optimizer: torch.optim.Optimizer, group: Mapping[str, object], parameter: Tensor, name: str
) -> Tensor:
    require_adam([optimizer])
    state = optimizer.state.get(parameter, {})
    moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if moment is None and optimizer.state:  # the parameter never had a gradient, so Adam does not move it
        return torch.zeros_like(parameter, dtype=torch.float32)
    if not isinstance(moment, Tensor) or moment.shape != parameter.shape:
        raise ProbeError(f"{type(optimizer).__name__} has no second moment of {name} yet: take an optimizer step first")
    (first, second), epsilon, rate = cast("Any", (group["betas"], group["eps"], group["lr"]))
    correction = 1 - float(second) ** float(state.get("step", torch.inf))
    root: Tensor = (moment.float() / correction).sqrt().add_(float(epsilon))
    return root.reciprocal_().mul_(float(rate) * (1 - float(first)) / (2 + 2 * float(first))).sqrt_()
