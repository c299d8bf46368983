"""Squared norms of a model's tensors in float64, summed by block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.parameters.shards import Shard

_MAX_FLOAT32_ENTRIES = 2**16  # up to here a float32 norm is exact to 1e-6; with 4e7 entries it is off by 0.3 %


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
