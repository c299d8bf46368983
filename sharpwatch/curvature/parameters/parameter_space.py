"""The parameters of a block, or of the whole model, as vectors for linear algebra."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from sharpwatch.blocks import BlockMap, Part
from sharpwatch.errors import ProbeError

_MAX_COLOURS = 4  # so a draw takes four products at most
# The eight signs that each byte stands for, by its bits.
_BYTE_SIGNS = ((torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")) & 1) * 2 - 1


class ParameterSpace:
    """The trainable parameters of one block as vectors of `size` entries.

    Args:
        block_map: The division of the parameters into blocks.
        block: The block type; None for the whole model.
        leaves: Tensors by parameter name.

    Attributes:
        parts: The parts of the block map in this space, in the order of the vectors' entries.
        names: Names of the parameters that `parts` belong to.
        size: Number of entries.
    """

    def __init__(self, block_map: BlockMap, block: str | None, leaves: Mapping[str, Tensor]) -> None:
        self.block = block
        self.block_map = block_map
        self.leaves = leaves
        chosen = [index for index, part in enumerate(block_map.parts) if block is None or part.type == block]
        # Frozen parameters are not part of the loss's curvature as the run sees it.
        self._indices = [index for index in chosen if leaves[block_map.parts[index].parameter].requires_grad]
        self.parts: tuple[Part, ...] = tuple(block_map.parts[index] for index in self._indices)
        self.names: tuple[str, ...] = tuple(dict.fromkeys(part.parameter for part in self.parts))
        self._sizes = [part.numel for part in self.parts]
        self.size = sum(self._sizes)
        self.device = leaves[self.names[0]].device if self.names else torch.device("cpu")

    def require_trainable(self) -> ParameterSpace:
        """Return this space, or raise `ProbeError` if none of its parameters requires a gradient."""
        if not self.parts:
            raise ProbeError(f"{self.block or 'model'}: no parameter requires a gradient")
        return self

    @cached_property
    def dtype(self) -> torch.dtype:
        """The vectors' dtype: float32, or wider if a parameter is."""
        return functools.reduce(torch.promote_types, (self.leaves[name].dtype for name in self.names), torch.float32)

    @cached_property
    def weight_scale(self) -> float:
        """The scale of a weight: the root mean square of this space, or a tenth of the whole model's if that is larger.

        The second bound is for blocks whose weights are near zero without being sensitive, such as norms of the form 1
        + w or the second factor of an adapter.
        """
        own_scale = _root_mean_square([part.view(self.leaves[part.parameter].detach()) for part in self.parts])
        model_scale = _root_mean_square([leaf.detach() for leaf in self.leaves.values()])
        # All weights may be zero, and a step of length 0 would divide by 0.
        return max(own_scale, model_scale / 10) or 1.0

    def unflatten(self, vectors: Tensor) -> dict[str, Tensor]:
        """Split `vectors` [p, size] into tensors [p, *shape] by parameter name.

        Entries of a fused parameter that are outside of this space are zero.
        """
        tensors: dict[str, Tensor] = {}
        for part, piece in zip(self.parts, torch.split(vectors, self._sizes, dim=-1), strict=True):
            shape = self.leaves[part.parameter].shape
            if part.dim is None:
                tensors[part.parameter] = piece.reshape(len(vectors), *shape)
                continue
            whole = tensors.setdefault(part.parameter, vectors.new_zeros(len(vectors), *shape))
            # Row by row, since a part's view is defined on its parameter's own shape.
            for row, values in zip(whole, piece, strict=True):
                view = part.view(row)
                view.copy_(values.view(view.shape))
        return tensors

    def flatten_stacked(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Join `tensors`, each [p, *shape], into vectors [p, size]; a missing parameter is zero."""
        example = next(iter(tensors.values()))
        pieces = []
        for part in self.parts:
            whole = tensors.get(part.parameter)
            if whole is None:
                pieces.append(example.new_zeros(len(example), part.numel))
            elif part.dim is None:
                pieces.append(whole.reshape(len(whole), -1))
            else:
                pieces.append(torch.stack([part.view(row).reshape(-1) for row in whole]))
        return torch.cat(pieces, 1).to(self.device)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Join `tensors`, each of its parameter's shape, into a vector [size]; a missing parameter is zero."""
        stacked = {name: tensors[name][None] for name in self.names if name in tensors}
        return self.flatten_stacked(stacked)[0] if stacked else torch.zeros(self.size, device=self.device)

    def sum_by_layer(self, products: Tensor) -> Tensor:
        """Sum `products` [p, size] over each layer block: float64 [p, L] on the CPU, zero for other blocks."""
        # float64: a float32 sum of tens of millions of entries is off by parts in a thousand.
        sums = torch.stack([piece.double().sum(1) for piece in torch.split(products, self._sizes, dim=1)], 1)
        index = torch.tensor([self.block_map.layer_block_of[each] for each in self._indices], device="cpu")
        zeros = torch.zeros(len(products), len(self.block_map.layer_blocks), dtype=torch.float64, device="cpu")
        return zeros.index_add_(1, index, sums.cpu())

    def sum_by_block(self, products: Tensor) -> Tensor:
        """Sum `products` [size] over each block type: float64 [B] on the CPU, zero for blocks outside of this space."""
        sums = torch.stack([piece.double().sum() for piece in torch.split(products, self._sizes)]).cpu()
        index = torch.tensor([self.block_map.block_of[each] for each in self._indices], device="cpu")
        return torch.zeros(len(self.block_map.blocks), dtype=torch.float64, device="cpu").index_add_(0, index, sums)

    def mask(self, block: str) -> Tensor:
        """Float32 [size]: 1 at the entries of `block`, 0 elsewhere."""
        pieces = [torch.full((part.numel,), float(part.type == block), device=self.device) for part in self.parts]
        return torch.cat(pieces)

    def random_signs(self, generator: torch.Generator) -> Tensor:
        """A Rademacher vector: random signs [size]."""
        # Each random int64 gives 64 signs by a table of bytes: a tenth of the time of one number for each sign.
        words = torch.randint(-(2**63), 2**63 - 1, (self.size // 64 + 1,), generator=generator, device=generator.device)
        table = _BYTE_SIGNS.to(words.device, self.dtype)
        return table.index_select(0, words.view(torch.uint8).int()).view(-1)[: self.size].to(self.device)

    def mirrored(self, signs: Tensor) -> Tensor:
        """Return `signs` and its mirror images: the mean of their quadratic forms has less variance.

        The matrices of a layer block get colours, and image k multiplies the signs of colour c by entry (k, c) of a
        Hadamard matrix. In the mean over the images, products between different colours cancel for any Hessian. These
        make up 65 to 90 % (measured) of the off-diagonal squared norm of blocks whose matrices act one after the other:
        query and key, value and output, up and down.

        Args:
            signs: A probe vector [size].

        Returns:
            The probe vectors [K, size]; `signs` is the first.
        """
        return signs * self._mirror_signs

    @cached_property
    def _mirror_signs(self) -> Tensor:
        """The sign of each entry in each image; [K, size]."""
        colours = self._colours.long()
        return _hadamard(int(colours.max()) + 1).to(self.device, self.dtype)[:, colours]

    @property
    def _colours(self) -> Tensor:
        """Colour of each entry, uint8 [size]: matrices of a layer take the colours in turn, vectors have colour 0."""
        taken: dict[str | None, int] = defaultdict(int)
        colours: list[Tensor] = []
        for part in self.parts:
            like = torch.zeros(self.leaves[part.parameter].shape, dtype=torch.uint8, device=self.device)
            entries = part.view(like)
            if part.layer is not None and like.dim() > 1:
                # In a fused matrix, the slice for query and key holds one after the other, once or for each head.
                halves = 2 if part.type == "qk" and part.dim is not None else 1
                along = 0 if part.dim is None else part.dim + (part.repeats > 1)
                for half in range(halves):
                    size = entries.shape[along] // halves
                    entries.narrow(along, half * size, size).fill_(taken[part.layer] % _MAX_COLOURS)
                    taken[part.layer] += 1
            colours.append(entries.reshape(-1))
        return torch.cat(colours)


def require_real(model: nn.Module) -> None:
    """Check that no trainable parameter of `model` is complex.

    The vectors of a `ParameterSpace` have one real number for each entry, where a complex entry has two.

    Raises:
        ProbeError: One is; the message names it.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_complex():
            raise ProbeError(
                f"model: {name} is complex ({str(parameter.dtype).removeprefix('torch.')}), and curvature is measured "
                "over real parameters only: keep it as a real tensor, and call torch.view_as_complex in the forward"
            )


def _root_mean_square(tensors: Sequence[Tensor]) -> float:
    rows = [
        torch.linalg.vector_norm(tensor, dim=-1) if tensor.dim() else tensor for tensor in tensors
    ]  # float32 is exact enough within a row
    squares = math.fsum(float(tensor.double().square().sum()) for tensor in rows)
    return math.sqrt(squares / max(1, sum(tensor.numel() for tensor in tensors)))


def _hadamard(colours: int) -> Tensor:
    """Sylvester's Hadamard matrix, of the smallest power of two that is at least `colours`."""
    matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while len(matrix) < colours:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
