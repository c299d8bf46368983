"""A block map: the division of a model's parameters into blocks, as a value."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from sharpwatch.errors import BlockError

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = ("emb", "qk", "vo", "ffn", "norm", "head", "other")
SHARPNESS_ORDER = ("emb", "qk", "ffn", "vo", "norm")  # least sharp first: Wang et al. 2025, arXiv 2502.19002


class Row(NamedTuple):
    """One row of the table: a parameter, or one part of a fused parameter.

    Attributes:
        parameter: Name in `model.named_parameters()`.
        type: Block type, one of `BLOCKS`.
        layer: Name of the layer, such as "layers.3"; None outside of layers.
        numel: Number of entries.
    """

    parameter: str
    type: str
    layer: str | None
    numel: int

    @property
    def adapter(self) -> bool:
        """Whether the parameter belongs to an adapter, such as LoRA's."""
        return False


class _AdapterRow(Row):  # not a field of `Row`, which callers may unpack
    __slots__ = ()

    @property
    def adapter(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Part:
    """A parameter, or a slice of a fused parameter, that belongs to one block.

    Dimension `dim` consists of `repeats` equal stretches, such as the heads of an interleaved matrix. The part is
    entries [start, stop) of each stretch.

    Attributes:
        parameter: Name in `model.named_parameters()`.
        type: Block type, one of `BLOCKS`.
        layer: Name of the layer; None outside of layers.
        dim: The sliced dimension; None if the part is the whole parameter (then start and stop are 0).
        start: First entry.
        stop: Entry after the last one.
        numel: Number of entries.
        repeats: Number of stretches.
        adapter: Whether the parameter belongs to an adapter, such as LoRA's.
        known: Whether the block is known, or given by a rule; else it is "other".
    """

    parameter: str
    type: str
    layer: str | None
    dim: int | None
    start: int
    stop: int
    numel: int
    repeats: int = 1
    # Not in the repr, by which `measure` knows the blocks of a saved state again.
    adapter: bool = field(default=False, repr=False)
    known: bool = field(default=True, repr=False)

    def view(self, tensor: Tensor) -> Tensor:
        """The entries of this part, as a view.

        Args:
            tensor: A tensor of the parameter's shape.

        Returns:
            A view of `tensor`. If the part repeats, dimension `dim` becomes two: [repeats, stop - start].
        """
        if self.dim is None:
            return tensor
        if self.repeats == 1:
            return tensor.narrow(self.dim, self.start, self.stop - self.start)
        shape = tensor.shape
        stretches = tensor.view(*shape[: self.dim], self.repeats, -1, *shape[self.dim + 1 :])
        return stretches.narrow(self.dim + 1, self.start, self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Split:
    """A fused parameter as parts along one dimension.

    Attributes:
        dim: The dimension.
        parts: (block type, size) of each part, in order.
        repeats: How often the sequence of parts repeats along `dim`.
    """

    dim: int
    parts: tuple[tuple[str, int], ...]
    repeats: int = 1


Placement = str | Split  # of a whole parameter in one block, or of the parts of a fused one


def part_views(parts: Sequence[Part], tensors: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    """The entries of each part of a parameter in each of several tensors.

    Args:
        parts: Parts of one parameter.
        tensors: Tensors of the parameter's shape; None stays None.

    Returns:
        For each part its views of `tensors`, in their order.
    """
    return [[None if tensor is None else part.view(tensor) for tensor in tensors] for part in parts]


@dataclass(frozen=True, slots=True)
class LayerBlock:
    """One block type in one layer; `layer` is None outside of layers.

    Attributes:
        type: Block type.
        layer: Name of the layer.
        numel: Number of entries.
        adapter_numel: Number of those that belong to adapters.
    """

    type: str
    layer: str | None
    numel: int
    adapter_numel: int = 0


# Without slots, since cached_property keeps its values in `__dict__`.
@dataclass(frozen=True)
class BlockMap:
    """A map from every parameter of a model to exactly one block, by slices where blocks share a fused parameter.

    `str(block_map)` is a table.

    Attributes:
        parts: The parts, in the order of `model.named_parameters()`.
        shapes: Shapes of the whole parameters, in the same order.

    Raises:
        BlockError: The parts do not cover each parameter exactly once.
    """

    parts: tuple[Part, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        by_parameter: dict[str, list[Part]] = {name: [] for name in self.shapes}
        for part in self.parts:
            if part.parameter not in by_parameter:
                raise BlockError(f"{part.parameter} is not a parameter of the model")
            if part.type not in BLOCKS:
                raise BlockError(f"{part.parameter}: block must be one of {', '.join(BLOCKS)}, got {part.type!r}")
            by_parameter[part.parameter].append(part)
        for name, parts in by_parameter.items():
            _check_cover(name, self.shapes[name], parts)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows of the table, parallel to `parts`."""
        kinds = ((_AdapterRow if part.adapter else Row, part) for part in self.parts)
        return tuple(kind(part.parameter, part.type, part.layer, part.numel) for kind, part in kinds)

    @cached_property
    def layer_blocks(self) -> tuple[LayerBlock, ...]:
        """The layer blocks, sorted by layer (None first, numbers by value), then in the order of `BLOCKS`."""
        numel: Counter[tuple[str | None, str]] = Counter()
        of_adapters: Counter[tuple[str | None, str]] = Counter()
        for part in self.parts:
            numel[part.layer, part.type] += part.numel
            of_adapters[part.layer, part.type] += part.adapter * part.numel
        order = sorted(numel, key=lambda key: (*_layer_key(key[0]), BLOCKS.index(key[1])))
        return tuple(LayerBlock(kind, layer, numel[layer, kind], of_adapters[layer, kind]) for layer, kind in order)

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """The block types that occur, in the order of `BLOCKS`."""
        present = {part.type for part in self.parts}
        return tuple(kind for kind in BLOCKS if kind in present)

    @cached_property
    def numel(self) -> dict[str, int]:
        """Number of parameters by block type."""
        return {kind: sum(part.numel for part in self.parts if part.type == kind) for kind in self.blocks}

    @cached_property
    def layer_block_of(self) -> tuple[int, ...]:
        """The index in `layer_blocks` of each part."""
        index = {(block.layer, block.type): i for i, block in enumerate(self.layer_blocks)}
        return tuple(index[part.layer, part.type] for part in self.parts)

    @cached_property
    def parameter_names(self) -> tuple[tuple[str, ...], ...]:
        """The names of the parameters that each layer block has a part of, parallel to `layer_blocks`."""
        names: list[dict[str, None]] = [{} for _ in self.layer_blocks]
        for part, layer_block in zip(self.parts, self.layer_block_of, strict=True):
            names[layer_block][part.parameter] = None
        return tuple(map(tuple, names))

    @cached_property
    def block_of(self) -> tuple[int, ...]:
        """The index in `blocks` of each part."""
        return tuple(self.blocks.index(part.type) for part in self.parts)

    @cached_property
    def adapter_numel(self) -> dict[str, int]:
        """Number of parameters of adapters by block type."""
        return {
            kind: sum(part.adapter * part.numel for part in self.parts if part.type == kind) for kind in self.blocks
        }

    @cached_property
    def unplaced(self) -> tuple[str, ...]:
        """Names of the parameters whose block is not known, and no rule says: they are counted as "other"."""
        return tuple(part.parameter for part in self.parts if not part.known)

    def restricted_to(self, parameters: Collection[str]) -> BlockMap:
        """The map of some of the parameters alone, such as those that are trained.

        Args:
            parameters: Their names.

        Returns:
            A map of those of `parameters` that this one has, in the same order.
        """
        parts = tuple(part for part in self.parts if part.parameter in parameters)
        return BlockMap(parts, {name: shape for name, shape in self.shapes.items() if name in parameters})

    def views(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Views of the parts of `tensors`, parallel to `parts`.

        Args:
            tensors: Parameters, gradients or optimizer state by parameter name.

        Returns:
            The views; nothing is copied.

        Raises:
            KeyError: A parameter is missing.
        """
        return [part.view(tensors[part.parameter]) for part in self.parts]

    def __str__(self) -> str:
        cells = [("parameter", "type", "layer", "numel")]
        cells += [(_label(part), _block(part), part.layer or "-", f"{part.numel:,}") for part in self.parts]
        cells += [("total", kind, "", f"{count:,}") for kind, count in self.numel.items()]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        return "\n".join(
            f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {layer:<{widths[2]}}  {numel:>{widths[3]}}"
            for name, kind, layer, numel in cells
        )


def _label(part: Part) -> str:
    if part.dim is None:
        return part.parameter
    each = f"{part.repeats} x " if part.repeats > 1 else ""
    return f"{part.parameter}[{':, ' * part.dim}{each}{part.start}:{part.stop}]"


def _block(part: Part) -> str:
    return f"{part.type} (adapter)" if part.adapter else part.type


def _layer_key(layer: str | None) -> tuple[int, list[tuple[int, int, str]]]:
    # Numbers and text in tuples of one form, as they can't be compared with each other: layer 10 follows layer 9.
    pieces = re.split(r"(\d+)", layer or "")
    return int(layer is not None), [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in pieces]


def _check_cover(name: str, shape: tuple[int, ...], parts: list[Part]) -> None:
    if not parts:
        raise BlockError(f"{name} {shape} belongs to no block")
    if len(parts) == 1 and parts[0].dim is None and parts[0].numel == math.prod(shape):
        return
    dim, repeats, reached = parts[0].dim, parts[0].repeats, 0
    for part in parts:
        if part.dim is None or (part.dim, part.repeats, part.start) != (dim, repeats, reached) or part.stop <= reached:
            raise BlockError(f"{name} {shape}: the parts overlap or leave a gap at {reached} of dimension {dim}")
        if part.numel * shape[part.dim] != (part.stop - part.start) * repeats * math.prod(shape):
            raise BlockError(f"{name} {shape}: numel={part.numel} does not match the slice of the part")
        reached = part.stop
    if dim is None or reached * repeats != shape[dim]:
        raise BlockError(f"{name} {shape}: the parts end at {reached} of dimension {dim}, repeated {repeats} times")
