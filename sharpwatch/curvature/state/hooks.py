"""Hooks on modules: which are part of a model's computation, and which are the user's own and bypassed by probes."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
# Hooks from these modules are part of the computation: weight and spectral norm, pruning, sharding, adapters chosen by
# row. Without transformers' of tensor parallelism a q_norm was 7 % off without an error (docs/log.md); by those of
# output_capturing its mixtures of experts collect the router logits of their loss.
_COMPUTING_MODULES = (
    "torch.nn.",
    "torch.distributed.",
    "transformers.distributed.",
    "transformers.integrations.tensor_parallel",
    "transformers.utils.output_capturing",
    "peft.",
)
_WEIGHTS = ("weight", "bias")


@contextmanager
def hooks_disabled(place: object, names: Iterable[str]) -> Iterator[None]:
    """Empty the hook registries `names` of `place`, a torch module or an optimizer, during the body."""
    saved = {name: getattr(place, name) for name in names}
    try:
        for name in saved:
            setattr(place, name, OrderedDict())
        yield
    finally:
        for name, hooks in saved.items():
            setattr(place, name, hooks)


def hide_user_hooks(module: nn.Module) -> None:
    """Shadow a module's hook registries by ones without the user's hooks.

    Their handles keep working on the originals, which the caller puts back.
    """
    makes_weights = _pre_hooks_make_weights(module)
    for name in _HOOKS:
        hooks = vars(module)[name]
        if hooks and not (makes_weights and name == "_forward_pre_hooks"):
            vars(module)[name] = OrderedDict((key, hook) for key, hook in hooks.items() if is_computing(hook))


def hidden_pre_hooks(module: nn.Module) -> list[str]:
    """Names of the user's forward pre-hooks on `module` that `hide_user_hooks` hides."""
    if _pre_hooks_make_weights(module):
        return []
    return [getattr(hook, "__qualname__", type(hook).__qualname__) for hook in _user_pre_hooks(module)]


def _user_pre_hooks(module: nn.Module) -> list[Callable[..., object]]:
    hooks = vars(module)["_forward_pre_hooks"].values()
    return [hook for hook in hooks if not is_computing(hook) and not type(hook).__module__.startswith("sharpwatch.")]


def _pre_hooks_make_weights(module: nn.Module) -> bool:
    """Whether the user's pre-hooks of `module` set a weight as an attribute of it, as torch's weight norm does.

    The weight is told from what a module may keep there otherwise by its name, or by the shape of a parameter.
    """
    if not _user_pre_hooks(module):
        return False
    own = dict(module.named_parameters(recurse=False))
    shapes = {parameter.shape for parameter in own.values()}
    return any(
        isinstance(value, Tensor)
        and value.is_floating_point()
        and (value.shape in shapes or name in _WEIGHTS or any(each.startswith(name) for each in own))
        for name, value in vars(module).items()
    )


def is_computing(hook: Callable[..., object]) -> bool:
    """Whether a hook is part of the module's computation, rather than the user's."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    kinds = [kind for kind in type(hook).__mro__ if kind is not nn.Module]  # the hook may be a module of the user's
    modules = [getattr(hook, "__module__", None), *(kind.__module__ for kind in kinds)]
    return any(isinstance(module, str) and module.startswith(_COMPUTING_MODULES) for module in modules)
