"""A block's parameters laid end to end: what the linear algebra of one block, or of the whole model, works on."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from sharpwatch.blocks import BlockMap, Part
from sharpwatch.errors import ProbeError

_MAX_COLOURS = 4
_BYTE_SIGNS = (
    (torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")) & 1
) * 2 - 1  # of a byte's bits


class ParameterSpace:
    """The trainable parameters of `block`, or of all blocks where it is None, as vectors of `size` float entries."""

    def __init__(self, block_map: BlockMap, block: str | None, leaves: Mapping[str, Tensor]) -> None:
        self.block = block
        self.block_map = block_map
        self.leaves = leaves
        chosen = [index for index, part in enumerate(block_map.parts) if block is None or part.type == block]
        self._indices = [index for index in chosen if leaves[block_map.parts[index].parameter].requires_grad]
        self.parts: tuple[Part, ...] = tuple(block_map.parts[index] for index in self._indices)
        self.names: tuple[str, ...] = tuple(dict.fromkeys(part.parameter for part in self.parts))
        self._sizes = [part.numel for part in self.parts]
        self.size = sum(self._sizes)
        self.device = leaves[self.names[0]].device if self.names else torch.device("cpu")

    def require_trainable(self) -> ParameterSpace:
        """This space; raises `ProbeError` where nothing in it requires a gradient."""
        if not self.parts:
            raise ProbeError(f"{self.block or 'model'}: nothing in it requires a gradient")
        return self

    @cached_property
    def dtype(self) -> torch.dtype:
        """What its vectors are in: float32, or more where a parameter is."""
        return functools.reduce(torch.promote_types, (self.leaves[name].dtype for name in self.names), torch.float32)

    @cached_property
    def weight_scale(self) -> float:
        """What is large for one weight here: their root mean square, or a tenth of the whole model's if that is more.

        A block can be near zero without being insensitive: norms of the form 1 + w, the second factor of an adapter.
        """
        own = _root_mean_square([part.view(self.leaves[part.parameter].detach()) for part in self.parts])
        everywhere = _root_mean_square([leaf.detach() for leaf in self.leaves.values()])
        return max(own, everywhere / 10) or 1.0

    def unflatten(self, vectors: Tensor) -> dict[str, Tensor]:
        """`vectors` [p, size] by parameter name, each [p, *shape]; what of a fused parameter is not here is zero."""
        tensors: dict[str, Tensor] = {}
        for part, piece in zip(self.parts, torch.split(vectors, self._sizes, dim=-1), strict=True):
            shape = self.leaves[part.parameter].shape
            if part.dim is None:
                tensors[part.parameter] = piece.reshape(len(vectors), *shape)
                continue
            whole = tensors.setdefault(part.parameter, vectors.new_zeros(len(vectors), *shape))
            for row, one in zip(whole, piece, strict=True):
                view = part.view(row)
                view.copy_(one.view(view.shape))
        return tensors

    def flatten_stacked(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """[p, size] of `tensors`, each [p, *shape]; a parameter that is left out is zero."""
        some = next(iter(tensors.values()))
        pieces = []
        for part in self.parts:
            whole = tensors.get(part.parameter)
            if whole is None:
                pieces.append(some.new_zeros(len(some), part.numel))
            elif part.dim is None:
                pieces.append(whole.reshape(len(whole), -1))
            else:
                pieces.append(torch.stack([part.view(row).reshape(-1) for row in whole]))
        return torch.cat(pieces, 1).to(self.device)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """[size] of `tensors`, each of its parameter's shape; a parameter that is left out is zero."""
        here = {name: tensors[name][None] for name in self.names if name in tensors}
        return self.flatten_stacked(here)[0] if here else torch.zeros(self.size, device=self.device)

    def sum_by_layer(self, products: Tensor) -> Tensor:
        """Sums over each layer block of `products` [p, size]; float64 [p, L] on the CPU, zero for other blocks'."""
        sums = torch.stack([piece.double().sum(1) for piece in torch.split(products, self._sizes, dim=1)], 1)
        index = torch.tensor([self.block_map.layer_block_of[each] for each in self._indices], device="cpu")
        zeros = torch.zeros(len(products), len(self.block_map.layer_blocks), dtype=torch.float64, device="cpu")
        return zeros.index_add_(1, index, sums.cpu())

    def sum_by_block(self, products: Tensor) -> Tensor:
        """Sums over each block type of `products` [size]; float64 [B] on the CPU, zero for blocks that are not here."""
        sums = torch.stack([piece.double().sum() for piece in torch.split(products, self._sizes)]).cpu()
        index = torch.tensor([self.block_map.block_of[each] for each in self._indices], device="cpu")
        return torch.zeros(len(self.block_map.blocks), dtype=torch.float64, device="cpu").index_add_(0, index, sums)

    def mask(self, block: str) -> Tensor:
        """1 at the entries of `block`, 0 elsewhere; float32 [size]."""
        mine = [torch.full((part.numel,), float(part.type == block), device=self.device) for part in self.parts]
        return torch.cat(mine)

    def random_signs(self, generator: torch.Generator) -> Tensor:
        """Random signs; [size]."""
        # 64 signs a number, looked up by the byte: a tenth of the time of one each.
        words = torch.randint(-(2**63), 2**63 - 1, (self.size // 64 + 1,), generator=generator, device=generator.device)
        table = _BYTE_SIGNS.to(words.device, self.dtype)
        return table.index_select(0, words.view(torch.uint8).int()).view(-1)[: self.size].to(self.device)

    def mirrored(self, signs: Tensor) -> Tensor:
        """`signs` [size] and their mirror images, [K, size], the mean of whose quadratic forms has less noise.

        The matrices of one layer block are given colours, and pattern k turns the signs of colour c by the entry (k, c)
        of a Hadamard matrix. In the mean over patterns the products of different colours cancel, whatever the Hessian.
        Those are what makes the noise where matrices act one after the other (query and key, value and output, up and
        down): measured, 65 to 90 % of the off-diagonal squared norm of such blocks.
        """
        return signs * self._mirror_signs

    @cached_property
    def _mirror_signs(self) -> Tensor:
        """What each pattern makes of every sign; [K, size]."""
        colours = self._colours.long()
        return _hadamard(int(colours.max()) + 1).to(self.device, self.dtype)[:, colours]

    @property
    def _colours(self) -> Tensor:
        """The colour of every entry; uint8 [size]. Matrices of a layer take colours in turn; vectors have the first."""
        taken: dict[str | None, int] = defaultdict(int)
        colours: list[Tensor] = []
        for part in self.parts:
            like = torch.zeros(self.leaves[part.parameter].shape, dtype=torch.uint8, device=self.device)
            entries = part.view(like)
            if part.layer is not None and like.dim() > 1:
                # The slice of a fused matrix that is query and key has them one after the other, in every head or once.
                halves = 2 if part.type == "qk" and part.dim is not None else 1
                along = 0 if part.dim is None else part.dim + (part.repeats > 1)
                for half in range(halves):
                    size = entries.shape[along] // halves
                    entries.narrow(along, half * size, size).fill_(taken[part.layer] % _MAX_COLOURS)
                    taken[part.layer] += 1
            colours.append(entries.reshape(-1))
        return torch.cat(colours)


def _root_mean_square(tensors: Sequence[Tensor]) -> float:
    rows = [
        torch.linalg.vector_norm(each, dim=-1) if each.dim() else each for each in tensors
    ]  # float32 sums rows well
    squares = math.fsum(float(each.double().square().sum()) for each in rows)
    return math.sqrt(squares / max(1, sum(each.numel() for each in tensors)))


def _hadamard(colours: int) -> Tensor:
    """Sylvester's matrix of the smallest power of two that has `colours` columns."""
    matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while len(matrix) < colours:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
