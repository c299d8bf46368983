"""Probes as the daemon takes them: their shapes and limits, and what of a probe is not finite.

Each reader returns None for a probe with a number that says nothing: the model's own were not finite. What an agent
can't have meant (a shape, an unknown block, a negative square) raises `WireError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sharpwatch import wire
from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.limits import MAX_COUNT, MAX_DRAWS, MAX_NAME, Floats, checked_text, require
from sharpwatch.v1 import agent_pb2, types_pb2

LARGEST_SKETCH = 1e15  # its square, summed over blocks and a whole sketch, is finite in float32


@dataclass(frozen=True, slots=True, eq=False)
class GnbReading:
    """One gnb probe: traces [draws, L]; sketches [draws, B, k] or None."""

    tokens: int
    traces: Floats
    sketches: Floats | None
    gradient_sketch: Floats | None = None  # [B, k], of the step's mean gradient
    gradient_noise: Floats | None = None  # [B], of the same

    def without_sketches(self) -> GnbReading:
        """Its traces alone, which depend on no projection."""
        return replace(self, sketches=None, gradient_sketch=None)


@dataclass(frozen=True, slots=True, eq=False)
class DirectionReading:
    """One direction probe; arrays are [B], NaN in block_curvature for a block whose turn it was not."""

    tokens: int
    descent: float
    curvature: float
    block_descent: Floats
    block_curvature: Floats
    update_ratio: Floats
    method: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class HutchinsonReading:
    """One probe of one block: traces [draws, L], zero for layer blocks of other types."""

    tokens: int
    block: str
    traces: Floats
    method: str


@dataclass(frozen=True, slots=True)
class LanczosReading:
    """Both ends of one block's spectrum with their residuals; `block` is empty for the whole model."""

    tokens: int
    block: str
    top: float
    top_residual: float
    bottom: float
    bottom_residual: float
    method: str


@dataclass(frozen=True, slots=True, eq=False)
class LineSearchReading:
    """One line search; arrays are [B], NaN for a block whose turn it was not."""

    tokens: int
    sharpness: float
    half_width: float
    block_sharpness: Floats
    block_half_width: Floats


@dataclass(frozen=True, slots=True)
class PreconditionedReading:
    """The top eigenvalue as Adam sees it, in units of the edge."""

    tokens: int
    ratio: float
    residual: float
    method: str


ProbeReading = (
    GnbReading | DirectionReading | HutchinsonReading | LanczosReading | LineSearchReading | PreconditionedReading
)


def read_probes(manifest: RunHello, sample: agent_pb2.Sample) -> dict[str, Any]:
    """The probes that `sample` has, by name: each one's own reading, or None where it says nothing."""
    given = {field.name: message for field, message in sample.ListFields() if field.name in PROBES}
    for probe, message in given.items():
        require(0 < message.tokens <= MAX_COUNT, f"{probe}.tokens: {message.tokens}")
    return {probe: PROBES[probe](message, manifest) for probe, message in given.items()}


def _gnb(probe: agent_pb2.GnbProbe, manifest: RunHello) -> GnbReading | None:
    traces = _draws(probe.traces, "gnb.traces", manifest)
    require(bool((np.isnan(traces) | (traces >= 0)).all()), "gnb.traces: a squared norm below zero")
    shape = (len(manifest.blocks), manifest.sketch_size)
    sketches = gradient = None
    if probe.HasField("sketches"):
        sketches = wire.decode(probe.sketches, name="gnb.sketches", dtype="float32", shape=(len(traces), *shape))
    if probe.HasField("gradient_sketch"):
        gradient = wire.decode(probe.gradient_sketch, name="gnb.gradient_sketch", dtype="float32", shape=shape)
    # One that is so large that its square is not finite would spoil others: the runs are estimated together.
    small = all((np.abs(each) <= LARGEST_SKETCH).all() for each in (sketches, gradient) if each is not None)
    if not small or not _finite(traces):
        return None
    return GnbReading(probe.tokens, traces, sketches, gradient, _gradient_noise(probe, manifest))


def _gradient_noise(probe: agent_pb2.GnbProbe, manifest: RunHello) -> Floats | None:
    """By block [B], NaN where one of its layer blocks has none."""
    if not probe.HasField("gradient_noise"):
        return None
    shape = (len(manifest.layer_blocks),)
    noise = wire.decode(probe.gradient_noise, name="gnb.gradient_noise", dtype="float32", shape=shape)
    if np.isinf(noise).any():
        return None
    by_block = np.zeros(len(manifest.blocks))
    np.add.at(by_block, manifest.block_of, noise)
    return by_block


def _direction(probe: agent_pb2.DirectionProbe, manifest: RunHello) -> DirectionReading | None:
    descent = _by_block(probe.block_descent, "direction.block_descent", manifest)
    curvature = _by_block(probe.block_curvature, "direction.block_curvature", manifest)
    ratio = _by_block(probe.update_ratio, "direction.update_ratio", manifest, "float32")
    method = checked_text(probe.method, "direction.method", MAX_NAME)
    if not _finite(probe.descent, probe.curvature, descent, ratio) or np.isinf(curvature).any():
        return None
    return DirectionReading(probe.tokens, probe.descent, probe.curvature, descent, curvature, ratio, method)


def _hutchinson(probe: agent_pb2.HutchinsonProbe, manifest: RunHello) -> HutchinsonReading | None:
    block = _block(probe.block, "hutchinson.block", manifest)
    traces = _draws(probe.traces, "hutchinson.traces", manifest)
    others = manifest.block_of != manifest.blocks.index(block)
    require(not traces[:, others].any(), f"hutchinson.traces: not zero outside {block}")
    method = checked_text(probe.method, "hutchinson.method", MAX_NAME)
    return HutchinsonReading(probe.tokens, block, traces, method) if _finite(traces) else None


def _lanczos(probe: agent_pb2.LanczosProbe, manifest: RunHello) -> LanczosReading | None:
    block = _block(probe.block, "lanczos.block", manifest) if probe.block else ""
    ends = (probe.top, probe.top_residual, probe.bottom, probe.bottom_residual)
    require(not (probe.top_residual < 0 or probe.bottom_residual < 0), "lanczos: a residual below zero")
    require(not probe.bottom > probe.top, "lanczos: the smallest eigenvalue above the largest")
    method = checked_text(probe.method, "lanczos.method", MAX_NAME)
    return LanczosReading(probe.tokens, block, *ends, method) if _finite(*ends) else None


def _linesearch(probe: agent_pb2.LineSearchProbe, manifest: RunHello) -> LineSearchReading | None:
    sharpness = _by_block(probe.block_sharpness, "linesearch.block_sharpness", manifest)
    half_width = _by_block(probe.block_half_width, "linesearch.block_half_width", manifest)
    whole = (probe.sharpness, probe.half_width)
    below = min(whole) < 0 or (sharpness < 0).any() or (half_width < 0).any()
    require(not below, "linesearch: a sharpness or a width below zero")
    if not _finite(*whole) or np.isinf(sharpness).any() or np.isinf(half_width).any():
        return None
    return LineSearchReading(probe.tokens, *whole, sharpness, half_width)


def _preconditioned(probe: agent_pb2.PreconditionedProbe, manifest: RunHello) -> PreconditionedReading | None:
    del manifest
    require(not probe.residual < 0, "preconditioned: a residual below zero")
    method = checked_text(probe.method, "preconditioned.method", MAX_NAME)
    if not _finite(probe.ratio, probe.residual):
        return None
    return PreconditionedReading(probe.tokens, probe.ratio, probe.residual, method)


PROBES: Mapping[str, Callable[[Any, RunHello], ProbeReading | None]] = {
    "gnb": _gnb,
    "direction": _direction,
    "hutchinson": _hutchinson,
    "lanczos": _lanczos,
    "linesearch": _linesearch,
    "preconditioned": _preconditioned,
}


def _draws(array: types_pb2.Array, what: str, manifest: RunHello) -> Floats:
    values = wire.decode(array, name=what, dtype="float64", shape=(None, len(manifest.layer_blocks)))
    require(0 < len(values) <= MAX_DRAWS, f"{what}: {len(values)} draws, expected 1 to {MAX_DRAWS}")
    return values


def _by_block(array: types_pb2.Array, what: str, manifest: RunHello, dtype: str = "float64") -> Floats:
    return wire.decode(array, name=what, dtype=dtype, shape=(len(manifest.blocks),))


def _block(block: str, what: str, manifest: RunHello) -> str:
    require(block in manifest.blocks, f"{what}: {block[:MAX_NAME]!r}, expected one of {list(manifest.blocks)}")
    return block


def _finite(*values: float | Floats) -> bool:
    return all(bool(np.isfinite(each).all()) for each in values)
