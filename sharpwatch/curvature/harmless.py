"""Extra forwards and backwards that leave no trace in the model or the process."""

from __future__ import annotations

import copy
import functools
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
# Their hooks are part of what the module computes: weight and spectral norm, pruning, sharding.
_KEPT = ("torch.nn.", "torch.distributed.")
_CONTAINERS = frozenset({list, dict, set, deque, OrderedDict, defaultdict, Counter})


class Functional:
    """Stands in for a model: computes the same from `leaves`, detached from the parameters, and copies of the buffers.

    What it computes never reaches the parameters' `.grad` or hooks, nor the buffers. `leaves` go by the names of
    `model.named_parameters()`; a frozen parameter's does not require a gradient. Other attributes are the model's own.
    A wrapper (DDP, a compiled module) is left out: only what it wraps runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.inner, prefix = _unwrapped(model)
        self.leaves = {
            name: parameter.detach().requires_grad_(parameter.requires_grad)
            for name, parameter in model.named_parameters()
        }
        self._tensors = {name.removeprefix(prefix): leaf for name, leaf in self.leaves.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        buffers = {name: buffer.clone() for name, buffer in self.inner.named_buffers()}
        return torch.func.functional_call(self.inner, {**buffers, **self._tensors}, args, kwargs, tie_weights=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def trainable(self) -> dict[str, Tensor]:
        """The leaves to differentiate by."""
        return {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}


@contextmanager
def undisturbed(model: nn.Module, *, double_backward: bool = False) -> Iterator[Functional]:
    """A context in which `model` is evaluated through the `Functional` it gives, and that leaves everything as it was.

    Inside: every module in evaluation mode, gradients enabled, autocast as around it but without its cache, the user's
    hooks (the modules' and torch's global ones) bypassed, compiled code run eagerly, and for a double backward the
    attention kernel that has one. Afterwards, also after an error, all of that is as before, as are the random
    states (torch's of the CPU and the model's accelerators, NumPy's, Python's, the modules' own generators), buffers,
    and whatever attributes the modules' code has set or changed in place: tensors, lists, dicts, sets. What is nested
    deeper, or belongs to other objects, is not put back.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_random_state_kept(model))
        stack.enter_context(_without_autocast_cache())
        stack.enter_context(_attributes_kept(model))
        stack.enter_context(_without_global_hooks())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to import it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if double_backward:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for module in model.modules():
            vars(module)["training"] = False
            for name in _HOOKS:
                _bypass(module, name)
        yield Functional(model)


@contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in {"cpu", "meta"}}
    kinds = {device.type for device in devices}
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002 - the user's model may draw from it
        own = [value for module in model.modules() for value in vars(module).values()]
        for generator in {value for value in own if isinstance(value, torch.Generator)}:
            stack.callback(generator.set_state, generator.get_state())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in kinds:
            numbers = [device.index for device in devices if device.type == kind and device.index is not None]
            stack.enter_context(torch.random.fork_rng(devices=numbers, device_type=kind))
        yield


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """The cache would hold casts of the leaves, and with them a probe's graph, until the training autocast ends."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Puts back every module's attributes, and what its lists, dicts and sets held; in between, tensors are copies."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    own = [value for attribute in attributes for value in attribute.values()]
    contents = [(value, copy.copy(value)) for value in own if type(value) in _CONTAINERS]
    copies: dict[int, Tensor] = {}
    try:
        for module, attribute in zip(modules, attributes, strict=True):
            for name, value in attribute.items():
                if isinstance(value, Tensor) and not value.requires_grad:
                    vars(module)[name] = copies.setdefault(id(value), value.clone())
        yield
    finally:
        for module, attribute in zip(modules, attributes, strict=True):
            _put_back(vars(module), attribute)
        for value, content in contents:
            _refill(value, content)


def _refill(current: Any, saved: Any) -> None:
    """Make the container `current` hold what its copy `saved` does."""
    if isinstance(current, dict):
        _put_back(current, saved)
    elif len(current) != len(saved) or any(one is not other for one, other in zip(current, saved, strict=True)):
        current.clear()
        (current.update if isinstance(current, set) else current.extend)(saved)


def _put_back(current: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Make `current` hold what `saved` does, in the same order; untouched where nothing changed."""
    if list(current) == list(saved) and all(current[name] is value for name, value in saved.items()):
        return
    current.clear()
    current.update(saved)


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    place = nn.modules.module
    saved = {name: getattr(place, name) for name in _GLOBAL_HOOKS}
    try:
        for name in _GLOBAL_HOOKS:
            setattr(place, name, OrderedDict())
        yield
    finally:
        for name, hooks in saved.items():
            setattr(place, name, hooks)


def _bypass(module: nn.Module, name: str) -> None:
    """Lay a registry without the user's hooks over a module's own; handles keep pointing at the latter."""
    hooks = vars(module)[name]
    if hooks:
        vars(module)[name] = OrderedDict((key, hook) for key, hook in hooks.items() if _is_torchs(hook))


def _is_torchs(hook: Callable[..., Any]) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    homes = [getattr(hook, "__module__", None), *(kind.__module__ for kind in type(hook).__mro__)]
    return any(isinstance(home, str) and home.startswith(_KEPT) for home in homes)


def _unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The module inside wrappers that change how it runs, not what it computes, and its prefix in parameter names."""
    prefix = ""
    while True:
        if isinstance(model, DistributedDataParallel):
            model, prefix = model.module, f"{prefix}module."
        elif "_orig_mod" in vars(model).get("_modules", {}):
            model, prefix = model.get_submodule("_orig_mod"), f"{prefix}_orig_mod."
        else:
            return model, prefix
