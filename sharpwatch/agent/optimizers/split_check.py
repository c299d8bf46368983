"""Checks that splitting an optimizer's parameter groups for one step leaves its steps and its state right.

A learning-rate command splits groups, which is right only where an optimizer keeps its state by parameter. Some keep
one stacked momentum of a whole group under the group's first parameter; after a split each parameter would get the
momentum of another. So an optimizer must be shown to be safe:

- Its code is one that sharpwatch's own tests cover, or
- copies of it take the same steps whether their groups are split or not (`split_trial`): small ones without state at
  attach, and copies of what it holds by then before the first command is in force.

Where no copy can be made or stepped, rates can't be changed.
"""

from __future__ import annotations

import inspect
import logging
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from sharpwatch.agent.optimizers.optimizer_copy import (
    ATOMS,
    NoRoomError,
    NotTriedError,
    tensors_in,
)
from sharpwatch.agent.optimizers.split_trial import NEW, PRESENT, trial
from sharpwatch.agent.safety import from_signal_handler

# Where, beside torch, the optimizers are defined that sharpwatch's tests compare with real groups. Those of
# deepspeed.ops keep their state as torch's do.
_TESTED = (
    "adam_mini",
    "bitsandbytes",
    "deepspeed.ops",
    "lion_pytorch",
    "schedulefree",
    "torchao",
    "transformers.optimization",
)
# What code names that may wait for other ranks.
_COMMUNICATION = re.compile(
    r"(^|[._])(dist|distributed|comm|hvd|horovod|mpi4py|full_tensor|redistribute|symm_mem|all_reduce|all_gather\w*"
    r"|reduce_scatter\w*|all_to_all\w*)($|[._])"
)
_BESIDE = 4096  # entries of a tensor beside the state above which it counts as state
_LOG = logging.getLogger("sharpwatch")


def unsafe_to_split(optimizer: Optimizer) -> str:
    """Check at attach whether the groups of `optimizer` can be split for one step.

    Calls the `step()` of copies where the optimizer is unknown. The optimizer, its parameters, gradients and state, and
    all random states are left as they are.

    Args:
        optimizer: One of the optimizers of the run.

    Returns:
        Why they can't be split; empty where they can.
    """
    return _shown(optimizer, _tried_at_attach)


@dataclass(slots=True, eq=False)
class PresentState:
    """Checks, before a command is in force, that the groups of `optimizers` can be split as they are by now.

    An unknown optimizer is tried once more, on copies of what it holds, when the first command comes, and again when it
    has got state or parameters since. A refusal is logged, and holds for the rest of the run.

    Attributes:
        optimizers: Those of the run.
        refusal: Why they can't be split, once a check has found it.
        stepped: Indices of those whose `step()` was seen.
    """

    optimizers: Sequence[Optimizer]
    refusal: str = ""
    stepped: set[int] = field(default_factory=set)
    _tried: dict[int, object] = field(default_factory=dict)  # by index: what there was

    def check(self) -> str:
        """The reason against splitting groups, with the optimizer's name; empty where there is none."""
        if not self.refusal:
            reasons = [(type(each).__name__, self._why(number)) for number, each in enumerate(self.optimizers)]
            self.refusal = "; ".join(f"{name}: {reason}" for name, reason in reasons if reason)
            if self.refusal:
                _LOG.warning("learning rates can't be changed any more: %s", self.refusal)
        return self.refusal or self._unseen()

    def _unseen(self) -> str:
        """Why rates can't be changed yet: a step that is never seen is not under any multiplier."""
        unseen = [each for number, each in enumerate(self.optimizers) if number not in self.stepped]
        if not self.stepped or not unseen:
            return ""
        return f"{type(unseen[0]).__name__}: no step() of it was seen yet; inside of a compiled function it never is"

    def _why(self, number: int) -> str:
        optimizer = self.optimizers[number]
        there = [len(group["params"]) for group in optimizer.param_groups], bool(optimizer.state)
        if self._tried.get(number) == there:
            return _shown(optimizer, lambda _: "")
        self._tried[number] = there
        return _shown(optimizer, _tried_with_state)


def _shown(optimizer: Optimizer, tried: Callable[[Optimizer], str]) -> str:
    try:
        if _is_compiled(optimizer):
            return "its step() is compiled, which does not see groups that are split for a step"
        # The usual optimizers cost nothing: no copy is made or stepped.
        return "" if _is_tested(optimizer) else stacked_state(optimizer) or tried(optimizer)
    except Exception as error:
        if from_signal_handler(error):
            raise
        # The optimizer is the user's own and may fail in any way; then nothing is shown, and rates are refused.
        why = str(error) if isinstance(error, NotTriedError) else f"a copy raised {type(error).__name__}: {error}"
        return f"it could not be shown that its groups can be split: {why}"


def _tried_at_attach(optimizer: Optimizer) -> str:
    _check_code(type(optimizer))
    try:
        return trial(optimizer, NEW)
    except Exception as error:
        # One that makes its state in __init__, or can't step small matrices, is tried as it is.
        if from_signal_handler(error):
            raise
        try:
            return trial(optimizer, PRESENT)
        except Exception as second:
            if from_signal_handler(second):
                raise
            raise error from None


def _tried_with_state(optimizer: Optimizer) -> str:
    _check_code(type(optimizer))
    try:
        return trial(optimizer, PRESENT)
    except (NoRoomError, torch.OutOfMemoryError):
        return _kept_beside(optimizer)  # what the small copies at attach showed is all there is


def stacked_state(optimizer: Optimizer) -> str:
    """Look for state of several parameters that is kept under one of them. Reads shapes only.

    Args:
        optimizer: One of the optimizers of the run; best right after a step, when its state exists.

    Returns:
        What was found, as a reason against splitting its groups; empty where there is none.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in _state_of(optimizer, parameter).items():
                larger = isinstance(value, Tensor) and value.numel() > parameter.numel()
                if larger and any(_lacks(optimizer, other, key, parameter) for other in group["params"]):
                    return f"it keeps {key!r} of several parameters under one of them"
    return ""


def _lacks(optimizer: Optimizer, other: Tensor, key: object, parameter: Tensor) -> bool:
    """Whether `other`, which is stepped and shaped like `parameter`, has no state `key` of its own."""
    stepped = other.grad is not None and other.shape == parameter.shape
    return stepped and key not in _state_of(optimizer, other)


def _state_of(optimizer: Optimizer, parameter: Tensor) -> dict[Any, Any]:
    state = optimizer.state.get(parameter) if isinstance(optimizer.state, dict) else None
    return state if isinstance(state, dict) else {}


def _kept_beside(optimizer: Optimizer) -> str:
    """Look for large tensors that are neither parameters nor their state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    known = {id(each) for parameter in parameters for each in (parameter, parameter.grad)}
    for held in (vars(optimizer), *optimizer.param_groups):
        for name, value in held.items():
            if name in {"state", "param_groups", "params"}:
                continue
            if any(each.numel() >= _BESIDE and id(each) not in known for each in tensors_in(value)):
                return f"it keeps {name!r} beside the state of its parameters, and is too large or too slow to be tried"
    return ""


# What the code of an optimizer's class says.


def _is_compiled(optimizer: Optimizer) -> bool:
    """Whether `torch.compile` was called on its whole `step`, of the instance or of its class."""
    for step in (optimizer.step, type(optimizer).step):
        for layer in _layers(step):
            compiled = getattr(layer, "_torchdynamo_orig_callable", None) is not None
            if compiled and not getattr(layer, "_torchdynamo_disable", False):
                return True
    return False


def _is_tested(optimizer: Optimizer) -> bool:
    """Whether all methods of its class, but for `__init__`, are those of optimizers that sharpwatch's tests cover."""
    own = (function for name, function in _methods(type(optimizer)) if name != "__init__")
    homes = (_home(layer) for function in own for layer in _layers(function) if not _is_torchs(layer))
    return all(any(each == tested or each.startswith(f"{tested}.") for tested in _TESTED) for each in homes)


def _methods(kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The functions of a class and its bases, without those of torch's base class of all optimizers."""
    for base in kind.__mro__:
        if base not in {Optimizer, object}:
            for name, value in vars(base).items():
                function = getattr(value, "__func__", value)  # of a static or class method
                if isinstance(function, types.FunctionType):
                    yield name, function


def _shares_nothing(function: Callable[..., Any]) -> bool:
    """Whether `function` closes over nothing that could belong to the run: a copy of it is the function itself."""
    # Torch's wrappers (no_grad, compile) close over objects of torch's own, beside the function that they wrap.
    own = (layer for layer in _layers(function) if not _is_torchs(layer))
    return all(_is_harmless(value) for layer in own for value in _closed_over(layer))


def _layers(function: Any) -> Iterator[Any]:
    """`function` and those that it wraps, one inside the other."""
    current = getattr(function, "__func__", function)
    while current is not None:
        yield current
        current = getattr(current, "__wrapped__", None)


def _home(function: Any) -> str:
    """The module that `function` was defined in."""
    # `functools.wraps` copies `__module__` from what it wraps.
    return str(getattr(function, "__globals__", {}).get("__name__"))


def _is_torchs(function: Any) -> bool:
    """Whether `function` was defined in torch."""
    return _home(function).partition(".")[0] == "torch"


def _closed_over(function: Any) -> Iterator[object]:
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _is_harmless(value: object) -> bool:
    if isinstance(value, types.FunctionType):
        return _shares_nothing(value)
    return isinstance(value, (*ATOMS, types.ModuleType))


def _check_code(kind: type) -> None:
    """Raise `NotTriedError` where a copy's step could reach the run, or other ranks, past the copy."""
    for name, function in _methods(kind):
        if not _shares_nothing(function):
            raise NotTriedError(f"its {name}() closes over other objects of the program")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        names = [name for _, function in _methods(kind) for name in _named_in(function, set())]
        found = next(filter(_COMMUNICATION.search, names), None)
        if found is not None:
            raise NotTriedError(
                f"its code names {found!r}: step() may wait for other ranks, so that no copy is stepped"
            )


def _named_in(function: Any, seen: set[int]) -> Iterator[str]:
    """What the code of `function` names, and that of the functions outside of torch that it calls by name."""
    for layer in _layers(function):
        inner = getattr(layer, "_torchdynamo_orig_callable", layer)
        code = getattr(inner, "__code__", None)
        if code is None or id(code) in seen or _is_torchs(inner):
            continue
        seen.add(id(code))
        for name in _names_of(code):
            value = inner.__globals__.get(name)
            yield from (name, str(value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "")))
            if inspect.isfunction(value):
                yield from _named_in(value, seen)


def _names_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)
