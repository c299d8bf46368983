"""A snapshot of the state that a model's own code keeps beside its parameters, to be restored after a probe."""

from __future__ import annotations

import copyreg
import enum
import functools
import itertools
import random
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CONTAINERS = frozenset({list, dict, set, deque, OrderedDict, defaultdict, Counter})
_IMMUTABLE = (
    *(int, float, complex, bool, str, bytes, type(None), type(Ellipsis), range, slice, frozenset, enum.Enum),
    *(np.generic, np.dtype, torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
)
_IMMUTABLE_TYPES = frozenset({kind for kind in _IMMUTABLE if kind is not enum.Enum} | {torch.Size})
_MAX_ITEMS = 1000  # visited in one container; an object that leads to more is not the model's own
_MAX_DEPTH = 20


class _ForeignError(Exception):
    """An object leads to something that is not data: a lock, a thread, a file."""


class StateSnapshot:
    """Records the state of values, so that `restore` can set it again in place.

    It follows lists, dicts, sets and tuples to tensors without gradients, arrays, random generators and objects of user
    classes. An object is recorded with everything it leads to, or not at all. One that leads to a lock, a thread, an
    optimizer, a sharding wrapper, or more than a thousand other objects is shared with more than the forward, and is
    left alone. The state of iterators, closures and classes is not recorded.

    Args:
        excluded: Objects that are not recorded, nor followed.
    """

    def __init__(self, excluded: Iterable[Any] = ()) -> None:
        self._seen: dict[int, Any] = {id(value): value for value in excluded}  # references keep the ids from reuse
        self._undo: list[Callable[[], object]] = []
        self._seen_limit = 0  # size of `_seen` at which the object being visited counts as foreign

    def add(self, value: Any) -> None:
        """Record `value`, unless it is recorded already."""
        if type(value) not in _IMMUTABLE_TYPES:
            self._visit(value, 0, strict=False)

    def restore(self) -> None:
        """Set everything to its state at the time it was added."""
        # The last one first: containers are recorded before their contents, and get their items back after these.
        for undo in reversed(self._undo):
            undo()

    def _visit(self, value: Any, depth: int, *, strict: bool) -> None:
        kind = type(value)
        if kind in _IMMUTABLE_TYPES or id(value) in self._seen:
            return
        if strict and len(self._seen) >= self._seen_limit:
            raise _ForeignError
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, np.ndarray):
            self._add_array(value)
        elif kind in _CONTAINERS or isinstance(value, tuple):
            if kind in _CONTAINERS:
                self._undo.append(_container_undo(value))
            self._visit_items(value.values() if isinstance(value, dict) else value, depth, strict=strict)
        elif not self._add_generator(value) and not isinstance(value, _IMMUTABLE):
            self._visit_object(value, depth, strict=strict)

    def _visit_items(self, items: Iterable[Any], depth: int, *, strict: bool) -> None:
        for item in itertools.islice(items, None if strict else _MAX_ITEMS):
            self._visit(item, depth + 1, strict=strict)

    def _visit_object(self, value: Any, depth: int, *, strict: bool) -> None:
        if strict:
            self._visit_attributes(value, depth)
            return
        undo, seen = len(self._undo), len(self._seen)
        self._seen_limit = seen + _MAX_ITEMS
        try:
            self._visit_attributes(value, 0)
        except _ForeignError:
            del self._undo[undo:]
            for key in list(self._seen)[seen:]:  # parts of it may still be reached from the model itself
                del self._seen[key]

    def _visit_attributes(self, value: Any, depth: int) -> None:
        attributes = getattr(value, "__dict__", None)
        slots = {name: getattr(value, name) for name in copyreg._slotnames(type(value)) if hasattr(value, name)}  # type: ignore[attr-defined]  # noqa: SLF001 - as `copy` does
        if (attributes is None and not slots) or _belongs_to_training(value) or depth > _MAX_DEPTH:
            raise _ForeignError
        if type(attributes) is dict:
            self._undo.append(_container_undo(attributes))
            self._visit_items(attributes.values(), depth, strict=True)
        for name, attribute in slots.items():
            self._undo.append(functools.partial(object.__setattr__, value, name, attribute))  # the class may be frozen
        self._visit_items(slots.values(), depth, strict=True)

    def _add_tensor(self, value: Tensor) -> None:
        # Subclasses, such as a DTensor, may communicate when copied; tensors with gradients are the parameters'
        # business.
        if type(value) is not Tensor or value.requires_grad or value.is_inference() or value.layout != torch.strided:
            return
        copy = value.clone()

        def undo() -> None:
            # Through `data`: the version counter must not change, since a user's graph may hold the tensor.
            if value.shape == copy.shape:
                value.data.copy_(copy)
            else:
                value.data = copy

        self._undo.append(undo)

    def _add_array(self, value: np.ndarray[Any, Any]) -> None:
        if value.flags.writeable:
            copy = value.copy()
            self._undo.append(lambda: np.copyto(value, copy))

    def _add_generator(self, value: Any) -> bool:
        """Record the state of `value` if it is a random generator; False if it is not."""
        match value:
            case torch.Generator():
                state = value.get_state()
                self._undo.append(lambda: value.set_state(state))
            case np.random.Generator():
                bits, drawn = value.bit_generator, value.bit_generator.state
                self._undo.append(lambda: setattr(bits, "state", drawn))
            case np.random.RandomState():
                legacy = value.get_state()
                self._undo.append(lambda: value.set_state(legacy))
            case random.Random():
                plain = value.getstate()
                self._undo.append(lambda: value.setstate(plain))
            case _:
                return False
        return True


def _belongs_to_training(value: object) -> bool:
    """Whether `value` is an optimizer or shards the model; those keep their state during a probe."""
    return isinstance(value, torch.optim.Optimizer) or type(value).__module__.startswith("torch.distributed.")


def _container_undo(current: Any) -> Callable[[], None]:
    """A function that gives the container `current` its present items again."""
    saved = current.copy() if current else ()

    def undo() -> None:
        if not saved:
            current.clear()
        elif isinstance(current, dict):
            refill(current, saved)
        elif len(current) != len(saved) or any(one is not other for one, other in zip(current, saved, strict=True)):
            current.clear()
            (current.update if isinstance(current, set) else current.extend)(saved)

    return undo


def refill(current: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Give `current` the items of `saved`, in the same order; do nothing if it has them already."""
    if list(current) == list(saved) and all(current[name] is value for name, value in saved.items()):
        return
    current.clear()
    current.update(saved)
