"""Squared norms of the parts of a model, summed into blocks in float64."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sharpwatch.blocks import BlockMap
from sharpwatch.curvature.parameters.shards import Shard

_MAX_FLOAT32_ENTRIES = 2**16  # entries whose norm float32 sums up to 10⁻⁶; of 4·10⁷ it is off by 0.3 %


def squared_norms(
    block_map: BlockMap, tensors: Mapping[str, Tensor], shards: Mapping[str, Shard] | None = None
) -> Tensor:
    """‖·‖² of each part of `tensors`; float64 [parts], not waited for. A parameter that is left out counts as zero.

    `shards`: what of its parameter each of `tensors` is, where they are not whole.
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
    """Sums of `values` [..., parts] by `index`; float64 [..., size] on the CPU."""
    values = values.cpu()
    return values.new_zeros(*values.shape[:-1], size).index_add_(-1, torch.tensor(index, device="cpu"), values)


def squared_norm(view: Tensor) -> Tensor:
    """‖·‖² of `view`, a float64 scalar, not waited for."""
    # By rows: float32 is exact enough for one row, and nothing as large as the view is allocated.
    exact = torch.promote_types(view.dtype, torch.float32)
    rows = torch.linalg.vector_norm(view, dim=-1, dtype=exact) if view.dim() else view
    return rows.double().square().sum()


def stack_sums(values: Iterable[Sequence[Tensor]]) -> Tensor:
    """The sum of each, on one device."""
    each = list(values)
    device = next((value.device for some in each for value in some), torch.device("cpu"))
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([sum((value.to(device) for value in some), start=zero) for some in each])
