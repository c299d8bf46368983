"""Packing of arrays on the wire, and the limits of every message; protos/sharpwatch/v1 has the messages themselves.

An array is bytes, dtype and shape, checked before anything is allocated. All checks raise `WireError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import numpy.typing as npt

from sharpwatch.errors import WireError
from sharpwatch.v1.types_pb2 import Array

PROTOCOL = 1
MAX_MESSAGE_BYTES = 16 * 2**20
SKETCH_SIZE = 256
MAX_LAYER_BLOCKS = 16_384
MAX_DRAWS = 64
MAX_NAME = 253  # characters
MAX_DATA_ORDER = 200  # characters
MAX_LABELS = 16  # of a run
RUN_LABELS = ("training_job", "run")  # every run has these by itself, so they can't be a user's
_LABEL = re.compile(r"[a-z][a-z0-9_]{0,62}")
MAX_TEXT = 4_096  # characters
MAX_ITEMS = 256  # results, checkpoints, probe failures, reasons for dropped samples: of each, in one sample
MAX_COUNT = 2**63 - 1  # what SQLite's integers and numpy's int64 hold
MAX_PARAMETER_NAMES = 2**17  # bytes of all names of a model's parameters; each has at most `MAX_NAME` characters
MAX_RANKS = 1_024  # whose own losses are sent
MAX_STEP = 2**53  # so that a step planned ahead, an expiry or the end of a skipped range fits an int64
MAX_INTERVAL = 1_000  # steps between two updates of a block

Floats = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
}


def encode(values: npt.ArrayLike, dtype: str) -> Array:
    """Pack an array.

    Args:
        values: The array.
        dtype: "float32", "float64", "int32" or "int64".

    Returns:
        The message.
    """
    array = np.ascontiguousarray(values, dtype=_DTYPES[dtype])
    return Array(dtype=dtype, shape=array.shape, data=array.tobytes())


def decode(message: Array, *, name: str, dtype: str, shape: Sequence[int | None]) -> npt.NDArray[Any]:
    """Unpack an array.

    Args:
        message: The message.
        name: Name of the field, for errors.
        dtype: The expected dtype.
        shape: The expected size of each dimension; None for any size.

    Returns:
        A read-only view of the message's bytes.

    Raises:
        WireError: With code "malformed": dtype, shape or number of bytes is not as expected.
    """
    if message.dtype != dtype:
        raise WireError("malformed", f"{name}: dtype {message.dtype!r}, expected {dtype!r}")
    got, data, of = tuple(message.shape[:]), message.data, _DTYPES[dtype]  # a slice is twice as fast as iterating
    if got != shape and not _has_shape(got, shape):
        expected = tuple("any" if want is None else want for want in shape)
        raise WireError("malformed", f"{name}: shape {got}, expected {expected}")
    size = math.prod(got) * of.itemsize
    if size != len(data):
        raise WireError("malformed", f"{name}: {len(data)} bytes, expected {size} for shape {got}")
    return np.ndarray(got, of, data)


def _has_shape(got: Sequence[int], shape: Sequence[int | None]) -> bool:
    return len(got) == len(shape) and all(want in {None, have} for have, want in zip(got, shape, strict=True))


def decode_fields(message: Any, dtypes: Mapping[str, str], *, name: str, rows: int) -> dict[str, npt.NDArray[Any]]:
    """Unpack several fields of a message, which all have one value for each of `rows`.

    Args:
        message: The message with the fields.
        dtypes: The dtype of each field.
        name: What errors call the message.
        rows: The size of each array.

    Raises:
        WireError: As `decode`.
    """
    shape = (rows,)
    return {
        field: decode(getattr(message, field), name=f"{name}.{field}", dtype=dtype, shape=shape)
        for field, dtype in dtypes.items()
    }


def wrong_label(name: object, value: object) -> str:
    """What is wrong with a label of a run; empty if nothing is."""
    if not isinstance(name, str) or not _LABEL.fullmatch(name):
        return f"a label's name must be 1 to 63 of a-z, 0-9 and _ and begin with a letter, got {name!r}"
    if name in RUN_LABELS:
        return f"label {name!r} is every run's own; {' and '.join(RUN_LABELS)} can't be given"
    if not isinstance(value, str) or not 0 < len(value) <= MAX_DATA_ORDER or not value.isprintable():
        return f"label {name} must have 1 to {MAX_DATA_ORDER} printable characters, got {value!r}"
    return ""


def require(condition: bool, reason: str, code: str = "malformed") -> None:
    """Raise `WireError(code, reason)` unless `condition` holds."""
    if not condition:
        raise WireError(code, reason)


def checked_name(value: str, what: str) -> str:
    """Return `value` if it is printable and has 1 to `MAX_NAME` characters; `what` is the field's name in errors."""
    require(0 < len(value) <= MAX_NAME, f"{what} must have 1 to {MAX_NAME} characters, got {len(value)}")
    require(value.isprintable(), f"{what} must be printable, got {value!r}")
    return value


def checked_text(value: str, what: str, limit: int = MAX_TEXT) -> str:
    """Return `value` if it has at most `limit` characters; `what` is the field's name in errors."""
    require(len(value) <= limit, f"{what} must have at most {limit} characters, got {len(value)}")
    return value


def require_few(items: Sized, what: str) -> None:
    """Raise `WireError` if `items` has more than `MAX_ITEMS`; `what` is the field's name in errors."""
    require(len(items) <= MAX_ITEMS, f"{what} must have at most {MAX_ITEMS} items, got {len(items)}")
