"""The entries that a rank holds of a model's tensors, under FSDP2, tensor parallelism, or both, and their norms.

Sums over a rank's entries, weighted by its `shard_weights`, add up over the ranks to sums over the whole model; so do
sketches. `torch.distributed` is used only if the program has imported it already.
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

from sharpwatch.blocks import BlockMap, Part
from sharpwatch.curvature.statistics.sketch import CountSketch
from sharpwatch.errors import BlockError, ProbeError

_SLAB_ENTRIES = 2**24  # size of the temporary that makes a shard's scattered entries contiguous
_MAX_FLOAT32_ENTRIES = 2**16  # up to here a float32 norm is exact to 1e-6; with 4e7 entries it is off by 0.3 %


@dataclass(frozen=True, slots=True)
class Shard:
    """The entries that a rank holds of one parameter.

    Attributes:
        shape: Shape of the whole parameter.
        size: Shape of the shard.
        runs: For each dimension, the index ranges that the shard holds, laid end to end.
    """

    shape: tuple[int, ...]
    size: tuple[int, ...]
    runs: tuple[tuple[range, ...], ...]

    @classmethod
    def of(cls, parameter: Tensor) -> Shard:
        """Determine the shard of `parameter` that this rank holds.

        Args:
            parameter: A DTensor or an ordinary tensor.

        Raises:
            BlockError: The placement has no entries of its own, as partial sums.
        """
        shape = tuple(parameter.shape)
        runs: list[tuple[range, ...]] = [(range(size),) for size in shape]
        if is_dtensor(parameter):
            for cut in _chunk_ranges(parameter):
                runs[cut.dim] = cut.apply(runs[cut.dim])
        return cls(shape, tuple(sum(map(len, along)) for along in runs), tuple(runs))

    @property
    def numel(self) -> int:
        """Number of entries in the shard."""
        return math.prod(self.size)

    @property
    def is_whole(self) -> bool:
        """Whether the shard is the whole parameter."""
        return self.size == self.shape

    @property
    def offset(self) -> int | None:
        """The flat index of the shard's first entry if the shard is one contiguous run of the parameter, else None."""
        if not self.numel:
            return 0
        # One run, if every dimension before the last one that is cut has a single index left.
        cut = [dim for dim, (size, whole) in enumerate(zip(self.size, self.shape, strict=True)) if size != whole]
        if any(len(along) > 1 for along in self.runs) or (cut and any(size > 1 for size in self.size[: cut[-1]])):
            return None
        strides = (math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))
        return sum(along[0].start * stride for along, stride in zip(self.runs, strides, strict=True))

    def views(self, part: Part, local: Tensor) -> Sequence[Tensor]:
        """The entries of `part` in this shard.

        Args:
            part: A part of the same parameter.
            local: A tensor of the shard's shape.

        Returns:
            Views of `local` that contain each entry once: none, one, or up to three for each run where the shard cuts
            through the stretches of a repeating part.
        """
        if self.is_whole:
            return (part.view(local),)
        if not self.numel:
            return ()
        return (local,) if part.dim is None else tuple(self._slices(part, part.dim, local))

    def slabs(self, local: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield contiguous runs of the parameter's flat entries, each with its offset.

        The entries of `local` are in place, with zeros between them.
        """
        if self.offset is not None:
            yield self.offset, local
            return
        inner = self.shape[1:]
        for at, rows in _with_offsets(self.runs[0]):
            for chunk in _split(rows, max(1, _SLAB_ENTRIES // math.prod(inner))):
                # Sketches hash runs of flat entries; zeros between the shard's entries add nothing.
                slab = local.new_zeros(len(chunk), *inner)
                local_rows = local.narrow(0, at + chunk.start - rows.start, len(chunk))
                for box in itertools.product(*map(_with_offsets, self.runs[1:])):
                    into = tuple(slice(run.start, run.stop) for _, run in box)
                    slab[:, *into] = local_rows[:, *(slice(low, low + len(run)) for low, run in box)]
                yield chunk.start * math.prod(inner), slab

    def _slices(self, part: Part, dim: int, local: Tensor) -> Iterator[Tensor]:
        period = self.shape[dim] // part.repeats
        for at, run in _with_offsets(self.runs[dim]):
            # Stretches that the shard holds whole make one strided view; those cut at either end have a view each.
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
    """Whether `value` is a DTensor."""
    if type(value) is Tensor or type(value) is nn.Parameter:  # the common case, checked at every step
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter of `model` is a DTensor."""
    return any(is_dtensor(parameter) for parameter in model.parameters())


def local_tensor(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, sharing its memory; another tensor is returned as it is."""
    return tensor.detach().to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def needs_redistribution(parameter: Tensor) -> bool:
    """Whether placing `parameter.grad` as `parameter` is placed takes a collective.

    Under sequence parallelism each rank holds a partial sum, which the optimizer reduces in its step; before that no
    rank holds final entries.
    """
    gradient: Any = parameter.grad
    placed: Any = parameter
    if not is_dtensor(gradient) or gradient.placements == placed.placements:
        return False
    return any(
        now != then and not now.is_replicate() for now, then in zip(gradient.placements, placed.placements, strict=True)
    )


def local_gradient(parameter: Tensor) -> Tensor | None:
    """The local shard of `parameter.grad`, placed as the parameter is; a collective if it `needs_redistribution`."""
    gradient: Any = parameter.grad
    if is_dtensor(gradient) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.detach().redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return None if gradient is None else local_tensor(gradient)


def local_gradient_summand(parameter: Tensor) -> tuple[Tensor | None, int]:
    """This rank's summand of `parameter.grad` in the shard of the parameter, without a collective.

    Args:
        parameter: A parameter with its gradient.

    Returns:
        The summand, or None without a gradient, and the number of ranks whose summands make up an entry.

    Raises:
        ProbeError: A gradient that `needs_redistribution` is not a partial sum of a replicated parameter.
    """
    if not needs_redistribution(parameter):
        return local_gradient(parameter), 1
    gradient: Any = parameter.grad
    placed: Any = parameter
    pairs = list(zip(gradient.placements, placed.placements, strict=True))
    # An entry is a sum over every mesh dimension in which the gradient is partial.
    ranks = 1
    for size, (now, then) in zip(placed.device_mesh.shape, pairs, strict=True):
        if now == then or now.is_replicate():
            continue
        if not (then.is_replicate() and now.is_partial() and now.reduce_op == "sum"):
            raise ProbeError(
                f"cannot read a gradient placed as {gradient.placements} of a parameter placed as {placed.placements}"
            )
        ranks *= size
    cut = [then if now.is_replicate() else now for now, then in pairs]
    return local_tensor(gradient.detach().redistribute(placements=cut)), ranks


def shard_weights(numels: Mapping[str, int], held_by: Iterable[Mapping[str, int]]) -> dict[str, float]:
    """The weight of this rank's sums over each parameter, chosen so that replicas count once in total.

    Args:
        numels: Number of entries of each parameter.
        held_by: For each rank, the number of entries that it holds of each parameter.

    Returns:
        Weights by parameter name.
    """
    held_by_all: Counter[str] = Counter()
    for rank in held_by:
        held_by_all.update(rank)
    return {name: numel / held_by_all[name] for name, numel in numels.items()}


def sketch_shards(
    sketcher: CountSketch, tensors: Mapping[str, Tensor], shards: Mapping[str, Shard], weights: Mapping[str, float]
) -> Tensor:
    """Compute this rank's summand of a sketch.

    Args:
        sketcher: The sketch.
        tensors: Shards by parameter name.
        shards: The position of each shard in its parameter.
        weights: This rank's `shard_weights`.

    Returns:
        Float32 [B, size]; the sum over all ranks is the sketch of the whole.
    """
    # Tensors of equal weight are sketched in one call, where small ones share a round of hashing.
    by_weight: dict[float, dict[str, Tensor]] = defaultdict(dict)
    total = torch.zeros(len(sketcher.block_map.blocks), sketcher.size, dtype=torch.float32, device="cpu")
    for name, tensor in tensors.items():
        if shards[name].offset is not None:
            by_weight[weights[name]][name] = tensor
            continue
        for offset, slab in shards[name].slabs(tensor):
            total = total.to(tensor.device) + weights[name] * sketcher.sketch({name: slab}, {name: offset})
    for weight, tensors_of_weight in by_weight.items():
        offsets = {name: shards[name].offset or 0 for name in tensors_of_weight}
        part = sketcher.sketch(tensors_of_weight, offsets)
        total = total.to(part.device) + weight * part
    return total


def squared_norms(
    block_map: BlockMap, tensors: Mapping[str, Tensor], shards: Mapping[str, Shard] | None = None
) -> Tensor:
    """Compute ‖·‖² of each part of the block map.

    Args:
        block_map: The division of the parameters into parts.
        tensors: Tensors by parameter name; a missing parameter counts as zero.
        shards: The shard that each tensor is, if the tensors are not whole.

    Returns:
        Float64 [parts] on the device of the tensors, computed asynchronously.
    """
    sums: list[list[Tensor]] = [[] for _ in block_map.parts]
    # One call norms all small views: on an accelerator their launches would cost more than their sums.
    small_views: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = defaultdict(list)
    for index, part in enumerate(block_map.parts):
        if part.parameter not in tensors:
            continue
        tensor = tensors[part.parameter]
        for view in (part.view(tensor),) if shards is None else shards[part.parameter].views(part, tensor):
            if view.numel() <= _MAX_FLOAT32_ENTRIES:
                small_views[view.device, view.dtype].append((index, view))
            else:
                sums[index].append(squared_norm(view))
    for (_, dtype), views in small_views.items():
        exact = torch.promote_types(dtype, torch.float32)
        norms = torch._foreach_norm([view for _, view in views], 2, exact)  # noqa: SLF001 - torch names its foreach so
        for (index, _), squared in zip(views, torch.stack(norms).double().square(), strict=True):
            sums[index].append(squared)
    return stack_sums(sums)


def sum_by_index(values: Tensor, index: Sequence[int], size: int) -> Tensor:
    """Sum `values` [..., parts] by `index`; float64 [..., size] on the CPU."""
    # On a CPU `index_add_` adds in order; on an accelerator the order, and so the last bit, would vary.
    values = values.cpu()
    return values.new_zeros(*values.shape[:-1], size).index_add_(-1, torch.tensor(index, device="cpu"), values)


def squared_norm(view: Tensor) -> Tensor:
    """‖·‖² of `view`, a float64 scalar, computed asynchronously."""
    # By rows: float32 is exact enough for one row, and no temporary of the size of the view is needed.
    exact = torch.promote_types(view.dtype, torch.float32)
    rows = torch.linalg.vector_norm(view, dim=-1, dtype=exact) if view.dim() else view
    return rows.double().square().sum()


def stack_sums(values: Iterable[Sequence[Tensor]]) -> Tensor:
    """Sum each sequence of scalars, and stack the sums on one device."""
    sequences = list(values)
    device = next((value.device for sequence in sequences for value in sequence), torch.device("cpu"))
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([sum((value.to(device) for value in sequence), start=zero) for sequence in sequences])


@dataclass(frozen=True, slots=True)
class _ChunkRange:
    """Chunk `number` of `count` along `dim`, of each of `groups` equal groups; sizes as in `torch.chunk`."""

    dim: int
    number: int
    count: int
    groups: int = 1

    def apply(self, runs: tuple[range, ...]) -> tuple[range, ...]:
        """The part of `runs` that falls into the chunk."""
        remaining: list[range] = []
        everything = range(sum(map(len, runs)))
        for group in range(self.groups):
            chunk = _chunk(_chunk(everything, group, self.groups), self.number, self.count)
            for at, run in _with_offsets(runs):
                low, high = max(chunk.start, at), min(chunk.stop, at + len(run))
                if low >= high:
                    continue
                kept = range(run.start + low - at, run.start + high - at)
                if remaining and remaining[-1].stop == kept.start:
                    kept = range(remaining.pop().start, kept.stop)
                remaining.append(kept)
        return tuple(remaining)


def _chunk_ranges(parameter: Any) -> Iterator[_ChunkRange]:
    """Yield how a DTensor is split, one split after the other.

    FSDP2 splits what tensor parallelism has split before, although its mesh dimension comes first. A strided placement
    marks this by the number of earlier chunks, and is then applied last. Any other strided placement takes a chunk of
    each group, as for several matrices packed into one.
    """
    from torch.distributed.tensor import Replicate, Shard  # noqa: PLC0415 - a program without DTensors need not load it
    from torch.distributed.tensor.placement_types import _StridedShard  # noqa: PLC0415 - as above

    mesh, placements = parameter.device_mesh, parameter.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise BlockError(f"parameter {tuple(parameter.shape)} has no shard on this rank")
    last = []
    for axis, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard | _StridedShard):
            raise BlockError(
                f"parameter {tuple(parameter.shape)} is placed as {placements}: expected Shard or Replicate"
            )
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
    length = -(-len(run) // count)
    return run[number * length : (number + 1) * length]


def _with_offsets(runs: Iterable[range]) -> Iterator[tuple[int, range]]:
    """Yield each run with its offset among the runs laid end to end."""
    at = 0
    for run in runs:
        yield at, run
        at += len(run)


def _split(run: range, size: int) -> Iterator[range]:
    for at in range(0, len(run), size):
        yield run[at : at + size]
