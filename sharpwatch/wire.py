"""Arrays on the wire as bytes, dtype and shape, which are checked before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sharpwatch.errors import WireError
from sharpwatch.v1.types_pb2 import Array

PROTOCOL = 1
MAX_MESSAGE_BYTES = 16 * 2**20
SKETCH_SIZE = 256
_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float64": np.dtype("<f8"), "int64": np.dtype("<i8")}


def encode(values: npt.ArrayLike, dtype: str) -> Array:
    """Pack an array.

    Args:
        values: The array.
        dtype: "float32", "float64" or "int64".

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
    got = tuple(message.shape)
    if len(got) != len(shape) or any(want is not None and have != want for have, want in zip(got, shape, strict=True)):
        expected = tuple("any" if want is None else want for want in shape)
        raise WireError("malformed", f"{name}: shape {got}, expected {expected}")
    size = math.prod(got) * _DTYPES[dtype].itemsize
    if size != len(message.data):
        raise WireError("malformed", f"{name}: {len(message.data)} bytes, expected {size} for shape {got}")
    return np.frombuffer(message.data, dtype=_DTYPES[dtype]).reshape(got)
