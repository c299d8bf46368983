"""Format numbers and times for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime

from sharpwatch.v1.types_pb2 import Estimate

ABSENT = "–"
_DIGITS = 6  # at most, however small the error
_PLAIN = (1e-3, 1e5)  # values between these are written without an exponent


def number(value: float, digits: int = 4) -> str:
    """Format `value` to `digits` significant digits."""
    return f"{value:.{digits}g}"


def optional(value: float | None) -> str:
    """Format a value, or a dash for one that was not measured."""
    return ABSENT if value is None else number(value)


def with_error(value: float, stderr: float) -> str:
    """Format a value with its standard error, such as `3.4e-09 ± 2e-10`.

    The error has one digit; the value ends at the error's place, with one digit at least. An unknown error (of a
    single draw) is written `?`, and the value to three digits.

    Args:
        value: The value.
        stderr: Its standard error; nan or inf if unknown.
    """
    from decimal import Decimal  # noqa: PLC0415 - slow to import, and only errors need it

    if not math.isfinite(value):
        return number(value)
    if not (math.isfinite(stderr) and stderr >= 0):
        return f"{number(value, 3)} ± ?"
    if stderr == 0:
        return f"{number(value, _DIGITS)} ± 0"
    error = Decimal(f"{stderr:.0e}")
    place = error.adjusted()
    if value:
        size = Decimal(f"{value:e}").adjusted()
        place = min(size, max(place, size - _DIGITS + 1))
    rounded = Decimal(repr(float(value))).quantize(Decimal(1).scaleb(place))
    if _PLAIN[0] <= max(abs(value), stderr) < _PLAIN[1]:
        return f"{rounded:f} ± {error:f}" if error.adjusted() >= place else f"{rounded:f} ± {stderr:.0e}"
    shown = max(0, rounded.adjusted() - place) if rounded else 0
    return f"{float(rounded):.{shown}e} ± {stderr:.0e}"


def estimate(message: Estimate | None) -> str:
    """Format an estimate with its error, or a dash."""
    return ABSENT if message is None else with_error(message.value, message.stderr)


def percent(ratio: float) -> str:
    """Format a ratio as a percentage with two digits."""
    return f"{number(100 * ratio, 2)} %"


def timestamp(unix_ns: int) -> str:
    """Format a time in UTC to the second, or a dash for 0."""
    if not unix_ns:
        return ABSENT
    return datetime.fromtimestamp(unix_ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def age(unix_ns: int, now: float) -> str:
    """Format the time that passed until `now` (unix seconds), in its largest unit."""
    if not unix_ns:
        return "never"
    passed = now - unix_ns / 1e9
    if passed < 0:
        return f"{span(-passed)} ahead of this clock" if passed < -1 else "now"
    return f"{span(passed)} ago"


def span(duration: float) -> str:
    """Format a duration, given in seconds, in its largest unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if duration >= 2 * size:
            return f"{duration / size:.0f} {unit}"
    return f"{duration:.0f} s"


def multipliers(values: Mapping[str, float], requested: Mapping[str, float] | None = None) -> str:
    """Format multipliers, such as `emb 2, qk 0.5`.

    Args:
        values: The multiplier of each block; only those other than 1 are shown.
        requested: Blocks to show in any case.
    """
    shown = {block: value for block, value in values.items() if value != 1 or block in (requested or ())}
    return ", ".join(f"{block} {value:g}" for block, value in sorted(shown.items())) or "every block 1"
