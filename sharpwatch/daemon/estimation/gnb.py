"""The batched curvature estimates: one call over all runs with new probes, on the device, off the loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from sharpwatch.curvature.statistics.estimate import Estimate, stability_ratio
from sharpwatch.curvature.statistics.gnb_estimators import top_eigenvalues, trace_estimates
from sharpwatch.curvature.statistics.sketch_moments import alignments, drifts, effective_ranks, sketch_moments
from sharpwatch.daemon.estimation.block_totals import Doubles, sum_rows
from sharpwatch.daemon.estimation.hessian import probe_estimates
from sharpwatch.daemon.estimation.windows import WINDOW_PROBES, Key, Request
from sharpwatch.daemon.ingest.limits import Floats
from sharpwatch.daemon.ingest.probes import DirectionReading
from sharpwatch.errors import SharpwatchError

_SPECTRAL = ("top_eigenvalue", "effective_rank", "drift", "alignment")  # of one batch, by block and whole
_AT_ONCE = 256  # requests in one batch: their padded sketches stay below some tens of megabytes
ORDER = ("emb", "qk", "ffn", "vo", "norm")  # least sharp first: Wang et al. 2025, arXiv 2502.19002


@dataclass(frozen=True, slots=True)
class Estimates:
    """One run's estimates; `layer_sharpness` in the manifest's order of layer blocks, or empty."""

    values: Mapping[Key, Estimate] = field(default_factory=dict)
    layer_sharpness: tuple[Estimate, ...] = ()
    order_correlation: float | None = None


def resolve_device(name: str) -> str:
    """What `auto` means here; raises `SharpwatchError` for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SharpwatchError(f"device {name!r}: {reason}") from error
    return name


class Estimator:
    """Runs the estimates on a thread of its own, which shares its work with no others of torch's.

    The matrices are of tens of rows: measured on 2 cores, a second thread made a run's estimates 5 times slower on an
    idle machine (18 ms for 3.4), and 10 times on a busy one.
    """

    def __init__(self, device: str) -> None:
        self.device = resolve_device(device)
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="estimator", initializer=torch.set_num_threads, initargs=(1,)
        )

    async def estimate(self, requests: Sequence[Request]) -> list[Estimates]:
        """Estimate all `requests`, in their order; as one batch, unless they are very many."""
        loop = asyncio.get_running_loop()
        found: list[Estimates] = []
        for first in range(0, len(requests), _AT_ONCE):
            some = requests[first : first + _AT_ONCE]
            found += await loop.run_in_executor(self._thread, estimate_all, some, self.device)
        return found

    def close(self) -> None:
        """Finish what is under way."""
        self._thread.shutdown()


def order_correlation(sharpness: Mapping[str, float]) -> float | None:
    """Spearman correlation of measured sharpness with `ORDER`; None with fewer than three of its blocks."""
    present = [block for block in ORDER if math.isfinite(sharpness.get(block, math.nan))]
    n = len(present)
    if n < 3:
        return None
    ranks = {block: rank for rank, block in enumerate(sorted(present, key=sharpness.__getitem__))}
    distance = sum((rank - ranks[block]) ** 2 for rank, block in enumerate(present))
    return 1.0 - 6.0 * distance / (n * (n**2 - 1))


@dataclass(frozen=True, slots=True)
class ObservedStability:
    """What one direction probe says; `no_descent` where it ran and gᵀd ≤ 0: then there is no ratio."""

    whole: Estimate | None = None
    no_descent: bool = False
    blocks: Mapping[str, Estimate] = field(default_factory=dict)


def observed_stability(blocks: Sequence[str], step: int, reading: DirectionReading | None) -> ObservedStability:
    """The stability ratios of one step's own probe."""
    if reading is None:
        return ObservedStability()
    whole = _whole_ratio([reading], step)
    by_block = _block_ratios(blocks, [reading], step)
    return ObservedStability(whole, no_descent=whole is None, blocks=by_block)


def _ratio(curvatures: Sequence[float], descents: Sequence[float], step: int, method: str) -> Estimate | None:
    ratio = stability_ratio(curvatures, descents)
    if ratio is None:
        return None
    return Estimate(ratio.value, ratio.stderr, ratio.probes, "direction", step, method=method)


def _whole_ratio(readings: Sequence[DirectionReading], step: int) -> Estimate | None:
    curvatures, descents = [one.curvature for one in readings], [one.descent for one in readings]
    return _ratio(curvatures, descents, step, readings[-1].method)


def _block_ratios(blocks: Sequence[str], readings: Sequence[DirectionReading], step: int) -> dict[str, Estimate]:
    """By block, over the newest probes in which it was the block's turn."""
    ratios = {}
    for index, block in enumerate(blocks):
        taken = [one for one in readings if not math.isnan(one.block_curvature[index])][-WINDOW_PROBES:]
        curvatures = [float(one.block_curvature[index]) for one in taken]
        descents = [float(one.block_descent[index]) for one in taken]
        ratio = _ratio(curvatures, descents, step, readings[-1].method)
        if ratio is not None:
            ratios[block] = ratio
    return ratios


def _window_stability(request: Request) -> dict[Key, Estimate]:
    if not request.direction:
        return {}
    step = request.direction[-1][0]
    readings = [reading for _, reading in request.direction]
    whole = _whole_ratio(readings[-WINDOW_PROBES:], step)
    ratios = {"": whole} if whole is not None else {}
    ratios |= _block_ratios(request.manifest.blocks, readings, step)
    return {
        ("stability_ratio", block, "direction"): ratio for block, ratio in ratios.items() if math.isfinite(ratio.stderr)
    }


def estimate_all(requests: Sequence[Request], device: str) -> list[Estimates]:
    """Estimate all `requests`, their gnb windows in one batch on `device`; what has no error yet is left out."""
    probed = [request for request in requests if request.gnb]
    traces = iter(_traces(probed, device))
    spectra = iter(_spectra(probed, device))
    return [
        _estimates(request, next(traces), next(spectra)) if request.gnb else _estimates(request) for request in requests
    ]


def _estimates(
    request: Request, traces: Sequence[Estimate] = (), spectra: Mapping[Key, Estimate] | None = None
) -> Estimates:
    """Put together one run's; `traces` are those of its layer blocks, then of its blocks."""
    manifest = request.manifest
    values = _window_stability(request) | probe_estimates(request)
    rows = len(manifest.layer_blocks)
    sharpness: dict[str, float] = {}
    for block, numel, trace in zip(manifest.blocks, manifest.block_parameters, traces[rows:], strict=bool(traces)):
        if math.isfinite(trace.stderr):
            average = _per_parameter(trace, int(numel))
            values["trace", block, "gnb"], values["sharpness", block, "gnb"] = trace, average
            sharpness[block] = average.value
    values |= spectra or {}
    layers = tuple(
        _per_parameter(trace, int(numel))
        for trace, numel in zip(traces[:rows], manifest.parameters, strict=bool(traces))
    )
    return Estimates(values, layers, order_correlation(sharpness))


def _per_parameter(trace: Estimate, numel: int) -> Estimate:
    return replace(trace, value=trace.value / numel, stderr=trace.stderr / numel)


def _traces(requests: Sequence[Request], device: str) -> list[list[Estimate]]:
    """For each of `requests` the traces of its layer blocks, then of its blocks."""
    if not requests:
        return []
    windows = [_trace_windows(request) for request in requests]
    width = max(window.shape[2] for window in windows)
    probes = max(window.shape[1] for window in windows)
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
        [Estimate(*next(rows), "gnb", request.gnb[-1][0]) for _ in range(len(window))]
        for request, window in zip(requests, windows, strict=True)
    ]


def _trace_windows(request: Request) -> Doubles:
    """[L + B, probes, draws], NaN where a probe has fewer draws than another."""
    width = max(len(probe.traces) for _, probe in request.gnb)
    traces = np.full((len(request.gnb), width, len(request.manifest.layer_blocks)), np.nan)
    for index, (_, probe) in enumerate(request.gnb):
        traces[index, : len(probe.traces)] = probe.traces
    return np.concatenate([traces, sum_rows(request.manifest, traces)], axis=2).transpose(2, 0, 1)


def _spectra(requests: Sequence[Request], device: str) -> list[Mapping[Key, Estimate]]:
    """For each of `requests` what its sketches say, by block, and of the whole model under the empty name."""
    found: list[Mapping[Key, Estimate]] = [{} for _ in requests]
    by_size: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        if any(probe.sketches is not None for _, probe in request.gnb):
            by_size.setdefault(request.manifest.sketch_size, []).append(index)
    for size, members in by_size.items():
        some = _spectra_of_one_size([requests[index] for index in members], size, device)
        for index, one in zip(members, some, strict=True):
            found[index] = one
    return found


def _spectra_of_one_size(requests: Sequence[Request], size: int, device: str) -> list[Mapping[Key, Estimate]]:
    windows = _sketch_windows(requests, size)
    sketches, mask, gradients = (torch.from_numpy(each).to(device) for each in windows)
    tops = top_eigenvalues(sketches, mask)
    moments = sketch_moments(sketches, mask, gradients)
    figures = (tops, effective_ranks(moments, tops.value), drifts(moments), alignments(moments))
    columns = torch.stack([column for one in figures for column in (one.value, one.stderr)]).tolist()
    rows = zip(tops.draws.tolist(), tops.upper_bound.tolist(), *columns, strict=True)
    return [_spectrum(request, rows) for request in requests]


def _spectrum(request: Request, rows: Iterator[tuple[float, ...]]) -> Mapping[Key, Estimate]:
    """One run's, of the next of `rows` for each of its blocks and for the whole; what has no error is left out."""
    step = request.gnb[-1][0]
    values: dict[Key, Estimate] = {}
    for block in (*request.manifest.blocks, ""):
        draws, bound, *columns = next(rows)
        for quantity, value, stderr in zip(_SPECTRAL, columns[::2], columns[1::2], strict=True):
            estimator = "gnb_upper_bound" if bound and quantity == "top_eigenvalue" else "gnb"
            if math.isfinite(stderr):
                values[quantity, block, estimator] = Estimate(value, stderr, int(draws), estimator, step)
    return values


def _sketch_windows(requests: Sequence[Request], size: int) -> tuple[Floats, npt.NDArray[np.bool_], Floats]:
    """The windows of all blocks of `requests`, and after a run's of its whole model: sketches, mask and gradients.

    [W, probes, draws, k], [W, probes, draws] and [W, probes, k]; zeros where a probe, draw or gradient is not there.
    """
    probes = max(len(request.gnb) for request in requests)
    width = max(len(probe.traces) for request in requests for _, probe in request.gnb)
    rows = sum(len(request.manifest.blocks) + 1 for request in requests)
    sketches = np.zeros((rows, probes, width, size), dtype=np.float32)
    gradients = np.zeros((rows, probes, size), dtype=np.float32)
    mask = np.zeros(sketches.shape[:3], dtype=bool)
    row = 0
    for request in requests:
        whole = row + len(request.manifest.blocks)
        for index, (_, probe) in enumerate(request.gnb):
            if probe.sketches is not None:
                draws = len(probe.sketches)
                # All blocks are hashed from one index, so the whole gradient's sketch is the sum of theirs.
                sketches[row:whole, index, :draws] = probe.sketches.transpose(1, 0, 2)
                sketches[whole, index, :draws] = probe.sketches.sum(1)
                mask[row : whole + 1, index, :draws] = True
            if probe.gradient_sketch is not None:
                gradients[row:whole, index] = probe.gradient_sketch
                gradients[whole, index] = probe.gradient_sketch.sum(0)
        row = whole + 1
    return sketches, mask, gradients
