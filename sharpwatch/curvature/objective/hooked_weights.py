"""Refuses models whose weights are made by hooks that a probe bypasses: their gradients would come out as zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sharpwatch.curvature.objective.nested import tensors
from sharpwatch.curvature.state.hooks import hidden_pre_hooks
from sharpwatch.curvature.state.isolation import Functional, isolated
from sharpwatch.errors import ProbeError


def require_hooked_weights(model: nn.Module, call: Callable[[Functional], object]) -> None:
    """Run one forward if a module has forward pre-hooks of the user's, to see whether its parameters take part in it.

    Hooks that are seen to set a weight as an attribute of their module are not bypassed (`state.hooks`).

    Args:
        model: The model.
        call: Calls the stand-in for the model, and returns the output.

    Raises:
        ProbeError: A module was called whose parameters the output does not depend on; the message names its hooks.
    """
    hooks = {name: hidden for name, module in model.named_modules() if (hidden := hidden_pre_hooks(module))}
    if not hooks:
        return
    called = set[str]()
    with isolated(model) as live:
        for name in hooks:
            # Into the registry that isolation has put in place, and takes away again.
            model.get_submodule(name).register_forward_pre_hook(partial(_note, called, name))
        output = [each for each in tensors(call(live)) if each.requires_grad]
        for name in sorted(called):
            missing = _unreached(model.get_submodule(name), output)
            if missing:
                raise ProbeError(
                    f"the model's output does not depend on {name}.{missing} without the forward pre-hook "
                    f"{', '.join(hooks[name])} of that module, which probes bypass: compute its weight in its forward, "
                    "or by torch.nn.utils.parametrize"
                )


def _note(called: set[str], name: str, *_: object) -> None:
    called.add(name)


def _unreached(module: nn.Module, output: Sequence[Tensor]) -> str:
    """The first trainable parameter of `module` itself that `output` does not depend on; empty if there is none."""
    leaves = {name: leaf for name, leaf in module.named_parameters(recurse=False) if leaf.requires_grad}
    if not leaves or not output:
        return next(iter(leaves), "")
    ones = [torch.ones_like(each) for each in output]
    raw = torch.autograd.grad(output, list(leaves.values()), ones, retain_graph=True, allow_unused=True)
    return next((name for name, gradient in zip(leaves, raw, strict=True) if gradient is None), "")
