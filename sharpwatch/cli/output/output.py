"""Print an answer, either as JSON or as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from sharpwatch.cli.output.tables import Grid, write

_INTEGER_TYPES = frozenset(
    {
        FieldDescriptor.CPPTYPE_INT32,
        FieldDescriptor.CPPTYPE_INT64,
        FieldDescriptor.CPPTYPE_UINT32,
        FieldDescriptor.CPPTYPE_UINT64,
    }
)
_FLOAT_TYPES = frozenset({FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT})


def to_dict(message: Message) -> dict[str, Any]:
    """Convert a message for JSON: the proto's field names, every field present, and numbers as numbers.

    An absent, infinite or nan value becomes None, since JSON has no other value for it.

    Args:
        message: Any message.
    """
    from google.protobuf.json_format import MessageToDict  # noqa: PLC0415 - slow to import, and only JSON needs it

    found = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return _with_numbers(message.DESCRIPTOR, found)


def _with_numbers(descriptor: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: _field(field, found.get(field.name)) for field in descriptor.fields}


def _field(field: FieldDescriptor, value: Any) -> Any:
    entry = field.message_type
    if value is None:
        return None
    if entry is not None and entry.GetOptions().map_entry:
        value_field = entry.fields_by_name["value"]
        return {key: _scalar(value_field, item) for key, item in sorted(value.items())}
    return [_scalar(field, item) for item in value] if isinstance(value, list) else _scalar(field, value)


def _scalar(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return _with_numbers(field.message_type, value)
    if field.cpp_type in _INTEGER_TYPES:
        return int(value)
    if field.cpp_type in _FLOAT_TYPES:
        return float(value) if math.isfinite(float(value)) else None
    return value


def show(payload: Message | dict[str, Any], grids: Sequence[Grid] | str, *, as_json: bool) -> None:
    """Print an answer.

    Args:
        payload: The answer for JSON.
        grids: The answer as tables, or as one line of text.
        as_json: Whether to print the payload rather than the text.
    """
    if as_json:
        import json  # noqa: PLC0415 - as above

        found = to_dict(payload) if isinstance(payload, Message) else payload
        print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    elif isinstance(grids, str):
        print(grids)
    else:
        write(grids)
