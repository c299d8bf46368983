"""The state of a run's baselines as bytes, so that a daemon that restarts goes on where it was."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]


def gathered(source: object, names: Sequence[str], prefix: str) -> Arrays:
    """Numbers and arrays among the attributes of `source`, each under `prefix` and its name."""
    return {f"{prefix}.{name}": np.array(getattr(source, name)) for name in names}


def put_back(target: object, names: Sequence[str], arrays: Mapping[str, npt.NDArray[Any]], prefix: str) -> None:
    """Set the attributes that `gathered` took.

    Raises:
        ValueError: One is missing, or of another shape or type than the present one.
    """
    for name in names:
        now, new = getattr(target, name), arrays.get(f"{prefix}.{name}")
        like = np.array(now)
        if new is None or new.shape != like.shape or new.dtype != like.dtype:
            raise ValueError(f"the state has no {prefix}.{name} of shape {like.shape} and type {like.dtype}")
        setattr(target, name, new.copy() if isinstance(now, np.ndarray) else new.item())


def packed(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Arrays as the bytes of an npz file."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub takes the names for its own arguments
    return file.getvalue()


def unpacked(data: bytes) -> Arrays:
    """The arrays of `packed`.

    Raises:
        ValueError: The bytes are not those of such a file.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"not the state of a run's baselines: {error}") from error
