"""Decodes the probes of a sample and checks their shapes, limits and numbers.

`DECODERS` has a decoder for each field of a Sample that is a probe. A decoder returns None if a number is not finite,
because the model's own numbers were not; the probe is then dropped and counted. It raises `WireError` for what no
correct agent sends: a wrong shape, an unknown block, a negative square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sharpwatch import wire
from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.errors import WireError
from sharpwatch.v1 import agent_pb2, types_pb2
from sharpwatch.wire import MAX_COUNT, MAX_DRAWS, MAX_NAME, Doubles, Floats, checked_text, require

LARGEST_SKETCH = 1e15  # summed over all blocks and entries of a sketch, its square is finite in float32


@dataclass(frozen=True, slots=True, eq=False)
class GnbReading:
    """One gnb probe: traces [draws, L]; sketches [draws, B, k] or None."""

    tokens: int
    traces: Floats
    sketches: Floats | None
    gradient_sketch: Floats | None = None  # [B, k], of the step's mean gradient


@dataclass(frozen=True, slots=True, eq=False)
class DirectionReading:
    """One direction probe; arrays are [B], with NaN in block_curvature for a block that was not probed."""

    tokens: int
    descent: float
    curvature: float
    block_descent: Floats
    block_curvature: Floats
    update_ratio: Floats
    method: str = ""
    curvature_parts: Floats | None = None  # each block's part of the curvature; None of older agents


@dataclass(frozen=True, slots=True, eq=False)
class HutchinsonReading:
    """One probe of one block: its traces [draws], summed over its layers."""

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
    """One line search; arrays are [B], with NaN for a block that was not probed."""

    tokens: int
    sharpness: float
    half_width: float
    block_sharpness: Floats
    block_half_width: Floats


@dataclass(frozen=True, slots=True)
class PreconditionedReading:
    """The top eigenvalue of the Hessian preconditioned by Adam, over the largest that its learning rates allow."""

    tokens: int
    ratio: float
    residual: float
    method: str


@dataclass(frozen=True, slots=True, eq=False)
class GradientNoiseReading:
    """The gradient noise by block [B], NaN where a layer block has none; None if the step has none."""

    noise: Floats | None


def read_probes(hello: RunHello, sample: agent_pb2.Sample) -> dict[str, Any]:
    """Decodes the probes of a sample.

    Args:
        hello: The Hello of the sample's attempt.
        sample: The sample.

    Returns:
        By name the reading of each probe in the sample, or None for one that is to be dropped.

    Raises:
        WireError: A probe breaks a limit.
    """
    given = [probe for probe in DECODERS if sample.HasField(probe)]  # type: ignore[arg-type]  # a field's name
    found = {probe: DECODERS[probe](getattr(sample, probe), hello) for probe in given}
    if found.get("gnb") is not None and "gradient_noise" not in hello.probes:
        found["gradient_noise"] = _older_gradient_noise(sample.gnb, hello)
    return found


def read_attention(hello: RunHello, attention: agent_pb2.AttentionReading) -> Doubles | None:
    """Decodes the scale of attention logits by layer block [L], NaN where there is none.

    Args:
        hello: The Hello of the sample's attempt.
        attention: The message.

    Returns:
        The scales, or None if one of them is infinite.

    Raises:
        WireError: They break a limit.
    """
    what = "attention.logit_scale"
    scales = wire.decode(attention.logit_scale, name=what, dtype="float32", shape=(len(hello.layer_blocks),))
    require(not (scales < 0).any(), f"{what} must not be negative")
    others = np.array([block != "qk" for block, _ in hello.layer_blocks])
    require(bool(np.isnan(scales[others]).all()), f"{what} must be NaN outside qk")
    # A copy, so that what keeps it does not keep the whole message.
    return None if np.isinf(scales).any() else scales.astype(np.float64)


def _gnb(probe: agent_pb2.GnbProbe, hello: RunHello) -> GnbReading | None:
    tokens = _tokens(probe, "gnb")
    traces = _draws(probe.traces, "gnb.traces", hello)
    # A NaN passes here, because it is the model's doing: it drops the probe below, and is no breach of contract.
    require(not np.count_nonzero(traces < 0), "gnb.traces must not be negative")
    shape = (len(hello.blocks), hello.sketch_size)
    sketches = gradient = None
    if probe.HasField("sketches"):
        sketches = wire.decode(probe.sketches, name="gnb.sketches", dtype="float32", shape=(len(traces), *shape))
    if probe.HasField("gradient_sketch"):
        gradient = wire.decode(probe.gradient_sketch, name="gnb.gradient_sketch", dtype="float32", shape=shape)
    # Runs are estimated together: a sketch whose square is not finite would damage the estimates of others.
    if not all(_is_small(each) for each in (sketches, gradient) if each is not None) or not _finite(traces):
        return None
    return GnbReading(tokens, traces, sketches, gradient)


def _is_small(sketch: Floats) -> bool:
    # By two reductions, which pass a NaN on, and without an array of absolute values.
    return not sketch.size or bool(sketch.min() >= -LARGEST_SKETCH and sketch.max() <= LARGEST_SKETCH)


def _gradient_noise(probe: agent_pb2.GradientNoiseProbe, hello: RunHello) -> GradientNoiseReading | None:
    if not probe.HasField("noise"):
        return GradientNoiseReading(None)
    noise = _noise_by_block(probe.noise, "gradient_noise.noise", hello)
    return None if noise is None else GradientNoiseReading(noise)


def _older_gradient_noise(probe: agent_pb2.GnbProbe, hello: RunHello) -> GradientNoiseReading:
    """Reads the noise in the gnb probe of an older agent, for which gradient noise is no probe of its own."""
    if not probe.HasField("gradient_noise"):
        return GradientNoiseReading(None)
    return GradientNoiseReading(_noise_by_block(probe.gradient_noise, "gnb.gradient_noise", hello))


def _noise_by_block(array: types_pb2.Array, what: str, hello: RunHello) -> Floats | None:
    """Sums the noise over the layers of each block; None if an entry is infinite."""
    noise = wire.decode(array, name=what, dtype="float32", shape=(len(hello.layer_blocks),))
    return None if np.isinf(noise).any() else _summed(noise, hello)


def _summed(by_layer: Floats, hello: RunHello) -> Floats:
    """Sums values of layer blocks [L] over the layers of each block [B]."""
    by_block = np.zeros(len(hello.blocks))
    # `add.at`, because `by_block[block_of] += by_layer` would keep one row of each block.
    np.add.at(by_block, hello.block_of, by_layer)
    return by_block


def _direction(probe: agent_pb2.DirectionProbe, hello: RunHello) -> DirectionReading | None:
    tokens = _tokens(probe, "direction")
    descent = _by_block(probe.block_descent, "direction.block_descent", hello)
    curvature = _by_block(probe.block_curvature, "direction.block_curvature", hello)
    ratio = _by_block(probe.update_ratio, "direction.update_ratio", hello, "float32")
    method = checked_text(probe.method, "direction.method", MAX_NAME)
    if not _finite(probe.descent, probe.curvature, descent, ratio) or np.isinf(curvature).any():
        return None
    parts = None
    if probe.HasField("curvature_parts"):
        by_layer = wire.decode(
            probe.curvature_parts, name="direction.curvature_parts", dtype="float64", shape=(len(hello.layer_blocks),)
        )
        parts = _summed(by_layer, hello)
        if not _finite(parts):
            return None
    return DirectionReading(tokens, probe.descent, probe.curvature, descent, curvature, ratio, method, parts)


def _hutchinson(probe: agent_pb2.HutchinsonProbe, hello: RunHello) -> HutchinsonReading | None:
    tokens = _tokens(probe, "hutchinson")
    block = _block(probe.block, "hutchinson.block", hello)
    traces = _draws(probe.traces, "hutchinson.traces", hello)
    others = hello.block_of != hello.blocks.index(block)
    # Random signs in other blocks too would add the off-diagonal Hessian to the variance: to 1000 times for `norm`.
    require(not traces[:, others].any(), f"hutchinson.traces must be zero outside {block}")
    method = checked_text(probe.method, "hutchinson.method", MAX_NAME)
    # Summed here: a window has 56 of these, whose traces by layer can take 8 MB each.
    with np.errstate(over="ignore", invalid="ignore"):
        summed = traces.sum(1)
    return HutchinsonReading(tokens, block, summed, method) if _finite(summed) else None


def _lanczos(probe: agent_pb2.LanczosProbe, hello: RunHello) -> LanczosReading | None:
    tokens = _tokens(probe, "lanczos")
    block = _block(probe.block, "lanczos.block", hello) if probe.block else ""
    ends = (probe.top, probe.top_residual, probe.bottom, probe.bottom_residual)
    # Written with `not`, so that a NaN passes and drops the probe instead of refusing the sample.
    require(not (probe.top_residual < 0 or probe.bottom_residual < 0), "lanczos residuals must not be negative")
    require(not probe.bottom > probe.top, "lanczos.bottom must be at most lanczos.top")
    method = checked_text(probe.method, "lanczos.method", MAX_NAME)
    return LanczosReading(tokens, block, *ends, method) if _finite(*ends) else None


def _linesearch(probe: agent_pb2.LineSearchProbe, hello: RunHello) -> LineSearchReading | None:
    tokens = _tokens(probe, "linesearch")
    sharpness = _by_block(probe.block_sharpness, "linesearch.block_sharpness", hello)
    half_width = _by_block(probe.block_half_width, "linesearch.block_half_width", hello)
    whole = (probe.sharpness, probe.half_width)
    # As above, a NaN compares false; in the arrays it means a block that was not probed.
    below = min(whole) < 0 or (sharpness < 0).any() or (half_width < 0).any()
    require(not below, "linesearch sharpness and half-width must not be negative")
    if not _finite(*whole) or np.isinf(sharpness).any() or np.isinf(half_width).any():
        return None
    return LineSearchReading(tokens, *whole, sharpness, half_width)


def _preconditioned(probe: agent_pb2.PreconditionedProbe, hello: RunHello) -> PreconditionedReading | None:
    tokens = _tokens(probe, "preconditioned")
    del hello
    require(not probe.residual < 0, "preconditioned.residual must not be negative")
    method = checked_text(probe.method, "preconditioned.method", MAX_NAME)
    if not _finite(probe.ratio, probe.residual):
        return None
    return PreconditionedReading(tokens, probe.ratio, probe.residual, method)


DECODERS: dict[str, Callable[[Any, RunHello], Any]] = {
    "gnb": _gnb,
    "direction": _direction,
    "hutchinson": _hutchinson,
    "lanczos": _lanczos,
    "linesearch": _linesearch,
    "preconditioned": _preconditioned,
    "gradient_noise": _gradient_noise,
}


def _tokens(probe: Any, name: str) -> int:
    tokens: int = probe.tokens
    if not 0 < tokens <= MAX_COUNT:
        raise WireError("malformed", f"{name}.tokens must be 1 to 2**63 - 1, got {tokens}")
    return tokens


def _draws(array: types_pb2.Array, what: str, hello: RunHello) -> Floats:
    values = wire.decode(array, name=what, dtype="float64", shape=(None, len(hello.layer_blocks)))
    require(0 < len(values) <= MAX_DRAWS, f"{what} must have 1 to {MAX_DRAWS} draws, got {len(values)}")
    return values


def _by_block(array: types_pb2.Array, what: str, hello: RunHello, dtype: str = "float64") -> Floats:
    return wire.decode(array, name=what, dtype=dtype, shape=(len(hello.blocks),))


def _block(block: str, what: str, hello: RunHello) -> str:
    require(block in hello.blocks, f"{what} must be one of {list(hello.blocks)}, got {block[:MAX_NAME]!r}")
    return block


def _finite(*values: float | Floats) -> bool:
    return all(np.count_nonzero(np.isfinite(each)) == np.size(each) for each in values)
