"""Tells replicas of one model from models of their own: fingerprints of the parameters that ranks hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharpwatch.agent.optimizers.support import is_flat
from sharpwatch.curvature.parameters.shards import Shard, local_tensor

_CORNER = 256  # entries along each dimension that are looked at
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an entry


@dataclass(frozen=True, slots=True)
class ParameterFingerprint:
    """Which entries of a parameter a rank holds (`place`), and a sum over some of their values."""

    place: int
    value: int


def replicas(model: nn.Module) -> Sequence[int]:
    """The ranks that DDP keeps alike with this one; none without DDP."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            return dist.get_process_group_ranks(module.process_group)
    return ()


def fingerprints(model: nn.Module) -> dict[str, ParameterFingerprint]:
    """This rank's piece of each parameter, by the values in one corner of it; flat ones have no name to compare.

    Raises `BlockError` for a parameter that is placed in partial sums, without entries.
    """
    parameters = {name: each for name, each in model.named_parameters() if not is_flat(each)}
    sums = [_sum(local_tensor(parameter)) for parameter in parameters.values()]
    values = torch.stack([each.to("cpu", non_blocking=False) for each in sums]).tolist() if sums else []
    return {
        name: ParameterFingerprint(hash(Shard.of(parameters[name]).runs), value)
        for name, value in zip(parameters, values, strict=True)
    }


def _sum(tensor: Tensor) -> Tensor:
    """The sum of the corner's bits as integers: exact, so the same in any order and on any device."""
    try:
        plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        corner = plain[tuple(slice(_CORNER) for _ in plain.shape)].contiguous().reshape(-1)
        return corner.view(_BITS[corner.element_size()]).sum(dtype=torch.int64)
    except (RuntimeError, TypeError, NotImplementedError, KeyError):  # quantized, by a class of its own
        return torch.zeros((), dtype=torch.int64)
