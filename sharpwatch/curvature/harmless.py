"""Extra forwards and backwards that leave no trace in the model or the process."""

from __future__ import annotations

import functools
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
# Their hooks are part of what the module computes: weight and spectral norm, pruning, sharding.
_KEPT = ("torch.nn.", "torch.distributed.", "transformers.distributed.", "transformers.integrations.tensor_parallel")
_CONTAINERS = frozenset({list, dict, set, deque, OrderedDict, defaultdict, Counter})


class Functional:
    """Stands in for a model, whose modules it makes compute from `leaves` and from copies of the buffers.

    Only to be made where `undisturbed` puts the modules back. What is computed never reaches the parameters' `.grad`
    or hooks, nor the buffers, also where a checkpointed part is computed again in the backward. `leaves` go by the
    names of `model.named_parameters()`; a frozen parameter's does not require a gradient. Other attributes are the
    model's own. A wrapper (DDP, a compiled module) is left out: only what it wraps runs. `exact`: tensors of half
    precision are raised to float32.
    """

    def __init__(self, model: nn.Module, *, exact: bool = False) -> None:
        self.inner = unwrapped(model)
        self.exact = exact
        self.leaves = {
            name: self._raised(parameter.detach()).requires_grad_(parameter.requires_grad)
            for name, parameter in model.named_parameters()
        }
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._slots: dict[str, list[tuple[dict[str, Any], str]]] = defaultdict(list)
        self._buffers: list[tuple[dict[str, Any], str, Tensor]] = []
        for module in self.inner.modules():
            self._lay(module, names)
        for name, leaf in self.leaves.items():
            self.place(name, leaf)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        for registry, key, buffer in self._buffers:  # afresh: what one forward left there must not reach the next
            registry[key] = self._raised(buffer).clone()
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def trainable(self) -> dict[str, Tensor]:
        """The leaves to differentiate by."""
        return {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}

    def place(self, name: str, tensor: Tensor) -> None:
        """Compute with `tensor` for the parameter `name` from now on, everywhere it is used."""
        for registry, key in self._slots[name]:
            registry[key] = tensor

    def _lay(self, module: nn.Module, names: Mapping[int, str]) -> None:
        parameters, buffers = dict(vars(module)["_parameters"]), dict(vars(module)["_buffers"])
        for key, parameter in parameters.items():
            if parameter is not None:
                self._slots[names[id(parameter)]].append((parameters, key))
        self._buffers += [(buffers, key, buffer) for key, buffer in buffers.items() if buffer is not None]
        vars(module)["_parameters"], vars(module)["_buffers"] = parameters, buffers

    def _raised(self, tensor: Tensor) -> Tensor:
        return raised(tensor) if self.exact else tensor


def raised(tensor: Tensor) -> Tensor:
    """`tensor` in float32 where it is of half precision."""
    return tensor.float() if tensor.dtype in {torch.bfloat16, torch.float16} else tensor


@contextmanager
def undisturbed(model: nn.Module, *, exact: bool = False) -> Iterator[Functional]:
    """A context in which `model` is evaluated through the `Functional` it gives, and that leaves everything as it was.

    Inside as `put_back` has it; where it is to be `exact`, with weights, buffers and products of matrices in float32 at
    least, without autocast.
    """
    with put_back(model), _full_precision(model) if exact else nullcontext():
        yield Functional(model, exact=exact)


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """A context for extra forwards through `model`'s modules, after which everything but `.grad` is as it was.

    Inside: every module in evaluation mode, gradients enabled, autocast as around it but without its cache, the user's
    hooks (the modules' and torch's global ones) bypassed, compiled code run eagerly, and reentrant checkpoints kept in
    memory. Afterwards, also after an error, all of that is as
    before, as are the random states (torch's of the CPU and the model's accelerators, NumPy's, Python's, the modules'
    own generators) and whatever attributes the modules' code has set or changed in place: tensors, lists,
    dicts, sets. What is nested deeper, as buffers are, or belongs to other objects, is not put back.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_random_state_kept(model))
        stack.enter_context(_without_autocast_cache())
        stack.enter_context(_attributes_kept(model))
        stack.enter_context(hooks_aside(nn.modules.module, _GLOBAL_HOOKS))
        stack.enter_context(_without_reentrant_checkpoints())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to import it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            vars(module)["training"] = False
            for name in _HOOKS:
                _bypass(module, name)
        yield


@contextmanager
def _full_precision(model: nn.Module) -> Iterator[None]:
    kinds = {"cpu", *(parameter.device.type for parameter in model.parameters() if parameter.device.type != "meta")}
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        for place, name, exact in _precisions():
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, exact)
        yield


def _precisions() -> list[tuple[Any, str, Any]]:
    """Where torch lets float32 be rounded to fewer bits, and what forbids it.

    From 2.9 on `fp32_precision`; to read what came before it raises where a user has set the new one.
    """
    backends = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        found = [getattr(getattr(backends, kind), of, None) for kind in ("cudnn", "mkldnn") for of in ("conv", "rnn")]
        found += [backends.cuda.matmul, getattr(backends.mkldnn, "matmul", None)]
        return [(place, "fp32_precision", "ieee") for place in found if hasattr(place, "fp32_precision")]
    return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]


class _Kept:
    """In place of a reentrant checkpoint, whose backward knows no `torch.autograd.grad`: all is kept in memory."""

    @staticmethod
    def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def _without_reentrant_checkpoints() -> Iterator[None]:
    place = torch.utils.checkpoint
    saved = place.CheckpointFunction
    place.CheckpointFunction = _Kept  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        place.CheckpointFunction = saved  # type: ignore[misc]


@contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in {"cpu", "meta"}}
    kinds = {device.type for device in devices}
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002 - the user's model may draw from it
        own = [value for module in model.modules() for value in vars(module).values()]
        for generator in {
            value for value in own if type(value) is torch.Generator
        }:  # isinstance takes a millisecond here
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
    contents = [(value, value.copy() if value else ()) for value in own if type(value) in _CONTAINERS]
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
    """Make the container `current` hold what its copy `saved` does; () stands for an empty one."""
    if not saved:
        current.clear()
    elif isinstance(current, dict):
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
def hooks_aside(place: object, names: Iterable[str]) -> Iterator[None]:
    """Empty registries of hooks in `place`, a module of torch's or an optimizer, by name, for as long."""
    saved = {name: getattr(place, name) for name in names}
    try:
        for name in saved:
            setattr(place, name, OrderedDict())
        yield
    finally:
        for name, hooks in saved.items():
            setattr(place, name, hooks)


def _bypass(module: nn.Module, name: str) -> None:
    """Lay a registry without the user's hooks over a module's own; handles keep pointing at the latter."""
    hooks = vars(module)[name]
    if hooks:
        vars(module)[name] = OrderedDict((key, hook) for key, hook in hooks.items() if is_torchs(hook))


def is_torchs(hook: Callable[..., Any]) -> bool:
    """Whether a hook is part of what the module computes, rather than the user's."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    homes = [getattr(hook, "__module__", None), *(kind.__module__ for kind in type(hook).__mro__)]
    return any(isinstance(home, str) and home.startswith(_KEPT) for home in homes)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers that change how it runs, not what it computes."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in vars(model).get("_modules", {}):
            model = model.get_submodule("_orig_mod")
        else:
            return model
