"""What every message is held to: limits on what it carries, and how it is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sharpwatch.errors import WireError

Floats = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_LAYER_BLOCKS = 16_384
MAX_DRAWS = 64
MAX_NAME = 253
MAX_TEXT = 4_096
MAX_ITEMS = 256  # results, checkpoints, failures, reasons: each, in one sample
MAX_COUNT = 2**63 - 1  # SQLite's integers and numpy's int64
MAX_STEP = 2**53  # what is planned ahead of a step, an expiry or a range to skip, has still to fit an int64


def require(condition: bool, reason: str, code: str = "malformed") -> None:
    """Refuse the message with `reason` unless `condition` holds."""
    if not condition:
        raise WireError(code, reason)


def checked_name(value: str, what: str) -> str:
    """`value`, if it can be a name."""
    require(0 < len(value) <= MAX_NAME, f"{what}: {len(value)} characters, expected 1 to {MAX_NAME}")
    require(value.isprintable(), f"{what}: holds characters that can't be printed")
    return value


def checked_text(value: str, what: str, limit: int = MAX_TEXT) -> str:
    """`value`, if it is not too long."""
    require(len(value) <= limit, f"{what}: {len(value)} characters, at most {limit}")
    return value


def few(items: Sequence[Any] | Mapping[Any, Any], what: str) -> None:
    """Refuse more items than one message may have."""
    require(len(items) <= MAX_ITEMS, f"{what}: {len(items)} of them, at most {MAX_ITEMS}")
