"""Isolation: forwards and backwards that leave the model and the process unchanged.

Random states are restored by `common.rng_state`, what the model's own code keeps in its attributes by `snapshot`.
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes

from sharpwatch.common.rng_state import rng_state_restored
from sharpwatch.curvature.state.float32 import float32_exact
from sharpwatch.curvature.state.hooks import GLOBAL_HOOKS, hide_user_hooks, hooks_disabled
from sharpwatch.curvature.state.snapshot import StateSnapshot, refill


class Functional:
    """Stands in for a model, and computes with `leaves` in place of its parameters and with copies of its buffers.

    Use it through `isolated`, which restores the modules. The computation never reaches the parameters' `.grad` or
    hooks, nor the buffers; that holds for checkpointed parts that the backward recomputes too. Other attributes are the
    model's own. Wrappers (DDP, a compiled module) are removed: only the wrapped module runs.

    Args:
        model: The model.
        exact: Compute in float32 where the model's tensors have half precision.

    Attributes:
        inner: The unwrapped module.
        leaves: Tensors by parameter name, as in `model.named_parameters()`. The leaf of a frozen parameter does not
            require a gradient.
    """

    def __init__(self, model: nn.Module, *, exact: bool = False) -> None:
        self.inner = unwrap(model)
        self.exact = exact
        self.leaves = {
            name: self._upcast(parameter.detach()).requires_grad_(parameter.requires_grad)
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
        """Call the model."""
        return self.call("", "", *args, **kwargs)

    def call(self, path: str, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call `method` of the submodule `path`; an empty path is the model itself, and an empty method its forward."""
        for registry, key, buffer in self._buffers:  # new copies: one forward's updates must not reach the next
            registry[key] = self._upcast(buffer).clone()
        module = self.inner.get_submodule(path)
        return getattr(module, method)(*args, **kwargs) if method else module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def trainable(self) -> dict[str, Tensor]:
        """The leaves that require a gradient."""
        return {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}

    def set_parameter(self, name: str, tensor: Tensor) -> None:
        """Compute with `tensor` as parameter `name` from now on, wherever it is used."""
        # A tied parameter is in several registries.
        for registry, key in self._slots[name]:
            registry[key] = tensor

    def _install_registries(self, module: nn.Module, names: Mapping[int, str]) -> None:
        # Whole registries are exchanged, so that putting the module's own dicts back undoes everything.
        parameters, buffers = dict(vars(module)["_parameters"]), dict(vars(module)["_buffers"])
        for key, parameter in parameters.items():
            if parameter is not None:
                self._slots[names[id(parameter)]].append((parameters, key))
        self._buffers += [(buffers, key, buffer) for key, buffer in buffers.items() if buffer is not None]
        vars(module)["_parameters"], vars(module)["_buffers"] = parameters, buffers

    def _upcast(self, tensor: Tensor) -> Tensor:
        return upcast(tensor) if self.exact else tensor


def upcast(tensor: Tensor) -> Tensor:
    """`tensor` in float32 if it has half precision, else unchanged."""
    return tensor.float() if tensor.dtype in {torch.bfloat16, torch.float16} else tensor


@contextmanager
def isolated(model: nn.Module, *, exact: bool = False) -> Iterator[Functional]:
    """Run `model` through a `Functional` that leaves it unchanged; see `restore` for what is set inside.

    Args:
        model: The model.
        exact: Use at least float32 for weights, buffers and matrix products, without autocast.

    Yields:
        The stand-in for the model.
    """
    with restore(model), full_precision(model) if exact else nullcontext():
        yield Functional(model, exact=exact)


@contextmanager
def restore(model: nn.Module) -> Iterator[None]:
    """Run extra forwards through `model`'s modules, then restore everything but `.grad` and the buffers.

    Inside, every module is in evaluation mode and gradients are enabled. Autocast stays as it is, but without its
    cache. The user's hooks (on modules, global, on saved tensors) and dispatch modes are bypassed, except those that
    are part of the computation (see `hooks`). Compiled code runs eagerly, and reentrant checkpoints keep their
    activations. Afterwards, also after an error, all of this is undone.
    The random states (torch's on the CPU and the model's accelerators, NumPy's, Python's) and every attribute that the
    modules' code has set are restored, with the contents that a `StateSnapshot` records.

    Args:
        model: The model.
    """
    with ExitStack() as stack:
        # An optimizer steps without gradients, and the model may have been called in inference mode: a probe needs a
        # graph.
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(rng_state_restored(model))
        stack.enter_context(_without_autocast_cache())
        stack.enter_context(_without_modes())
        stack.enter_context(_attributes_restored(model))
        stack.enter_context(hooks_disabled(nn.modules.module, GLOBAL_HOOKS))
        stack.enter_context(_without_reentrant_checkpoints())
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and importing it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            # Not by `eval()`, which may be a method of the user's own.
            vars(module)["training"] = False
            hide_user_hooks(module)
        yield


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Compute without autocast, and without rounding float32 to fewer bits, on the devices of `model`."""
    kinds = {"cpu", *(parameter.device.type for parameter in model.parameters() if parameter.device.type != "meta")}
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(float32_exact())
        yield


class _DirectCheckpoint:
    """Replaces a reentrant checkpoint, whose backward does not support `torch.autograd.grad`: nothing is recomputed."""

    @staticmethod
    def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def _without_reentrant_checkpoints() -> Iterator[None]:
    module = torch.utils.checkpoint
    saved = module.CheckpointFunction
    module.CheckpointFunction = _DirectCheckpoint  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        module.CheckpointFunction = saved  # type: ignore[misc]


@contextmanager
def _without_modes() -> Iterator[None]:
    """Disable the user's dispatch modes, which count or record operations, and saved-tensor hooks."""
    with ExitStack() as stack:
        if torch._C._len_torch_dispatch_stack():  # noqa: SLF001 - there is no public way
            stack.enter_context(_disable_current_modes())
        # Before torch 2.7 nothing tells whether there are any.
        top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # noqa: SLF001 - as above
        if top is None or top(False) is not None:
            # Detached, or a graph of torch 2.6 holds itself; what is unpacked is put back into the graph.
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _identity))
        yield


def _identity(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Disable the autocast cache: its casts of the leaves would keep a probe's graph alive."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """Restore every module's attributes and their contents after the body; inside, tensor attributes are copies."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    snapshot = StateSnapshot(excluded=[*modules, *model.parameters(), *model.buffers()])
    copies: dict[int, Tensor] = {}
    for value in itertools.chain.from_iterable(attribute.values() for attribute in attributes):
        if not isinstance(value, Tensor):
            snapshot.add(value)
    try:
        for module, attribute in zip(modules, attributes, strict=True):
            for name, value in attribute.items():
                # A forward may write into tensors that are no buffers, such as a cache: it gets copies of them.
                if isinstance(value, Tensor) and not value.requires_grad:
                    vars(module)[name] = copies.setdefault(id(value), value.clone())
        yield
    finally:
        for module, attribute in zip(modules, attributes, strict=True):
            refill(vars(module), attribute)
        snapshot.restore()


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside wrappers that change how it runs but not its result: DDP and `torch.compile`."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        # Known by its registry: importing torch._dynamo to ask for the class takes a second.
        elif "_orig_mod" in vars(model).get("_modules", {}):
            model = model.get_submodule("_orig_mod")
        else:
            return model
