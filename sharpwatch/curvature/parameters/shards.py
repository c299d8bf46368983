"""What a rank holds of a model whose parameters are DTensors: cut by FSDP2, by tensor parallelism, or by both.

Sums over a rank's entries, each weighted with the rank's share of its parameter, add up over all ranks to those of the
whole model; so do sketches. `torch.distributed` is only looked at where the program has it loaded already.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharpwatch.blocks import Part
from sharpwatch.curvature.statistics.sketch import CountSketch
from sharpwatch.errors import BlockError, ProbeError

_SLAB_ENTRIES = 2**24  # entries of a temporary in which entries that are no run are sketched


@dataclass(frozen=True, slots=True)
class Shard:
    """What a rank holds of a parameter of `shape`: along each dimension `size` entries, in `runs` laid end to end."""

    shape: tuple[int, ...]
    size: tuple[int, ...]
    runs: tuple[tuple[range, ...], ...]

    @classmethod
    def of(cls, parameter: Tensor) -> Shard:
        """What this rank holds of `parameter`. Raises `BlockError` for a placement without entries: partial sums."""
        shape = tuple(parameter.shape)
        runs: list[tuple[range, ...]] = [(range(size),) for size in shape]
        if is_dtensor(parameter):
            for cut in _chunk_ranges(parameter):
                runs[cut.dim] = cut.apply(runs[cut.dim])
        return cls(shape, tuple(sum(map(len, along)) for along in runs), tuple(runs))

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
        if not self.numel:
            return 0
        cut = [dim for dim, (size, whole) in enumerate(zip(self.size, self.shape, strict=True)) if size != whole]
        if any(len(along) > 1 for along in self.runs) or (cut and any(size > 1 for size in self.size[: cut[-1]])):
            return None
        strides = (math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))
        return sum(along[0].start * stride for along, stride in zip(self.runs, strides, strict=True))

    def views(self, part: Part, local: Tensor) -> Sequence[Tensor]:
        """What of `part` lies in `held`, a tensor of the shard's shape: views that have each such entry once.

        There are none or one, or, where the shard cuts through stretches of a part that repeats, up to three; so of
        each of several runs.
        """
        if self.is_whole:
            return (part.view(local),)
        if not self.numel:
            return ()
        return (local,) if part.dim is None else tuple(self._slices(part, part.dim, local))

    def slabs(self, local: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Runs of the parameter's flat entries, each with its offset: those of `held`, and zeros between them."""
        if self.offset is not None:
            yield self.offset, local
            return
        inner = self.shape[1:]
        for at, rows in _with_offsets(self.runs[0]):
            for some in _split(rows, max(1, _SLAB_ENTRIES // math.prod(inner))):
                slab = local.new_zeros(len(some), *inner)
                own = local.narrow(0, at + some.start - rows.start, len(some))
                for box in itertools.product(*map(_with_offsets, self.runs[1:])):
                    into = tuple(slice(run.start, run.stop) for _, run in box)
                    slab[:, *into] = own[:, *(slice(low, low + len(run)) for low, run in box)]
                yield some.start * math.prod(inner), slab

    def _slices(self, part: Part, dim: int, local: Tensor) -> Iterator[Tensor]:
        period = self.shape[dim] // part.repeats
        for at, run in _with_offsets(self.runs[dim]):
            uncut = range(-(-run.start // period), run.stop // period)
            if len(uncut) > 1:
                stretches = local.narrow(dim, at + uncut.start * period - run.start, len(uncut) * period)
                shape = (*local.shape[:dim], len(uncut), period, *local.shape[dim + 1 :])
                yield stretches.view(shape).narrow(dim + 1, part.start, part.stop - part.start)
            for turn in range(run.start // period, -(-run.stop // period)):
                begin, end = max(run.start, turn * period + part.start), min(run.stop, turn * period + part.stop)
                if begin < end and (len(uncut) <= 1 or turn not in uncut):
                    yield local.narrow(dim, at + begin - run.start, end - begin)


def is_dtensor(value: object) -> bool:
    """Whether `value` is spread over ranks."""
    if type(value) is Tensor or type(value) is nn.Parameter:  # most are, and are asked for at every step
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold `model` together: a parameter of it is a DTensor."""
    return any(is_dtensor(parameter) for parameter in model.parameters())


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`, which shares its memory; a tensor that is not spread is itself."""
    return tensor.detach().to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def needs_redistribution(parameter: Tensor) -> bool:
    """Whether it takes a collective to place the gradient as `parameter` is.

    Under sequence parallelism ranks have sums, which the optimizer adds up in its step: before, none has an entry.
    """
    gradient: Any = parameter.grad
    placed: Any = parameter
    if not is_dtensor(gradient) or gradient.placements == placed.placements:
        return False
    return any(
        now != then and not now.is_replicate() for now, then in zip(gradient.placements, placed.placements, strict=True)
    )


def local_gradient(parameter: Tensor) -> Tensor | None:
    """What this rank holds of `parameter.grad`, placed as the parameter is: a collective where it `is_scattered`."""
    gradient: Any = parameter.grad
    if is_dtensor(gradient) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.detach().redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return None if gradient is None else local_tensor(gradient)


def local_gradient_summand(parameter: Tensor) -> tuple[Tensor | None, int]:
    """What this rank adds to `parameter.grad`, in the parameter's shard, and how many ranks' such make up an entry.

    No collective. Raises `ProbeError` where a gradient that `is_scattered` is no sum over ranks that hold the same.
    """
    if not needs_redistribution(parameter):
        return local_gradient(parameter), 1
    gradient: Any = parameter.grad
    placed: Any = parameter
    pairs = list(zip(gradient.placements, placed.placements, strict=True))
    ranks = 1
    for size, (now, then) in zip(placed.device_mesh.shape, pairs, strict=True):
        if now == then or now.is_replicate():
            continue
        if not (then.is_replicate() and now.is_partial() and now.reduce_op == "sum"):
            raise ProbeError(f"a gradient is placed as {gradient.placements}, its parameter as {placed.placements}")
        ranks *= size
    cut = [then if now.is_replicate() else now for now, then in pairs]
    return local_tensor(gradient.detach().redistribute(placements=cut)), ranks


def shard_weights(whole: Mapping[str, int], held_by: Iterable[Mapping[str, int]]) -> dict[str, float]:
    """The weight of a rank's sums over each parameter, with which replicas count once.

    `whole` says how many entries each parameter has, `held_by` how many each rank of all holds.
    """
    held_together: Counter[str] = Counter()
    for rank in held_by:
        held_together.update(rank)
    return {name: numel / held_together[name] for name, numel in whole.items()}


def sketch_shards(
    sketcher: CountSketch, tensors: Mapping[str, Tensor], shards: Mapping[str, Shard], weights: Mapping[str, float]
) -> Tensor:
    """This rank's summand of the sketch of what `tensors` are the shards of; float32 [B, size].

    `weights` are the rank's `shares`.
    """
    runs: dict[float, dict[str, Tensor]] = defaultdict(dict)
    total = torch.zeros(len(sketcher.block_map.blocks), sketcher.size, dtype=torch.float32, device="cpu")
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


@dataclass(frozen=True, slots=True)
class _ChunkRange:
    """Along `dim`, of each of `groups` equal chunks chunk `number` of `count`, as `torch.chunk` has them."""

    dim: int
    number: int
    count: int
    groups: int = 1

    def apply(self, runs: tuple[range, ...]) -> tuple[range, ...]:
        """What is left of `runs`."""
        left: list[range] = []
        whole = range(sum(map(len, runs)))
        for group in range(self.groups):
            wanted = _chunk(_chunk(whole, group, self.groups), self.number, self.count)
            for at, run in _with_offsets(runs):
                low, high = max(wanted.start, at), min(wanted.stop, at + len(run))
                if low >= high:
                    continue
                found = range(run.start + low - at, run.start + high - at)
                if left and left[-1].stop == found.start:
                    found = range(left.pop().start, found.stop)
                left.append(found)
        return tuple(left)


def _chunk_ranges(parameter: Any) -> Iterator[_ChunkRange]:
    """How a DTensor is cut, one after the other.

    FSDP2 cuts what tensor parallelism has cut before, but its mesh dimension comes first: a strided placement says so
    by how many chunks there were. It then comes last; any other takes a chunk of each group, as of each matrix that is
    packed into one.
    """
    from torch.distributed.tensor import Replicate, Shard  # noqa: PLC0415 - a program without DTensors need not load it
    from torch.distributed.tensor.placement_types import _StridedShard  # noqa: PLC0415 - as above

    mesh, placements = parameter.device_mesh, parameter.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise BlockError(f"{tuple(parameter.shape)} is placed on other ranks than this one")
    last = []
    for axis, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard | _StridedShard):
            raise BlockError(f"{tuple(parameter.shape)} is placed as {placements}: no rank has its entries")
        dim = placement.dim % parameter.dim()
        groups = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        before = math.prod(
            mesh.size(later)
            for later in range(axis + 1, mesh.ndim)
            if isinstance(placements[later], Shard | _StridedShard) and placements[later].dim % parameter.dim() == dim
        )
        if groups > 1 and groups == before:
            last.append(_ChunkRange(dim, coordinate[axis], mesh.size(axis)))
        else:
            yield _ChunkRange(dim, coordinate[axis], mesh.size(axis), groups)
    yield from last


def _chunk(run: range, number: int, count: int) -> range:
    each = -(-len(run) // count)
    return run[number * each : (number + 1) * each]


def _with_offsets(runs: Iterable[range]) -> Iterator[tuple[int, range]]:
    """Each run with where it lies among all, end to end."""
    at = 0
    for run in runs:
        yield at, run
        at += len(run)


def _split(run: range, size: int) -> Iterator[range]:
    for at in range(0, len(run), size):
        yield run[at : at + size]
