"""Small copies of an optimizer, which can be stepped without reaching anything of the run.

A copy has stand-ins for a few of the parameters, and copies of all that the optimizer holds. It is made without
`copy.deepcopy(optimizer)`, by which torch's optimizers lose the attributes that subclasses add, and without
`__init__`, whose arguments are not known.
"""

from __future__ import annotations

import copy
import functools
import inspect
import random
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sharpwatch.curvature.parameters.shards import is_dtensor, local_tensor

# Stand-ins are for at most so many parameters, kinds of parameters in a group, and parameters of a kind.
_STAND_INS, _KINDS, _PER_KIND = 24, 16, 3
_SIDE = 16  # to which the sides of new stand-ins are cut, because some optimizers decompose matrices
_NUMEL = 1 << 20  # a stand-in for a larger parameter would make a step of the copy slow
_BYTES, _OBJECTS = 1 << 26, 10_000  # that a copy may have
_SCALE = 0.1  # of the weights of new stand-ins
_RATE = 0.1  # of the copy: a warm-up may begin at 0, and bfloat16 would round small steps away

_NUMBERS_AND_TEXT = (type(None), int, float, complex, str, bytes)
ATOMS = (*_NUMBERS_AND_TEXT, type, torch.dtype, torch.device, Enum, random.Random, types.BuiltinFunctionType)
_AMP = {"grad_scale", "found_inf"}  # which GradScaler sets for the length of one step

Pairs = list[list[tuple[Tensor, Tensor]]]  # by group: parameters with their stand-ins


class NotTriedError(Exception):
    """The optimizer can't be copied or stepped; the message says why."""


class NoRoomError(NotTriedError):
    """Copies with the state that the optimizer has now would be too large, or too slow."""


def new_copy(optimizer: Optimizer, generator: torch.Generator) -> Optimizer:
    """A copy of `optimizer` without state, for small random stand-ins. Raises `NotTriedError`."""
    pairs, left = [], _STAND_INS
    for group in optimizer.param_groups:
        chosen = _chosen(group["params"], _new_kind)[:left]
        pairs.append([(parameter, _new_stand_in(parameter, generator)) for parameter in chosen])
        left -= len(chosen)
    return _copy(optimizer, pairs, with_state=False)


def present_copy(optimizer: Optimizer) -> Optimizer:
    """A copy of `optimizer` with its state, for clones of some parameters that are not large.

    Raises `NoRoomError` where all are too large, and `NotTriedError`.
    """
    pairs, room, left = [], _BYTES, _STAND_INS
    for group in optimizer.param_groups:
        pairs.append(list[tuple[Tensor, Tensor]]())
        for parameter in _chosen(group["params"], _present_kind):
            local = local_tensor(parameter)
            # The parameter, its gradient, and what is kept for it.
            size = 2 * local.nbytes + sum(each.nbytes for each in tensors_in(optimizer.state.get(parameter)))
            if local.numel() <= _NUMEL and size <= room and left:
                room, left = room - size, left - 1
                pairs[-1].append((parameter, _clone(parameter)))
    if not any(pairs):
        raise NoRoomError("its parameters are too large to copy")
    return _copy(optimizer, pairs, with_state=True)


def random_like(like: Tensor, generator: torch.Generator, scale: float) -> Tensor:
    """Random numbers in the form of `like`, which may be a DTensor; without communication."""
    local = local_tensor(like)
    drawn = scale * torch.randn(local.shape, generator=generator, device="cpu", dtype=torch.float32)
    return _placed_as(like, drawn.to(local))


def _copy(optimizer: Optimizer, pairs: Pairs, *, with_state: bool) -> Optimizer:
    kind = type(optimizer)
    if hasattr(kind, "__del__"):  # it would free what the optimizer itself still uses
        raise NotTriedError(f"{kind.__name__} has a __del__ method, so it is not copied")
    twin: Optimizer = object.__new__(kind)
    state: defaultdict[object, Any] = defaultdict(dict)
    groups: list[dict[str, Any]] = []
    memo: dict[int, Any] = {id(optimizer): twin, id(optimizer.state): state, id(optimizer.param_groups): groups}
    absent = torch.empty(0, device="meta")  # for parameters without a stand-in: no step must reach the real ones
    memo |= {id(parameter): absent for group in optimizer.param_groups for parameter in group["params"]}
    memo |= {id(parameter): stand_in for pair in pairs for parameter, stand_in in pair}
    for group, pair in zip(optimizer.param_groups, pairs, strict=False):
        if pair or not group["params"]:  # a group of parameters that are all too large has no copy
            groups.append({"params": [stand_in for _, stand_in in pair]})
            memo[id(group)], memo[id(group["params"])] = groups[-1], groups[-1]["params"]
    for group in optimizer.param_groups:
        if id(group) in memo:
            new = memo[id(group)]
            new.update(_deep_copy({name: value for name, value in group.items() if name != "params"}, memo))
            new["lr"] = torch.full_like(new["lr"], _RATE) if isinstance(new["lr"], Tensor) else _RATE
    kept = {parameter for pair in pairs for parameter, _ in pair} if with_state else set()
    state.update(
        _deep_copy(
            {key: value for key, value in optimizer.state.items() if key in kept or not isinstance(key, Tensor)}, memo
        )
    )
    vars(twin).update(_attributes(optimizer, memo))
    return twin


def _attributes(optimizer: Optimizer, memo: dict[int, Any]) -> dict[str, Any]:
    """Copies of the optimizer's attributes, without hooks and without what GradScaler and schedulers set."""
    hooks = {name: OrderedDict[int, Any]() for name in vars(optimizer) if name.startswith("_optimizer_")}
    kind = type(optimizer)
    own = {
        name: value
        for name, value in vars(optimizer).items()
        # A scheduler's wrapper in place of `step` would step the real optimizer.
        if not (name in hooks or name in _AMP or callable(getattr(kind, name, None)))
    }
    stand_ins = {id(each): memo[id(each)] for group in optimizer.param_groups for each in group["params"]}
    copied = _deep_copy(own, memo)
    for value in copied.values():
        if type(value) in {dict, defaultdict}:
            _rename_ids(value, stand_ins)
    return copied | hooks


def _rename_ids(cache: dict[Any, Any], stand_ins: Mapping[int, Tensor]) -> None:
    """Make a cache by the ids of parameters one by those of their stand-ins; entries of the others are left out."""
    for key in [key for key in cache if isinstance(key, int) and key in stand_ins]:
        entry, stand_in = cache.pop(key), stand_ins[key]
        if stand_in.device.type != "meta":
            cache[id(stand_in)] = entry


def _chosen(parameters: Iterable[Tensor], kind_of: Callable[[Tensor], object]) -> list[Tensor]:
    """A few parameters of each kind, in their order."""
    counts: dict[object, int] = defaultdict(int)
    chosen = []
    for parameter in parameters:
        kind = kind_of(parameter)
        counts[kind] += 1
        if counts[kind] <= _PER_KIND and len(counts) <= _KINDS:
            chosen.append(parameter)
    return chosen


def _new_kind(parameter: Tensor) -> object:
    return _cut(parameter), parameter.dtype, parameter.device


def _present_kind(parameter: Tensor) -> object:
    return tuple(parameter.shape), parameter.dtype, parameter.device


def _cut(parameter: Tensor) -> tuple[int, ...]:
    return tuple(min(size, _SIDE) for size in local_tensor(parameter).shape)


def _new_stand_in(parameter: Tensor, generator: torch.Generator) -> Tensor:
    local = local_tensor(parameter)
    empty = torch.empty(_cut(parameter), dtype=local.dtype, device=local.device)
    return _stand_in(parameter, _placed_as(parameter, random_like(empty, generator, _SCALE)))


def _clone(parameter: Tensor) -> Tensor:
    return _stand_in(parameter, _placed_as(parameter, local_tensor(parameter).detach().clone()))


def _stand_in(parameter: Tensor, value: Tensor) -> Tensor:
    new = nn.Parameter(value, requires_grad=parameter.requires_grad)
    vars(new).update({name: each for name, each in vars(parameter).items() if isinstance(each, _NUMBERS_AND_TEXT)})
    return new


def _placed_as(like: Tensor, local: Tensor) -> Tensor:
    """`local` as this rank's shard of a DTensor that is spread over ranks as `like` is; itself if that is none."""
    if not is_dtensor(like):
        return local
    placed: Any = like
    made: Tensor = type(placed).from_local(local, placed.device_mesh, placed.placements, run_check=False)
    return made


def _deep_copy(values: dict[Any, Any], memo: dict[int, Any]) -> dict[Any, Any]:
    """A deep copy of `values`, which must be small and hold nothing that a copy would share with the original."""
    queue: list[object] = [values]
    seen, room = set(memo), _BYTES
    while queue:
        value = queue.pop()
        if isinstance(value, ATOMS) or id(value) in seen:
            continue
        seen.add(id(value))
        room -= value.nbytes if isinstance(value, Tensor) else 0
        if parts_of(value) is not None:
            memo[id(value)] = _rebuilt(value)  # quantized ones often have no deep copy
        if room < 0 or len(seen) - len(memo) > _OBJECTS:
            raise NotTriedError("its attributes are too large to copy")
        queue.extend(_inside(value))
    return copy.deepcopy(values, memo)


def _rebuilt(value: Any) -> Any:
    """A copy of a tensor that consists of others."""
    parts = parts_of(value)
    if parts is None:
        return value.detach().clone() if isinstance(value, Tensor) else value  # such as a DTensor's mesh
    inner = {name: _rebuilt(part) for name, part in parts.items()}
    return type(value).__tensor_unflatten__(inner, value.__tensor_flatten__()[1], value.shape, value.stride())


def parts_of(value: Any) -> dict[str, Any] | None:
    """What a tensor that consists of others, such as a quantized one, is made of; None for another value."""
    if not is_traceable_wrapper_subclass(value):
        return None
    return {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}


def _inside(value: object) -> Iterable[object]:
    """What a deep copy of `value` copies with it."""
    kind = type(value)
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    if isinstance(value, types.MethodType):
        return (value.__self__,)
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, Tensor) or (isinstance(value, types.FunctionType) and _closes_over_nothing(value)):
        return ()
    by_default = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
    if hasattr(value, "__dict__") and by_default and not (hasattr(kind, "__del__") or hasattr(kind, "__deepcopy__")):
        return (vars(value),)
    raise NotTriedError(f"it holds a {kind.__module__}.{kind.__qualname__}, which is not copied")


def _closes_over_nothing(function: types.FunctionType) -> bool:
    """Whether a copy of `function` is the function itself."""
    inner = inspect.unwrap(function)
    # Torch's wrappers (no_grad, compile) close over objects of torch's own, beside the function that they wrap.
    wrapped_by_torch = str(function.__globals__.get("__name__")).startswith("torch.")
    return inner.__closure__ is None and (inner is function or wrapped_by_torch)


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in `value` and in its dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
