"""Checks at attach that splitting an optimizer's parameter groups for one step leaves its state right.

A learning-rate command splits groups, which is right only where the optimizer keeps its state by parameter. Some keep
one stacked momentum of a whole group under the group's first parameter; after a split each parameter would get the
momentum of another. So an optimizer must be shown to be safe, in this order:

1. Its `step` is one that sharpwatch's own tests cover.
2. A copy of it, with small stand-ins for its parameters, takes the same steps whether its groups are split or not.
3. Where no copy can be stepped: the state that it holds already is each parameter's own.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpwatch.agent.control.lr_multipliers import ParamGroupOverride
from sharpwatch.agent.safety import from_signal_handler
from sharpwatch.curvature.state.hooks import hooks_disabled
from sharpwatch.curvature.state.isolation import restore

# Where the `step` functions are defined that sharpwatch's tests compare with real groups. Those of deepspeed.ops keep
# their state as torch's do.
_TESTED = (
    "torch.optim",
    "adam_mini",
    "bitsandbytes",
    "deepspeed.ops",
    "lion_pytorch",
    "schedulefree",
    "torchao",
    "transformers.optimization",
)

_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")

# Of the copy's steps 0 to 4, 2 and 3 are split: state exists by then. Step 4 starts from what a split leaves behind.
_STEPS, _SPLIT = 5, (2, 3)
_RATE = 0.1  # of the copy: a warm-up may begin at 0, and bfloat16 would round small steps away
_SCALE = 0.1  # of its weights and gradients
_NUDGE = 1e-6  # multipliers must differ for a group to be split; the steps then differ by about as much
# Of how far a parameter moved. Rounding of batched products stays below it; mixed-up state differs by its own size.
_TOLERANCE = 0.1

# The copy has stand-ins for at most so many groups, shapes in a group and parameters of a shape. Their sides are cut to
# the last of these numbers, because some optimizers decompose matrices.
_GROUPS, _SHAPES, _PER_SHAPE, _SIDE = 32, 16, 3, 16
_BYTES, _OBJECTS = 1 << 26, 10_000  # in the attributes that are copied
_NUMBERS_AND_TEXT = (type(None), int, float, complex, str, bytes)
_ATOMS = (*_NUMBERS_AND_TEXT, type, torch.dtype, torch.device, Enum, random.Random, types.BuiltinFunctionType)


class _NotTriedError(Exception):
    """The optimizer can't be copied or stepped; the message says why."""


def unsafe_to_split(optimizer: Optimizer) -> str:
    """Check whether the groups of `optimizer` can be split for one step.

    Calls the `step()` of a copy where the optimizer is unknown, never on several processes: it may wait for other
    ranks. The optimizer, its parameters, gradients and state, and all random states are left as they are.

    Args:
        optimizer: One of the optimizers of the run.

    Returns:
        Why they can't be split; empty where they can.
    """
    try:
        # The usual optimizers cost nothing at attach: no copy is made or stepped.
        if _is_tested(optimizer):
            return ""
        return stacked_state(optimizer) or _trial(optimizer)
    except Exception as error:
        if from_signal_handler(error):
            raise
        # The state is the user's own object and may fail in any way; then nothing is shown, and rates are refused.
        with suppress(Exception):
            if _holds_state_by_parameter(optimizer):
                return ""
        why = str(error) if isinstance(error, _NotTriedError) else f"a copy raised {type(error).__name__}: {error}"
        return f"it could not be shown that its groups can be split: {why}"


def stacked_state(optimizer: Optimizer) -> str:
    """Look for state of several parameters that is kept under one of them. Reads shapes only.

    Args:
        optimizer: One of the optimizers of the run; best right after a step, when its state exists.

    Returns:
        What was found, as a reason against splitting its groups; empty where there is none.
    """
    if _is_tested(optimizer):
        return ""
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


def _is_tested(optimizer: Optimizer) -> bool:
    home = str(inspect.unwrap(type(optimizer).step).__module__)
    return any(home == tested or home.startswith(f"{tested}.") for tested in _TESTED)


def _holds_state_by_parameter(optimizer: Optimizer) -> bool:
    """Whether there is state already, all of it shaped like its parameter or a single number, and none elsewhere."""
    elsewhere = [value for name, value in vars(optimizer).items() if name not in {"state", "param_groups"}]
    for group in optimizer.param_groups:
        elsewhere += [value for name, value in group.items() if name != "params"]
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        states = [_state_of(optimizer, parameter) for parameter in trained]
        if not all(states) or len({frozenset(state) for state in states}) > 1:
            return False
        for parameter, state in zip(trained, states, strict=True):
            if any(tensor.numel() > 1 and tensor.shape != parameter.shape for tensor in _tensors(state)):
                return False
    return all(tensor.numel() <= 1 for tensor in _tensors(elsewhere))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


# The trial on copies.


def _trial(optimizer: Optimizer) -> str:
    """Step one copy whole and one that is split for a while, on the same gradients, and compare their parameters."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise _NotTriedError(
            "step() of an unknown class is not tried on several processes; attach after its first step"
        )
    start, _ = _steps(optimizer, 0)
    whole, _ = _steps(optimizer, _STEPS)
    try:
        split, twin = _steps(optimizer, _STEPS, split=_SPLIT)
    except Exception as error:
        if from_signal_handler(error):
            raise
        return f"step() of a copy failed when its groups were split: {type(error).__name__}: {error}"
    ways = [(one - begin).norm().item() for one, begin in zip(whole, start, strict=True)]
    gaps = [(one - other).norm().item() for one, other in zip(whole, split, strict=True)]
    if not all(gap <= _TOLERANCE * way for gap, way in zip(gaps, ways, strict=True)):
        return "its steps depend on how parameters are grouped, as copies showed at attach"
    # Two copies that both stood still are equal without having shown anything.
    if not any(ways) and any(twin.state.values()) and not _holds_state_by_parameter(twin):
        raise _NotTriedError("a copy takes no step on random gradients")
    return ""


def _steps(optimizer: Optimizer, count: int, split: Sequence[int] = ()) -> tuple[list[Tensor], Optimizer]:
    """The parameters of a copy after `count` steps, those numbered in `split` with each parameter in its own group."""
    # A generator of its own: both copies need the same gradients, and the run's random state must not move.
    generator = torch.Generator().manual_seed(0)
    twin = _twin(optimizer, generator)
    parameters = [parameter for group in twin.param_groups for parameter in group["params"]]
    multipliers = {id(parameter): 1 + number * _NUDGE for number, parameter in enumerate(parameters, 1)}
    override = ParamGroupOverride(twin)
    torchs = sys.modules[Optimizer.__module__]
    # Also puts back the random states, so that both copies draw the same numbers.
    with restore(nn.ParameterList(parameters)), hooks_disabled(torchs, _GLOBAL_HOOKS):
        for number in range(count):
            gradients = [_random(parameter, generator) for parameter in parameters]
            if number in split:
                override.apply(multipliers)
            _step(twin, parameters, gradients)
            override.restore()
    # One type for real and complex parameters.
    return [parameter.detach().cpu().to(torch.complex128) for parameter in parameters], twin


def _step(twin: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    def evaluate(*_: object, **__: object) -> Tensor:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone() if parameter.requires_grad else None
        return torch.zeros(())

    evaluate()
    closure = inspect.signature(type(twin).step).parameters.get("closure")
    # Only where it must be: some optimizers evaluate a closure several times, and take another path with one.
    required = closure is not None and closure.default is inspect.Parameter.empty
    step: Callable[..., object] = twin.step
    step(*([evaluate] if required else []))


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return (_SCALE * torch.randn(like.shape, generator=generator, device="cpu", dtype=torch.float32)).to(like)


def _twin(optimizer: Optimizer, generator: torch.Generator) -> Optimizer:
    """A copy of `optimizer` without state and hooks, for small stand-ins of some of its parameters.

    Made without `copy.deepcopy(optimizer)`, by which torch's optimizers lose the attributes that subclasses add.
    """
    kind = type(optimizer)
    if hasattr(kind, "__del__"):  # it would free what the optimizer itself still uses
        raise _NotTriedError(f"{kind.__name__} has a __del__ method, so it is not copied")
    # Without __init__, whose arguments are not known.
    twin: Optimizer = object.__new__(kind)
    state: defaultdict[object, Any] = defaultdict(dict)
    memo: dict[int, Any] = {id(optimizer): twin, id(optimizer.state): state}
    absent = torch.empty(0, device="meta")  # for parameters without a stand-in: no step must reach the real ones
    memo |= {id(parameter): absent for group in optimizer.param_groups for parameter in group["params"]}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups[:_GROUPS]:
        chosen = _chosen(group["params"])
        stand_ins = [_stand_in(parameter, generator) for parameter in chosen]
        memo |= {id(parameter): stand_in for parameter, stand_in in zip(chosen, stand_ins, strict=True)}
        groups.append({"params": stand_ins})
        memo[id(group)] = groups[-1]
    memo[id(optimizer.param_groups)] = groups
    for group, new in zip(optimizer.param_groups, groups, strict=False):
        new.update(_copied({name: value for name, value in group.items() if name != "params"}, memo))
        new["lr"] = torch.full_like(new["lr"], _RATE) if isinstance(new["lr"], Tensor) else _RATE
    state.update(_copied({key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}, memo))
    hooks = {name: OrderedDict[int, Any]() for name in vars(optimizer) if name.startswith("_optimizer_")}
    own = {name: value for name, value in vars(optimizer).items() if name not in hooks and not _replaces(kind, name)}
    vars(twin).update(_copied(own, memo) | hooks)
    return twin


def _replaces(kind: type, name: str) -> bool:
    """Whether an attribute of an instance stands in for a method: a scheduler's `step` would step the real one."""
    return callable(getattr(kind, name, None))


def _chosen(parameters: Iterable[Tensor]) -> list[Tensor]:
    """A few parameters of each shape, in their order."""
    counts: dict[object, int] = defaultdict(int)
    chosen = []
    for parameter in parameters:
        key = (_shape(parameter), parameter.dtype, parameter.device)
        counts[key] += 1
        if counts[key] <= _PER_SHAPE and len(counts) <= _SHAPES:
            chosen.append(parameter)
    return chosen


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(min(size, _SIDE) for size in parameter.shape)


def _stand_in(parameter: Tensor, generator: torch.Generator) -> Tensor:
    empty = torch.empty(_shape(parameter), dtype=parameter.dtype, device=parameter.device)
    new = nn.Parameter(_random(empty, generator), requires_grad=parameter.requires_grad)
    vars(new).update({name: value for name, value in vars(parameter).items() if isinstance(value, _NUMBERS_AND_TEXT)})
    return new


def _copied(values: dict[Any, Any], memo: dict[int, Any]) -> dict[Any, Any]:
    """A deep copy of `values`, which must be small and hold nothing that a copy would share with the original."""
    queue: list[object] = [values]
    seen, room = set(memo), _BYTES
    while queue:
        value = queue.pop()
        if isinstance(value, _ATOMS) or id(value) in seen:
            continue
        seen.add(id(value))
        room -= value.nbytes if isinstance(value, Tensor) else 0
        if room < 0 or len(seen) - len(memo) > _OBJECTS:
            raise _NotTriedError("its attributes are too large to copy")
        queue.extend(_inside(value))
    return copy.deepcopy(values, memo)


def _inside(value: object) -> Iterable[object]:
    """What a deep copy of `value` copies with it."""
    kind = type(value)
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    if isinstance(value, types.MethodType):
        return (value.__self__,)
    if isinstance(value, Tensor) or (isinstance(value, types.FunctionType) and value.__closure__ is None):
        return ()
    by_default = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
    if hasattr(value, "__dict__") and by_default and not hasattr(kind, "__del__"):
        return (vars(value),)
    raise _NotTriedError(f"it holds a {kind.__module__}.{kind.__qualname__}, which is not copied")
