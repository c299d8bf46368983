"""Where the next probe goes: where the error is."""

from __future__ import annotations

import math
from collections.abc import Mapping


def relative_error(value: float, stderr: float) -> float:
    """`stderr` over |`value`|; infinite where either says nothing, and 0 for an exact zero."""
    if not (math.isfinite(stderr) and math.isfinite(value)):
        return math.inf
    if stderr == 0:
        return 0.0
    return stderr / abs(value) if value != 0 else math.inf


def worst(relative_errors: Mapping[str, float]) -> str:
    """The name with the largest relative error, the first of equals; one that is not measured yet has an infinite one.

    Raises `ValueError` for none.
    """
    return max(
        relative_errors, key=lambda name: math.inf if math.isnan(relative_errors[name]) else relative_errors[name]
    )
