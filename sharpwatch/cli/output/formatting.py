"""Numbers and times as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal

from sharpwatch.v1.types_pb2 import Estimate

ABSENT = "–"
_DIGITS = 6  # of a value at most, however small its error
_PLAIN = (1e-3, 1e5)  # sizes written without an exponent


def number(value: float, digits: int = 4) -> str:
    """`value` to `digits` significant digits."""
    return f"{value:.{digits}g}"


def optional(value: float | None) -> str:
    """`number`, or a dash for what was not measured."""
    return ABSENT if value is None else number(value)


def with_error(value: float, stderr: float) -> str:
    """`3.4e-09 ± 2e-10`: the error to one digit, the value to the error's place and at least one digit.

    An error that is not known (one draw) is written `?`, and the value to three digits.
    """
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
    """An estimate with its error, or a dash."""
    return ABSENT if message is None else with_error(message.value, message.stderr)


def percent(ratio: float) -> str:
    """A ratio as a percentage of two digits."""
    return f"{number(100 * ratio, 2)} %"


def timestamp(unix_ns: int) -> str:
    """Seconds of UTC, or a dash for 0."""
    if not unix_ns:
        return ABSENT
    return datetime.fromtimestamp(unix_ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def age(unix_ns: int, now: float) -> str:
    """How long before `now` (unix seconds) that was, in its largest unit."""
    if not unix_ns:
        return "never"
    passed = now - unix_ns / 1e9
    if passed < 0:
        return f"{span(-passed)} ahead of this clock" if passed < -1 else "now"
    return f"{span(passed)} ago"


def span(duration: float) -> str:
    """A duration in seconds, in its largest unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if duration >= 2 * size:
            return f"{duration / size:.0f} {unit}"
    return f"{duration:.0f} s"


def multipliers(values: Mapping[str, float], named: Mapping[str, float] | None = None) -> str:
    """The blocks that stand at another multiplier than 1, and those `named`: `emb 2, qk 0.5`."""
    shown = {block: value for block, value in values.items() if value != 1 or block in (named or ())}
    return ", ".join(f"{block} {value:g}" for block, value in sorted(shown.items())) or "every block 1"
