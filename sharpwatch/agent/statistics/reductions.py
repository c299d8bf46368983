"""Sums over the entries of each part of a model: on the CPU in chunks that stay in cache, on a device by foreach."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Columns of the sums: g², w², g² / max(v̂, floor), v̂, and the number of entries of g that are not finite. The other sums
# are over the finite entries. SCALED and SECOND are NaN without a second moment.
GRADIENT, WEIGHT, SCALED, SECOND, NON_FINITE = range(5)
COLUMNS = 5
_CHUNK = 2**17  # entries: 512 KiB of float32, so that three of them fit in the L2 cache (2x faster than whole tensors)
# The floor of v̂ is this share of its mean over the part. Without it the row of a rare token, which Adam has not seen
# yet, would dominate the mean: with R distinct tokens a batch, one such row of V adds g²/floor/V, about 1/(share·R).
FLOOR_SHARE = 0.1
_SMALL = 2**12  # entries: parts up to this size are summed together
_DEVICE_BATCH = 2**26  # entries of scratch memory that a device pass may hold at a time: 256 MiB


class PartTensors(NamedTuple):
    """Views of one part of a model, or of the piece of it that this rank holds.

    Attributes:
        weight: The weights.
        gradient: Their gradient, None if there is none.
        second: The second moment v, None if there is none.
        correction: The bias correction of v: v̂ = v / correction.
        floor: The lower bound of v̂. NaN computes it from the mean of v̂; 0 means that it is not known yet.
    """

    weight: Tensor
    gradient: Tensor | None
    second: Tensor | None = None
    correction: float = 1.0
    floor: float = math.nan


@dataclass(slots=True)
class Scratch:
    """Buffers of the pass on the CPU, kept between steps."""

    _buffers: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, size: int) -> Tensor:
        """A float32 buffer of `size` entries, not initialized."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = torch.empty(max(size, _CHUNK), dtype=torch.float32, device="cpu")
        return buffer[:size]

    def flat(self, name: str, piece: Tensor) -> Tensor:
        """`piece` as contiguous float32 [n]: a view if it is that already, otherwise a copy in the buffer."""
        if piece.dtype is torch.float32 and piece.is_contiguous():
            return piece.view(-1)
        buffer = self.take(name, piece.numel())
        buffer.view(piece.shape).copy_(piece)
        return buffer


def host_sums(parts: Sequence[PartTensors], scratch: Scratch) -> npt.NDArray[np.float64]:
    """The sums [P, 5] of parts on the CPU. Every tensor is read from memory once.

    Args:
        parts: What to sum over.
        scratch: Buffers, to be passed again at the next step.
    """
    sums = np.empty((len(parts), COLUMNS))
    bundled = [i for i, part in enumerate(parts) if _bundles(part)]
    if bundled:
        sums[bundled] = _bundle_sums([parts[i] for i in bundled])
    # The other parts are summed one by one: those that are large, sliced, of another type, or not finite.
    done = {i for i in bundled if np.isfinite(sums[i, :SCALED]).all() and not np.isinf(sums[i, SCALED])}
    for i, part in enumerate(parts):
        if i not in done:
            sums[i] = _part_sums(part, scratch)
    return sums


def _bundles(part: PartTensors) -> bool:
    """Whether a part is one of the many small ones (biases, norms), for which calls cost more than arithmetic."""
    gradient, second = part.gradient, part.second
    return (
        gradient is not None
        and second is not None
        and part.weight.numel() <= _SMALL
        and gradient.layout is torch.strided
        and gradient.dtype is second.dtype is part.weight.dtype is torch.float32
    )


def _bundle_sums(parts: Sequence[PartTensors]) -> npt.NDArray[np.float64]:
    """The sums [P, 5] of small parts, concatenated; NON_FINITE stays 0."""
    gradient = torch.cat([cast("Tensor", part.gradient).reshape(-1) for part in parts]).numpy()
    second = torch.cat([cast("Tensor", part.second).reshape(-1) for part in parts]).numpy()
    weight = torch.cat([part.weight.reshape(-1) for part in parts]).numpy()
    sizes = np.array([part.weight.numel() for part in parts])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    corrections = np.array([part.correction for part in parts])

    def sums_of(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        sums: npt.NDArray[np.float64] = np.add.reduceat(values, starts, dtype=np.float64)
        return sums

    with np.errstate(all="ignore"):  # host_sums checks whether the sums are finite
        totals = sums_of(second)
        known = np.array([part.floor for part in parts]) * corrections
        floors = np.where(np.isnan(known), FLOOR_SHARE * totals / sizes, known)
        floors[floors <= 0] = math.nan
        squares = gradient * gradient
        scaled = sums_of(squares / np.maximum(second, np.repeat(floors, sizes).astype(np.float32)))
        columns = (sums_of(squares), sums_of(weight * weight), scaled * corrections, totals / corrections)
    return np.stack([*columns, np.zeros(len(parts))], axis=1)


def _part_sums(part: PartTensors, scratch: Scratch) -> tuple[float, float, float, float, float]:
    gradient, second = part.gradient, part.second
    if gradient is not None and gradient.is_sparse:
        gradient, second = gradient.coalesce().values(), None  # some rows only, unlike the second moment
        weight_sq = _square_sum(part.weight, scratch)
        gradient_sq = _square_sum(gradient, scratch)
    else:
        if gradient is None:
            second = None
        floor = part.floor * part.correction  # in units of v, not v̂
        if second is not None and math.isnan(floor):
            floor = FLOOR_SHARE * float(second.mean(dtype=torch.float64))  # not known from an earlier step
        gradient_sq, weight_sq, scaled, total = _chunked(part.weight, gradient, second, floor, scratch)
    if not math.isfinite(weight_sq):
        weight_sq = _finite_square_sum(part.weight)[0]
    non_finite = 0
    if gradient is not None and not math.isfinite(gradient_sq):
        gradient_sq, non_finite = _finite_square_sum(gradient)
    if second is None:
        return gradient_sq, weight_sq, math.nan, math.nan, non_finite
    # Undefined if some entries are not finite, or if v̂ is 0 everywhere.
    usable = non_finite == 0 and math.isfinite(scaled)
    seen = scaled * part.correction if usable else math.nan
    return gradient_sq, weight_sq, seen, total / part.correction, non_finite


# torch._foreach_* takes twice as long as a loop of dot products on a CPU; smaller chunks are slow by their calls.
def _chunked(
    weight: Tensor, gradient: Tensor | None, second: Tensor | None, floor: float, scratch: Scratch
) -> tuple[float, float, float, float]:
    """Σg², Σw², Σg²/max(v, floor) and Σv."""
    gradient_sq = weight_sq = scaled = total = 0.0
    tensors = [tensor for tensor in (weight, gradient, second) if tensor is not None]
    rows = 0 if all(tensor.is_contiguous() for tensor in tensors) else max(1, _CHUNK * len(weight) // weight.numel())
    for chunk in _chunks(tensors, rows):
        w = scratch.flat("weight", chunk[0])
        weight_sq += torch.dot(w, w).item()
        if gradient is None:
            continue
        g = scratch.flat("gradient", chunk[1])
        gradient_sq += torch.dot(g, g).item()
        if second is None:
            continue
        v = scratch.flat("second", chunk[2])
        total += v.sum().item()
        quotient = scratch.take("quotient", g.numel())
        torch.clamp_min(v, floor, out=quotient)
        torch.div(g, quotient, out=quotient)
        scaled += torch.dot(g, quotient).item()
    return gradient_sq, weight_sq, scaled if second is not None and floor > 0 else math.nan, total


def _chunks(tensors: list[Tensor], rows: int) -> Iterable[Sequence[Tensor]]:
    """Corresponding pieces of all tensors: flat, or `rows` rows of each if `rows` is not 0."""
    if tensors[0].numel() <= _CHUNK:
        return (tensors,)
    pieces = [torch.split(tensor, rows) if rows else torch.split(tensor.view(-1), _CHUNK) for tensor in tensors]
    return zip(*pieces, strict=True)


def _square_sum(tensor: Tensor, scratch: Scratch) -> float:
    return _chunked(tensor, None, None, math.nan, scratch)[1] if tensor.numel() else 0.0


def _finite_square_sum(tensor: Tensor) -> tuple[float, int]:
    """Σx² over the finite entries in float64 (float32 overflows above 1e19), and the number of the other entries."""
    finite = tensor.isfinite()
    clean = torch.where(finite, tensor, 0.0).double()
    return float(clean.square().sum()), tensor.numel() - int(finite.sum())


def device_sums(parts: Sequence[PartTensors]) -> Tensor:
    """The sums [P, 5] of parts on one accelerator, float64 on that device. Nothing waits for them.

    Counting entries that are not finite would cost another pass, so NON_FINITE is 1 if there is any; the tap counts
    them at the next step. SCALED is NaN until a floor is known from an earlier step.
    """
    device = parts[0].weight.device
    sums = torch.zeros(len(parts), COLUMNS, dtype=torch.float64, device=device)
    sums[:, SCALED:NON_FINITE] = math.nan
    _fill_squares(sums, WEIGHT, {i: part.weight for i, part in enumerate(parts)})
    gradients = {i: part.gradient for i, part in enumerate(parts) if part.gradient is not None}
    _fill_squares(sums, GRADIENT, {i: _dense(gradient) for i, gradient in gradients.items()})
    finite = sums[:, GRADIENT].isfinite()
    sums[:, NON_FINITE] = (~finite).double()
    sums[:, GRADIENT] = torch.where(finite, sums[:, GRADIENT], 0.0)
    moved = [i for i, gradient in gradients.items() if parts[i].second is not None and not gradient.is_sparse]
    for batch in _batches(moved, parts):
        _fill_scaled(sums, batch, parts)
    return sums


def _dense(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _norms(tensors: Sequence[Tensor], order: int) -> Tensor:
    """Norms float64 [n]. Slices are made contiguous first, because one slice makes foreach slow for all tensors."""
    ready = [tensor.contiguous() for tensor in tensors]
    return torch.stack([norm.double() for norm in torch._foreach_norm(ready, order)])  # noqa: SLF001 - torch's name for it


def _fill_squares(sums: Tensor, column: int, tensors: dict[int, Tensor]) -> None:
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, tensor in tensors.items():
        by_dtype.setdefault(tensor.dtype, []).append(i)
    for rows in by_dtype.values():
        sums[_index(rows, sums.device), column] = _norms([tensors[i] for i in rows], 2).square()


def _index(rows: Sequence[int], device: torch.device) -> Tensor:
    """Row numbers on `device`, copied without waiting."""
    host = torch.tensor(rows, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _batches(rows: Sequence[int], parts: Sequence[PartTensors]) -> list[list[int]]:
    """Split `rows` so that each batch needs at most `_DEVICE_BATCH` entries of scratch memory."""
    batches: list[list[int]] = []
    held = _DEVICE_BATCH
    for i in rows:
        size = parts[i].weight.numel()
        if held + size > _DEVICE_BATCH:
            batches.append([])
            held = 0
        batches[-1].append(i)
        held += size
    return batches


def _fill_scaled(sums: Tensor, rows: Sequence[int], parts: Sequence[PartTensors]) -> None:
    seconds = [cast("Tensor", parts[i].second).float().contiguous() for i in rows]
    corrections = torch.tensor([parts[i].correction for i in rows], dtype=torch.float64, device="cpu")
    index = _index(rows, sums.device)
    # v is never negative, so its norm of order 1 is its sum.
    sums[index, SECOND] = _norms(seconds, 1) / corrections.to(sums.device, non_blocking=True)
    floors = [parts[i].floor * parts[i].correction for i in rows]
    known = [floor if floor > 0 else math.nan for floor in floors]
    bounds = [0.0 if math.isnan(floor) else floor for floor in known]
    # g/√v, because foreach has norms but no sums: the square of its norm is Σg²/v.
    quotient = torch._foreach_clamp_min(seconds, bounds)  # noqa: SLF001 - as above
    torch._foreach_sqrt_(quotient)
    torch._foreach_reciprocal_(quotient)
    torch._foreach_mul_(quotient, [cast("Tensor", parts[i].gradient).float().contiguous() for i in rows])
    factors = torch.tensor(
        [math.nan if math.isnan(f) else parts[i].correction for f, i in zip(known, rows, strict=True)], device="cpu"
    )
    scaled = _norms(quotient, 2).square() * factors.to(sums.device, non_blocking=True)
    sums[index, SCALED] = torch.where(scaled.isfinite(), scaled, math.nan)
