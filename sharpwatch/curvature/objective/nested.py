"""Tensors within nested values: the arguments of a call and its output."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

_MAX_DEPTH = 20  # a value may contain itself


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in `value`: itself, or in mappings, lists, tuples and dataclasses."""
    return (tensor for tensor, _ in named_tensors(value))


def named_tensors(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[Tensor, str]]:
    """All tensors in `value` with the nearest name above each: a key or a field; `name` is that of `value` itself."""
    if isinstance(value, Tensor):
        yield value, name
    elif depth < _MAX_DEPTH:
        for key, item in _items(value):
            yield from named_tensors(item, str(key) or name, depth + 1)


def tensors_by_path(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[Tensor, str]]:
    """All tensors in `value` with their paths, such as "hidden_states[3]" or "decoder.logits"; `path` is its own."""
    if isinstance(value, Tensor):
        yield value, path
    elif depth < _MAX_DEPTH:
        for index, (key, item) in enumerate(_items(value)):
            place = f"{path}.{key}".lstrip(".") if key else f"{path}[{index}]"
            yield from tensors_by_path(item, place, depth + 1)


def map_tensors(value: Any, change: Callable[[Tensor, str], Tensor], name: str = "", depth: int = 0) -> Any:
    """`value` with `change` applied to its tensors; containers are of the same kind, and new.

    Args:
        value: A tensor, a mapping, list, tuple or dataclass of such values, or anything else, which is passed on.
        change: Called with a tensor and the nearest name above it: a key or a field.
        name: The name of `value` itself.
        depth: How deep it is nested.
    """
    if isinstance(value, Tensor):
        return change(value, name)
    items = _items(value) if depth < _MAX_DEPTH else []
    if not items:
        return value
    mapped = [(key, map_tensors(item, change, str(key) or name, depth + 1)) for key, item in items]
    return _rebuilt(value, mapped)


def _items(value: Any) -> list[tuple[Any, Any]]:
    """What a container holds, by key or field; positions have the name ""."""
    match value:
        case Mapping():
            return [(key, value[key]) for key in value]
        case list() | tuple():
            return [("", item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return []


def _rebuilt(value: Any, items: list[tuple[Any, Any]]) -> Any:
    match value:
        case list():
            return [item for _, item in items]
        case tuple():
            # A named tuple takes its fields one by one.
            values = [item for _, item in items]
            return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
        case Mapping():
            return _mapping(value, dict(items))
    # Not by `replace`: `__init__` may not take every field.
    rebuilt = copy.copy(value)
    for name, item in items:
        object.__setattr__(rebuilt, name, item)
    return rebuilt


def _mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """`items` as a mapping of `value`'s own kind, since a model may ask a BatchEncoding for an attribute."""
    if type(value) is dict:
        return items
    if isinstance(value, dict | UserDict):  # whose copies have items of their own
        rebuilt = copy.copy(value)
        for key, item in items.items():
            rebuilt[key] = item
        return rebuilt
    try:
        return type(value)(items)  # type: ignore[call-arg]
    except (TypeError, ValueError, RuntimeError):
        # A kind that is made in another way; a model that asks for items alone takes a dict as well.
        return items
