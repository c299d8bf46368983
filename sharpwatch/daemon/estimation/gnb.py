"""Estimates from the windows of `gnb` probes, of all runs in one batch on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from sharpwatch.blocks import SHARPNESS_ORDER
from sharpwatch.curvature.statistics.estimate import Estimate, per_parameter
from sharpwatch.curvature.statistics.gnb_eigenvalues import (
    alignments,
    drifts,
    effective_ranks,
    sketch_moments,
    top_eigenvalues,
)
from sharpwatch.curvature.statistics.pooling import trace_estimates
from sharpwatch.daemon.estimation.windows import (
    WINDOW_PROBES,
    BatchShape,
    EstimateRequest,
    Estimates,
    Key,
    ReadingSpec,
)
from sharpwatch.daemon.ingest.hello import RunHello
from sharpwatch.daemon.ingest.probes import GnbReading
from sharpwatch.wire import Doubles, Floats

_SPECTRAL = ("top_eigenvalue", "effective_rank", "drift", "alignment")  # quantities estimated from sketches


def order_correlation(sharpness: Mapping[str, float]) -> float | None:
    """Returns the Spearman correlation of sharpness with `SHARPNESS_ORDER`, or None for fewer than three blocks."""
    # `head` and `other` have no place in the paper's order.
    present = [block for block in SHARPNESS_ORDER if math.isfinite(sharpness.get(block, math.nan))]
    n = len(present)
    if n < 3:
        return None
    ranks = {block: rank for rank, block in enumerate(sorted(present, key=sharpness.__getitem__))}
    distance = sum((rank - ranks[block]) ** 2 for rank, block in enumerate(present))
    return 1.0 - 6.0 * distance / (n * (n**2 - 1))


def estimate_gnb(requests: Sequence[EstimateRequest], device: str) -> list[Estimates]:
    """Estimate traces, spectra and layer sharpness; an estimate whose error is not known yet is left out."""
    traces, spectra = _traces(requests, device), _spectra(requests, device)
    return [_estimates(*each) for each in zip(requests, traces, spectra, strict=True)]


def _estimates(request: EstimateRequest, traces: Sequence[Estimate], spectra: Mapping[Key, Estimate]) -> Estimates:
    """Put together the estimates of one run; `traces` are those of its layer blocks, then of its blocks."""
    hello = request.hello
    layers = len(hello.layer_blocks)
    values: dict[Key, Estimate] = {}
    sharpness: dict[str, float] = {}
    for block, numel, trace in zip(hello.blocks, hello.block_parameters, traces[layers:], strict=True):
        # Nothing is shown or stored without its error, and a single draw has none.
        if math.isfinite(trace.stderr):
            average = per_parameter(trace, int(numel))
            values["trace", block, "gnb"], values["sharpness", block, "gnb"] = trace, average
            sharpness[block] = average.value
    by_layer = zip(traces[:layers], hello.parameters, strict=True)
    layer_sharpness = tuple(per_parameter(trace, int(numel)) for trace, numel in by_layer)
    return Estimates({**values, **spectra}, layer_sharpness, order_correlation(sharpness))


def _traces(requests: Sequence[EstimateRequest], device: str) -> list[list[Estimate]]:
    """Returns for each request the traces of its layer blocks, then those of its blocks."""
    windows = [_trace_windows(request) for request in requests]
    width = max(window.shape[2] for window in windows)
    probes = max(window.shape[1] for window in windows)
    # Runs differ in probes and draws. Padded to one array, they are one call on the device instead of one for each.
    padded = np.concatenate(
        [
            np.pad(
                window,
                ((0, 0), (0, probes - window.shape[1]), (0, width - window.shape[2])),
                constant_values=np.nan,
            )
            for window in windows
        ]
    )
    traces = torch.from_numpy(padded).to(device)
    mask = ~traces.isnan()
    found = trace_estimates(traces.nan_to_num(), mask)
    rows = iter(zip(found.value.tolist(), found.stderr.tolist(), found.draws.tolist(), strict=True))
    return [
        [Estimate(*next(rows), "gnb", request.windows["gnb"][-1][0]) for _ in range(len(window))]
        for request, window in zip(requests, windows, strict=True)
    ]


def _trace_windows(request: EstimateRequest) -> Doubles:
    """Returns [L + B, probes, draws], with NaN where a probe has fewer draws than another."""
    width = max(len(probe.traces) for _, probe in request.windows["gnb"])
    traces = np.full((len(request.windows["gnb"]), width, len(request.hello.layer_blocks)), np.nan)
    for index, (_, probe) in enumerate(request.windows["gnb"]):
        traces[index, : len(probe.traces)] = probe.traces
    # Layers are summed draw by draw, before pooling: their traces within one draw are correlated, and errors
    # that were added up afterwards would be wrong.
    return np.concatenate([traces, sum_layers(request.hello, traces)], axis=2).transpose(2, 0, 1)


def sum_layers(hello: RunHello, values: Doubles) -> Doubles:
    """Returns the sums of `values` [..., L] over the layers of each block type, [..., B]."""
    membership = hello.block_of[:, None] == np.arange(len(hello.blocks))
    with np.errstate(over="ignore", invalid="ignore"):  # what a float can't hold has no finite error, and is left out
        summed: Doubles = values @ membership
    return summed


def _spectra(requests: Sequence[EstimateRequest], device: str) -> list[Mapping[Key, Estimate]]:
    """Returns for each request the estimates from its sketches: by block, and of the whole model under ""."""
    found: list[Mapping[Key, Estimate]] = [{} for _ in requests]
    by_size: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        if any(probe.sketches is not None for _, probe in request.windows["gnb"]):
            # Only sketches of one size can be stacked.
            by_size.setdefault(request.hello.sketch_size, []).append(index)
    for size, members in by_size.items():
        some = _spectra_of_one_size([requests[index] for index in members], size, device)
        for index, one in zip(members, some, strict=True):
            found[index] = one
    return found


def _spectra_of_one_size(requests: Sequence[EstimateRequest], size: int, device: str) -> list[Mapping[Key, Estimate]]:
    windows = _sketch_windows(requests, size)
    sketches, mask, gradients = (torch.from_numpy(each).to(device) for each in windows)
    tops = top_eigenvalues(sketches, mask)
    moments = sketch_moments(sketches, mask, gradients)
    quantities = (tops, effective_ranks(moments, tops.value), drifts(moments), alignments(moments))
    # Stacked first, so that a GPU is waited for once and not for every quantity.
    columns = torch.stack([column for one in quantities for column in (one.value, one.stderr)]).tolist()
    rows = zip(tops.draws.tolist(), tops.upper_bound.tolist(), *columns, strict=True)
    return [_spectrum(request, rows) for request in requests]


def _spectrum(request: EstimateRequest, rows: Iterator[tuple[float, ...]]) -> Mapping[Key, Estimate]:
    """Estimates of one run from the next of `rows`, one for each block and one for the whole model."""
    step = request.windows["gnb"][-1][0]
    values: dict[Key, Estimate] = {}
    for block in (*request.hello.blocks, ""):
        draws, bound, *columns = next(rows)
        for quantity, value, stderr in zip(_SPECTRAL, columns[::2], columns[1::2], strict=True):
            # In a short window noise alone can make the largest eigenvalue, which then only bounds the true one.
            estimator = "gnb_upper_bound" if bound and quantity == "top_eigenvalue" else "gnb"
            if math.isfinite(stderr):
                values[quantity, block, estimator] = Estimate(value, stderr, int(draws), estimator, step)
    return values


def _sketch_windows(requests: Sequence[EstimateRequest], size: int) -> tuple[Floats, npt.NDArray[np.bool_], Floats]:
    """Stacks the windows of all runs: W has the blocks of a run, then its whole model, then the next run.

    Returns:
        Sketches [W, probes, draws, k], a mask of the draws [W, probes, draws] and gradient sketches [W, probes, k];
        zeros where a probe, a draw or a gradient is missing.
    """
    probes = max(len(request.windows["gnb"]) for request in requests)
    width = max(len(probe.traces) for request in requests for _, probe in request.windows["gnb"])
    rows = sum(len(request.hello.blocks) + 1 for request in requests)
    sketches = np.zeros((rows, probes, width, size), dtype=np.float32)
    gradients = np.zeros((rows, probes, size), dtype=np.float32)
    mask = np.zeros(sketches.shape[:3], dtype=bool)
    row = 0
    for request in requests:
        whole = row + len(request.hello.blocks)
        for index, (_, probe) in enumerate(request.windows["gnb"]):
            if probe.sketches is not None:
                draws = len(probe.sketches)
                # All blocks are hashed by one index, so the sketch of the whole gradient is the sum of theirs.
                sketches[row:whole, index, :draws] = probe.sketches.transpose(1, 0, 2)
                sketches[whole, index, :draws] = probe.sketches.sum(1)
                mask[row : whole + 1, index, :draws] = True
            if probe.gradient_sketch is not None:
                gradients[row:whole, index] = probe.gradient_sketch
                gradients[whole, index] = probe.gradient_sketch.sum(0)
        row = whole + 1
    return sketches, mask, gradients


def _shape(request: EstimateRequest) -> BatchShape:
    hello, readings = request.hello, [reading for _, reading in request.windows["gnb"]]
    is_sketched = any(one.sketches is not None for one in readings)
    return BatchShape(
        hello.sketch_size,
        draws=max(len(one.traces) for one in readings),
        probes=len(readings),
        traces=len(hello.layer_blocks) + len(hello.blocks),
        sketches=len(hello.blocks) + 1 if is_sketched else 0,
    )


def _without_sketches(reading: GnbReading) -> GnbReading:
    """Keeps the traces, which depend on no projection."""
    return replace(reading, sketches=None, gradient_sketch=None)


GNB = ReadingSpec(
    name="gnb",
    window=WINDOW_PROBES,
    estimators=("gnb", "gnb_upper_bound"),
    estimate=estimate_gnb,
    shape=_shape,
    without_projection=_without_sketches,
)
