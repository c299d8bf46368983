"""Extra forwards and backwards that leave no trace in the model or the process."""

from __future__ import annotations

import functools
import itertools
import random
import sys
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes

from sharpwatch.curvature.state.snapshot import StateSnapshot, refill

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GENERATORS: Mapping[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "random": (random.getstate, random.setstate),
    "numpy": (np.random.get_state, np.random.set_state),
    "torch": (torch.get_rng_state, torch.set_rng_state),
}
_UNUSED_GENERATORS: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()  # generators, by model
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
# Their hooks are part of what the module computes: weight and spectral norm, pruning, sharding.
_TORCH_MODULES = (
    "torch.nn.",
    "torch.distributed.",
    "transformers.distributed.",
    "transformers.integrations.tensor_parallel",
)


class Functional:
    """Stands in for a model, whose modules it makes compute from `leaves` and from copies of the buffers.

    Only to be made where `isolated` puts the modules back. What is computed never reaches the parameters' `.grad`
    or hooks, nor the buffers, also where a checkpointed part is computed again in the backward. `leaves` go by the
    names of `model.named_parameters()`; a frozen parameter's does not require a gradient. Other attributes are the
    model's own. A wrapper (DDP, a compiled module) is left out: only what it wraps runs. `exact`: tensors of half
    precision are raised to float32.
    """

    def __init__(self, model: nn.Module, *, exact: bool = False) -> None:
        self.inner = unwrap(model)
        self.exact = exact
        self.leaves = {
            name: self._raised(parameter.detach()).requires_grad_(parameter.requires_grad)
            for name, parameter in model.named_parameters()
        }
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._slots: dict[str, list[tuple[dict[str, Any], str]]] = defaultdict(list)
        self._buffers: list[tuple[dict[str, Any], str, Tensor]] = []
        for module in self.inner.modules():
            self._install_registries(module, names)
        for name, leaf in self.leaves.items():
            self.set_parameter(name, leaf)

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

    def set_parameter(self, name: str, tensor: Tensor) -> None:
        """Compute with `tensor` for the parameter `name` from now on, everywhere it is used."""
        for registry, key in self._slots[name]:
            registry[key] = tensor

    def _install_registries(self, module: nn.Module, names: Mapping[int, str]) -> None:
        parameters, buffers = dict(vars(module)["_parameters"]), dict(vars(module)["_buffers"])
        for key, parameter in parameters.items():
            if parameter is not None:
                self._slots[names[id(parameter)]].append((parameters, key))
        self._buffers += [(buffers, key, buffer) for key, buffer in buffers.items() if buffer is not None]
        vars(module)["_parameters"], vars(module)["_buffers"] = parameters, buffers

    def _raised(self, tensor: Tensor) -> Tensor:
        return upcast(tensor) if self.exact else tensor


def upcast(tensor: Tensor) -> Tensor:
    """`tensor` in float32 where it is of half precision."""
    return tensor.float() if tensor.dtype in {torch.bfloat16, torch.float16} else tensor


@contextmanager
def isolated(model: nn.Module, *, exact: bool = False) -> Iterator[Functional]:
    """A context in which `model` is evaluated through the `Functional` it gives, and that leaves everything as it was.

    Inside as `restore` has it; where it is to be `exact`, with weights, buffers and products of matrices in float32 at
    least, without autocast.
    """
    with restore(model), _full_precision(model) if exact else nullcontext():
        yield Functional(model, exact=exact)


@contextmanager
def restore(model: nn.Module) -> Iterator[None]:
    """A context for extra forwards through `model`'s modules, after which everything but `.grad` is as it was.

    Inside: every module in evaluation mode, gradients enabled, autocast as around it but without its cache, the user's
    hooks (the modules', torch's global ones, those of saved tensors) and dispatch modes bypassed, compiled code run
    eagerly, and reentrant checkpoints kept in memory. Afterwards, also after an error, all of that is as before, as are
    the random states (torch's of the CPU and the model's accelerators, NumPy's, Python's) and whatever attributes the
    modules' code has set, with all that a `StateSnapshot` of them holds. Buffers are not put back.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_rng_state_restored(model))
        stack.enter_context(_without_autocast_cache())
        stack.enter_context(_without_modes())
        stack.enter_context(_attributes_restored(model))
        stack.enter_context(hooks_disabled(nn.modules.module, _GLOBAL_HOOKS))
        stack.enter_context(_without_reentrant_checkpoints())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to import it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            vars(module)["training"] = False
            for name in _HOOKS:
                _hide_user_hooks(module, name)
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


class _DirectCheckpoint:
    """In place of a reentrant checkpoint, whose backward knows no `torch.autograd.grad`: all is kept in memory."""

    @staticmethod
    def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def _without_reentrant_checkpoints() -> Iterator[None]:
    place = torch.utils.checkpoint
    saved = place.CheckpointFunction
    place.CheckpointFunction = _DirectCheckpoint  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        place.CheckpointFunction = saved  # type: ignore[misc]


@contextmanager
def _rng_state_restored(model: nn.Module) -> Iterator[None]:
    """Puts back what was drawn inside from the process's own generators of random numbers and the accelerators'.

    Other threads draw from the former too, one that prepares batches, say, and must not find their draws undone. While
    there are any, a generator that `model` has once left alone is taken to be theirs.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in {"cpu", "meta"}}
    unused = _UNUSED_GENERATORS.setdefault(model, set())
    before = {name: read() for name, (read, _) in _GENERATORS.items()}
    with ExitStack() as stack:
        for device in devices:
            backend = torch.get_device_module(device)
            stack.callback(backend.set_rng_state, backend.get_rng_state(device), device)
        try:
            yield
        finally:
            for name, (read, write) in _GENERATORS.items():
                if _equal_states(read(), before[name]):
                    unused.add(name)
                elif name not in unused or len(sys._current_frames()) == 1:  # noqa: SLF001 - as `threading.active_count`
                    write(before[name])


def _equal_states(one: Any, other: Any) -> bool:
    """Whether two states of a generator are equal: a tensor, or a tuple with an array in it."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@contextmanager
def _without_modes() -> Iterator[None]:
    """Without the user's dispatch modes, which count or record, and hooks of saved tensors, which move them."""
    with ExitStack() as stack:
        if torch._C._len_torch_dispatch_stack():  # noqa: SLF001 - there is no public way
            stack.enter_context(_disable_current_modes())
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:  # noqa: SLF001 - as above
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_identity, _identity))
        yield


def _identity(tensor: Tensor) -> Tensor:
    return tensor


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
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """Puts back every module's attributes and what they hold; in between, tensors are copies."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    record = StateSnapshot(excluded=[*modules, *model.parameters(), *model.buffers()])
    copies: dict[int, Tensor] = {}
    for value in itertools.chain.from_iterable(attribute.values() for attribute in attributes):
        if not isinstance(value, Tensor):
            record.add(value)
    try:
        for module, attribute in zip(modules, attributes, strict=True):
            for name, value in attribute.items():
                if isinstance(value, Tensor) and not value.requires_grad:
                    vars(module)[name] = copies.setdefault(id(value), value.clone())
        yield
    finally:
        for module, attribute in zip(modules, attributes, strict=True):
            refill(vars(module), attribute)
        record.restore()


@contextmanager
def hooks_disabled(place: object, names: Iterable[str]) -> Iterator[None]:
    """Empty registries of hooks in `place`, a module of torch's or an optimizer, by name, for as long."""
    saved = {name: getattr(place, name) for name in names}
    try:
        for name in saved:
            setattr(place, name, OrderedDict())
        yield
    finally:
        for name, hooks in saved.items():
            setattr(place, name, hooks)


def _hide_user_hooks(module: nn.Module, name: str) -> None:
    """Lay a registry without the user's hooks over a module's own; handles keep pointing at the latter."""
    hooks = vars(module)[name]
    if hooks:
        vars(module)[name] = OrderedDict((key, hook) for key, hook in hooks.items() if is_torch_hook(hook))


def is_torch_hook(hook: Callable[..., Any]) -> bool:
    """Whether a hook is part of what the module computes, rather than the user's."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    kinds = [kind for kind in type(hook).__mro__ if kind is not nn.Module]  # a user's module may be a hook
    homes = [getattr(hook, "__module__", None), *(kind.__module__ for kind in kinds)]
    return any(isinstance(home, str) and home.startswith(_TORCH_MODULES) for home in homes)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside wrappers that change how it runs, not what it computes."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in vars(model).get("_modules", {}):
            model = model.get_submodule("_orig_mod")
        else:
            return model
