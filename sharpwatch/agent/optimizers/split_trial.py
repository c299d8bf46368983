"""Steps copies of an optimizer whole and with its groups split, and compares where they end.

Splits at a multiplier of exactly 1 must change nothing: elementwise steps have to agree in every bit. Only where a step
stacks parameters, multiplies matrices or takes sums may it round otherwise with fewer parameters in a group.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import thread_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpwatch.agent.control.lr_multipliers import ParamGroupOverride
from sharpwatch.agent.optimizers.optimizer_copy import (
    NoRoomError,
    NotTriedError,
    new_copy,
    parts_of,
    present_copy,
    random_like,
)
from sharpwatch.agent.optimizers.trial_guard import TrialGuard
from sharpwatch.agent.safety import from_signal_handler, signals_held
from sharpwatch.curvature.parameters.shards import local_tensor
from sharpwatch.curvature.state.isolation import full_precision, hooks_disabled, restore

_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
# Of the gradients, in turn: a step that clips, or ignores what is small, takes each of its ways.
_SCALES = (0.1, 10.0, 1e-3)
_SLOW = 0.25  # processor seconds of one step of a copy with the present state, above which it is not tried
_HALF = 0.5

_PLAIN = (bool, float, complex, str, type(None))
_Pieces = tuple[Mapping[int, float], Mapping[int, int]]  # by parameter id: multipliers, and pieces of its group
_Divide = Callable[[Sequence[Sequence[Tensor]]], _Pieces]  # of the parameters by group


@dataclass(frozen=True, slots=True)
class Plan:
    """How copies are made, and which of their steps are split."""

    copied: Callable[[Optimizer, torch.Generator], Optimizer]
    steps: int
    split: Sequence[int]
    seconds: float = math.inf  # that one step may take


# State exists when the groups are first split, and is used whole afterwards. 12 steps, as some refresh what they keep
# every 10th.
NEW = Plan(new_copy, 12, (3, 4, 5, 8, 9))
PRESENT = Plan(lambda optimizer, _: present_copy(optimizer), 3, (0, 1), _SLOW)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Where a copy ended: the parameters, how far each went, all else that it holds, and how much rounding may do."""

    parameters: Sequence[Tensor]
    ways: Sequence[float]
    kept: Mapping[str, Tensor | float | str]
    tolerance: float


def trial(optimizer: Optimizer, plan: Plan) -> str:
    """Compare steps of copies of `optimizer`, whole and split; nothing of the optimizer itself is touched.

    Args:
        optimizer: One of the optimizers of the run.
        plan: `NEW` or `PRESENT`.

    Returns:
        Why its groups can't be split; empty where they can.

    Raises:
        NotTriedError: It can't be copied or stepped, or a copy shows nothing.
    """
    with signals_held():  # a handler that saves a checkpoint would find other random states
        whole = _run(optimizer, plan, lambda _: ({}, {}))
        if not any(whole.ways) or not all(map(math.isfinite, whole.ways)):
            raise NotTriedError("a copy takes no finite step on random gradients")
        try:
            return _compared(whole, partial(_run, optimizer, plan))
        except Exception as error:
            if isinstance(error, (NotTriedError, torch.OutOfMemoryError)) or from_signal_handler(error):
                raise
            return f"step() of a copy failed when its groups were split: {type(error).__name__}: {error}"


def _compared(whole: _Outcome, run: Callable[[_Divide], _Outcome]) -> str:
    one_by_one = run(_one_by_one)
    for split in (one_by_one, run(_two_by_two)):
        tolerance = max(whole.tolerance, split.tolerance)
        if any(_differences(whole, split, tolerance)):
            return "its steps depend on how parameters are grouped, as copies showed"
        name = _first_difference(whole.kept, split.kept, tolerance)
        if name:
            return f"what it keeps in {name} depends on how parameters are grouped, as copies showed"
    # Divided alike, so that no rounding differs. Frozen parameters never move.
    differences = _differences(one_by_one, run(_every_other_halved), tolerance=0.0)
    if differences != [number % 2 == 0 and way > 0 for number, way in enumerate(whole.ways)]:
        return (
            "a group's learning rate does not act on the group's own parameters, and on these alone, as copies showed"
        )
    return ""


def _one_by_one(groups: Sequence[Sequence[Tensor]]) -> _Pieces:
    return {}, {id(parameter): number for group in groups for number, parameter in enumerate(group)}


def _two_by_two(groups: Sequence[Sequence[Tensor]]) -> _Pieces:
    # Neighbours, so that parameters keep their order: an optimizer may draw random numbers for each in turn.
    return {}, {id(parameter): number // 2 for group in groups for number, parameter in enumerate(group)}


def _every_other_halved(groups: Sequence[Sequence[Tensor]]) -> _Pieces:
    parameters = [parameter for group in groups for parameter in group]
    return {id(parameter): _HALF for parameter in parameters[::2]}, _one_by_one(groups)[1]


def _run(optimizer: Optimizer, plan: Plan, divide: _Divide) -> _Outcome:
    """Step a copy; in the plan's split steps its groups are divided."""
    # A generator of its own: all copies need the same gradients, and the run's random state must not move.
    generator = torch.Generator().manual_seed(0)
    twin = plan.copied(optimizer, generator)
    groups = [list(group["params"]) for group in twin.param_groups]
    parameters = [parameter for group in groups for parameter in group]
    start = [_aside(parameter) for parameter in parameters]
    multipliers, pieces = divide(groups)
    override, guard = ParamGroupOverride(twin), TrialGuard(optimizer)
    torchs = sys.modules[Optimizer.__module__]
    stand_ins = nn.ParameterList(parameters)
    # `restore` also puts back the random states, so that all copies draw the same numbers.
    with (
        restore(stand_ins),
        full_precision(stand_ins),
        hooks_disabled(torchs, _GLOBAL_HOOKS),
        _gradients_kept(optimizer),
    ):
        for number in range(plan.steps):
            scale = _SCALES[number % len(_SCALES)]
            gradients = [random_like(parameter, generator, scale) for parameter in parameters]
            if number in plan.split:
                override.apply(multipliers, pieces)
            began = thread_time()
            with guard:
                _step(twin, parameters, gradients)
            if thread_time() - began > plan.seconds:
                raise NoRoomError("a step of a copy takes too long")
            override.restore()
    end = [_aside(parameter) for parameter in parameters]
    ways = [_norm(_wide(one) - _wide(other)) for one, other in zip(end, start, strict=True)]
    return _Outcome(end, ways, _kept(twin), guard.tolerance)


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


@contextmanager
def _gradients_kept(optimizer: Optimizer) -> Iterator[None]:
    """Put back what a step that finds the run's parameters, in a global list say, has set as their gradients."""
    saved = [(each, each.grad) for group in optimizer.param_groups for each in group["params"]]
    try:
        yield
    finally:
        for parameter, gradient in saved:
            if parameter.grad is not gradient:
                parameter.grad = gradient


# Comparing.


def _aside(parameter: Tensor) -> Tensor:
    return local_tensor(parameter).detach().to("cpu", copy=True)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)


def _norm(tensor: Tensor) -> float:
    return float(tensor.norm())


def _differences(one: _Outcome, other: _Outcome, tolerance: float) -> list[bool]:
    pairs = zip(one.parameters, other.parameters, one.ways, strict=True)
    return [_differ(a, b, tolerance, way) for a, b, way in pairs]


def _differ(one: Tensor, other: Tensor, tolerance: float, scale: float | None = None) -> bool:
    """Whether they differ by more than `tolerance` of `scale`, or of the first one's norm."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return True
    a, b = _wide(one), _wide(other)
    same = (a == b) | (a.isnan() & b.isnan())
    if tolerance == 0 or bool(same.all()):
        return not bool(same.all())
    return not _norm((a - b)[~same]) <= tolerance * (_norm(a) if scale is None else scale)


def _first_difference(one: Mapping[str, Any], other: Mapping[str, Any], tolerance: float) -> str:
    """The attribute, or entry of state or groups, in which two copies differ; empty where in none."""
    for path in {**one, **other}:
        a, b = one.get(path), other.get(path)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            unlike = _differ(a, b, tolerance)
        elif isinstance(a, float) and isinstance(b, float):
            unlike = not (a == b or math.isclose(a, b, rel_tol=tolerance) or (math.isnan(a) and math.isnan(b)))
        else:
            unlike = type(a) is not type(b) or a != b
        if unlike:
            return path
    return ""


def _kept(twin: Optimizer) -> dict[str, Any]:
    """The tensors, numbers and text that a copy holds beside its parameters, by where they are."""
    parameters = [parameter for group in twin.param_groups for parameter in group["params"]]
    names = {id(parameter): f"parameter {number}" for number, parameter in enumerate(parameters)}
    seen = set(names)
    names |= {id(group): f"group {number}" for number, group in enumerate(twin.param_groups)}
    names |= {id(group["params"]): f"parameters {number}" for number, group in enumerate(twin.param_groups)}
    return {f"{name!r}{path}": leaf for name, value in vars(twin).items() for path, leaf in _leaves(value, names, seen)}


def _leaves(value: Any, names: Mapping[int, str], seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield "", names.get(value, value)  # the id of a parameter differs between copies
    elif isinstance(value, _PLAIN):
        yield "", value
    elif id(value) in seen:
        yield "", names.get(id(value), "")
    else:
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield from _tensor_leaves(value)
        for key, each in _entries(value, names):
            yield from ((f"[{key}]{path}", leaf) for path, leaf in _leaves(each, names, seen))


def _tensor_leaves(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    parts = parts_of(value)
    if parts is not None:
        yield from ((f".{name}", part) for name, part in parts.items() if isinstance(part, Tensor))
    elif value.device.type != "meta":
        yield "", value


def _entries(value: Any, names: Mapping[int, str]) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        return ((_name(key, names), each) for key, each in value.items())
    if isinstance(value, (list, tuple, deque)):
        return ((str(number), each) for number, each in enumerate(value))
    if isinstance(value, (Tensor, type)):
        return ()
    return getattr(value, "__dict__", {}).items()


def _name(key: object, names: Mapping[int, str]) -> str:
    known = names.get(key if isinstance(key, int) else id(key))
    return known or (repr(key) if isinstance(key, (*_PLAIN, int, tuple)) else type(key).__name__)
