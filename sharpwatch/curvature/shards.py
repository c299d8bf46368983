"""What a rank holds of a model whose parameters are DTensors: cut by FSDP2, by tensor parallelism, or by both.

Sums over a rank's entries, each weighted with the rank's share of its parameter, add up over all ranks to those of the
whole model; so do sketches. `torch.distributed` is only looked at where the program has it loaded already.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharpwatch.blocks import Part
from sharpwatch.curvature.sketch import CountSketch
from sharpwatch.errors import BlockError

_SLAB = 2**24  # entries of a temporary in which entries that are no run are sketched


@dataclass(frozen=True, slots=True)
class Shard:
    """A box of a parameter of `shape`: along each dimension, `size` entries from `start` on."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def of(cls, parameter: Tensor) -> Shard:
        """What this rank holds of `parameter`.

        Raises `BlockError` for a placement that is no box of it: strided otherwise than FSDP2 does, or partial.
        """
        shape = tuple(parameter.shape)
        start, size = [0] * len(shape), list(shape)
        if is_dtensor(parameter):
            for dim, number, count in _cuts(parameter):
                whole = size[dim]
                chunk = -(-whole // count)
                low = min(number * chunk, whole)
                start[dim] += low
                size[dim] = min(chunk, whole - low)
        return cls(shape, tuple(start), tuple(size))

    @property
    def numel(self) -> int:
        """Entries in the shard."""
        return math.prod(self.size)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the parameter."""
        return self.size == self.shape

    @property
    def offset(self) -> int | None:
        """Where it starts among the parameter's flat entries if it is one run of them, else None."""
        cut = [dim for dim, (size, whole) in enumerate(zip(self.size, self.shape, strict=True)) if size != whole]
        is_run = not cut or all(size == 1 for size in self.size[: cut[-1]])
        return self._flat(self.start) if is_run or not self.numel else None

    def views(self, part: Part, held: Tensor) -> Sequence[Tensor]:
        """What of `part` lies in `held`, a tensor of the shard's shape: views that have each such entry once.

        There are none, one, or, where the shard cuts through stretches of a part that repeats, up to three.
        """
        if self.is_whole:
            return (part.view(held),)
        if not self.numel:
            return ()
        return (held,) if part.dim is None else tuple(self._slices(part, part.dim, held))

    def _slices(self, part: Part, dim: int, held: Tensor) -> Iterator[Tensor]:
        low, high = self.start[dim], self.start[dim] + self.size[dim]
        period = self.shape[dim] // part.repeats
        uncut = range(-(-low // period), high // period)
        if len(uncut) > 1:
            stretches = held.narrow(dim, uncut.start * period - low, len(uncut) * period)
            shape = (*held.shape[:dim], len(uncut), period, *held.shape[dim + 1 :])
            yield stretches.view(shape).narrow(dim + 1, part.start, part.stop - part.start)
        for turn in range(low // period, -(-high // period)):
            begin, end = max(low, turn * period + part.start), min(high, turn * period + part.stop)
            if begin < end and (len(uncut) <= 1 or turn not in uncut):
                yield held.narrow(dim, begin - low, end - begin)

    def slabs(self, held: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Runs of the parameter's flat entries, each with its offset: those of `held`, and zeros between them."""
        if self.offset is not None:
            yield self.offset, held
            return
        inner = self.shape[1:]
        within = tuple(slice(at, at + size) for at, size in zip(self.start[1:], self.size[1:], strict=True))
        for row, rows in _steps(self.size[0], max(1, _SLAB // math.prod(inner))):
            slab = held.new_zeros(rows, *inner)
            slab[(slice(None), *within)] = held[row : row + rows]
            yield (self.start[0] + row) * math.prod(inner), slab

    def _flat(self, at: tuple[int, ...]) -> int:
        flat = 0
        for index, size in zip(at, self.shape, strict=True):
            flat = flat * size + index
        return flat if self.numel else 0


def is_dtensor(value: object) -> bool:
    """Whether `value` is spread over ranks."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold `model` together: a parameter of it is a DTensor."""
    return any(is_dtensor(parameter) for parameter in model.parameters())


def held(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`, which shares its memory; a tensor that is not spread is itself."""
    return tensor.detach().to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def held_gradient(parameter: Tensor) -> Tensor | None:
    """What this rank holds of `parameter.grad`, placed as the parameter is.

    A gradient placed otherwise, as under sequence parallelism, is redistributed: a collective, which the optimizer
    takes part in as well.
    """
    gradient: Any = parameter.grad
    if is_dtensor(gradient) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.detach().redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return None if gradient is None else held(gradient)


def shares(whole: Mapping[str, int], held_by: Iterable[Mapping[str, int]]) -> dict[str, float]:
    """The weight of a rank's sums over each parameter, with which replicas count once.

    `whole` says how many entries each parameter has, `held_by` how many each rank of all holds.
    """
    held_together: Counter[str] = Counter()
    for rank in held_by:
        held_together.update(rank)
    return {name: numel / held_together[name] for name, numel in whole.items()}


def sketch(
    sketcher: CountSketch, tensors: Mapping[str, Tensor], shards: Mapping[str, Shard], weights: Mapping[str, float]
) -> Tensor:
    """This rank's summand of the sketch of what `tensors` are the shards of; float32 [B, size].

    `weights` are the rank's `shares`.
    """
    runs: dict[float, dict[str, Tensor]] = defaultdict(dict)
    total = torch.zeros(len(sketcher.block_map.blocks), sketcher.size)
    for name, tensor in tensors.items():
        if shards[name].offset is not None:
            runs[weights[name]][name] = tensor
            continue
        for offset, slab in shards[name].slabs(tensor):
            total = total.to(tensor.device) + weights[name] * sketcher.sketch({name: slab}, {name: offset})
    for weight, alike in runs.items():
        offsets = {name: shards[name].offset or 0 for name in alike}
        found = sketcher.sketch(alike, offsets)
        total = total.to(found.device) + weight * found
    return total


def _cuts(parameter: Any) -> Iterator[tuple[int, int, int]]:
    """Along which dimension a DTensor is cut, this rank's chunk, and of how many: one after the other.

    FSDP2 cuts what tensor parallelism has cut before, but its mesh dimension comes first: a strided placement says so
    by how many chunks there were. Its layout is that of plain cuts in the mesh's order, then the strided ones.
    """
    from torch.distributed.tensor import Replicate  # noqa: PLC0415 - a program without DTensors need not load it
    from torch.distributed.tensor import Shard as Cut  # noqa: PLC0415 - as above
    from torch.distributed.tensor.placement_types import _StridedShard  # noqa: PLC0415 - as above

    mesh, placements = parameter.device_mesh, parameter.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise BlockError(f"{tuple(parameter.shape)} is placed on other ranks than this one")
    strided = []
    for axis, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Cut | _StridedShard):
            raise BlockError(f"{tuple(parameter.shape)} is placed as {placements}: no rank has its entries")
        cut = placement.dim, coordinate[axis], mesh.size(axis)
        if not isinstance(placement, _StridedShard):
            yield cut
            continue
        inside = [
            mesh.size(later)
            for later in range(axis + 1, mesh.ndim)
            if type(placements[later]) is Cut and placements[later].dim == placement.dim
        ]
        if placement.split_factor != math.prod(inside):
            raise BlockError(f"{tuple(parameter.shape)} is placed as {placements}: no box of it")
        strided.append(cut)
    yield from strided


def _steps(size: int, step: int) -> Iterator[tuple[int, int]]:
    for at in range(0, size, step):
        yield at, min(step, size - at)
