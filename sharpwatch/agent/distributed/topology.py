"""Collects at attach which rank holds which part of the model, and checks that all ranks passed the same options.

Fingerprints of the parameters tell replicas of one model from models of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharpwatch.agent.distributed.channel import RankGroup
from sharpwatch.agent.distributed.rendezvous import AttachMessage, Rendezvous, join
from sharpwatch.agent.optimizers.support import interval_refusal, is_flat, layout_of, lr_refusal
from sharpwatch.agent.options import Options, require_placed
from sharpwatch.agent.statistics.tap import Tap
from sharpwatch.blocks import BlockMap, Part
from sharpwatch.curvature.parameters.shards import Shard, is_sharded, local_tensor, shard_weights
from sharpwatch.errors import AttachError, BlockError

_CORNER = 256  # entries along each dimension that are looked at
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an entry


@dataclass(frozen=True, slots=True)
class _ParameterFingerprint:
    """Which entries of a parameter a rank holds (`place`), and a sum over some of their values."""

    place: int
    value: int


@dataclass(frozen=True, slots=True)
class _RankModel:
    """One rank's part of the model: its blocks, the entries it holds of each parameter, and their fingerprints."""

    block_map: BlockMap
    held: Mapping[str, int]
    fingerprints: Mapping[str, _ParameterFingerprint]

    @property
    def digest(self) -> bytes:
        """Equal on ranks that have the same."""
        return sha256(repr(self).encode()).digest()


@dataclass(frozen=True, slots=True)
class _RankReport:
    """What one rank reports of itself; of its model only a digest, as most often all ranks have the same."""

    model: bytes
    replicas: Sequence[int]  # ranks that DDP keeps alike with this one
    idle_rules: Mapping[str, str]  # the user's that place nothing here, with the reason
    sharded: bool
    summed: bool
    run: str
    lr_refusal: str
    interval_refusal: str


@dataclass(frozen=True, slots=True)
class Topology:
    """How a model is spread over ranks: the same on every rank, but for `ranks`.

    `block_map` is that of the whole model; where the model is `staged`, a rank has a part of it. `sharded`: no rank has
    all weights; `summed`: nor all gradients, and `shares` weigh this rank's sums. `lr_refusal`: why the learning
    rates of one rank can't be changed, and so nobody's; `interval_refusal`: the same of leaving blocks out of a step.
    """

    ranks: RankGroup
    block_map: BlockMap
    shares: Mapping[str, float]
    sharded: bool
    summed: bool
    staged: bool
    run: str
    lr_refusal: str
    interval_refusal: str


def gather_topology(
    rendezvous: Rendezvous, options: Options, block_map: BlockMap, idle_rules: Mapping[str, str], run: str
) -> Topology:
    """Meet all other ranks; every rank calls this.

    Raises `AttachError` on all of them where one refuses, has other options, or trains another model.
    """
    model, optimizers = options.model, options.optimizers
    parameters = dict(model.named_parameters())
    layout = layout_of(optimizers)
    try:
        # What can fail on one rank alone is done before the meeting, so that it refuses instead of being waited for.
        held = {name: entries.numel for name, entries in layout.local_entries(parameters).items()}
        mine = _RankModel(block_map, held, _fingerprints(model))
    except BlockError as error:
        raise AttachError(f"model: {error}") from error
    replicated = _replicas(model)
    rendezvous.wait_for_all("attach")
    flat = any(map(is_flat, parameters.values()))
    if flat:  # each rank has its own piece under the same name
        mine = replace(mine, block_map=_stretched(block_map, dist.get_world_size()))
    sharded = flat or is_sharded(model)
    reason = lr_refusal(optimizers, dist.get_world_size(), check_split=options.control != "none")
    reasons = (reason, interval_refusal(optimizers))
    own = _RankReport(mine.digest, replicated, idle_rules, sharded, sharded or layout.fragmented, run, *reasons)
    channel, messages = join(AttachMessage(equal=options.equal, own=own))
    reports = [each.own for each in messages if isinstance(each.own, _RankReport)]
    require_placed([report.idle_rules for report in reports], options.rules_source)
    models = [mine] * len(reports)
    if any(report.model != own.model for report in reports):
        # All ranks see the same digests, so all of them take part in this or none does.
        dist.all_gather_object(models, mine, group=channel.group)
    # Two models with the same names would be watched and controlled as one.
    _check_replicas(models, [report.replicas for report in reports])
    whole = _merged([each.block_map for each in models])
    staged = any(each.block_map.shapes != whole.shapes for each in models)
    sharded = staged or any(report.sharded for report in reports)
    summed = sharded or any(report.summed for report in reports)
    numel = {name: math.prod(shape) for name, shape in whole.shapes.items()}
    return Topology(
        ranks=RankGroup(channel, len(whole.parts) * Tap.columns if summed else 0),
        block_map=whole,
        shares=shard_weights(numel, [each.held for each in models]) if summed else {},
        sharded=sharded,
        summed=summed,
        staged=staged,
        run=reports[0].run,
        lr_refusal=_joined(report.lr_refusal for report in reports),
        interval_refusal=_joined(report.interval_refusal for report in reports),
    )


def _joined(reasons: Iterable[str]) -> str:
    """The reasons of all ranks, each once; empty where none has any."""
    return "; ".join(dict.fromkeys(filter(None, reasons)))


def _check_replicas(models: Sequence[_RankModel], replicated: Sequence[Sequence[int]]) -> None:
    """Raise `AttachError` where ranks have different parameters under one name: they train several models."""
    first: dict[tuple[str, int], tuple[int, int]] = {}
    for rank, model in enumerate(models):
        for name, piece in model.fingerprints.items():
            other, value = first.setdefault((name, piece.place), (rank, piece.value))
            apart = (
                model.fingerprints.keys() == models[other].fingerprints.keys() and replicated[rank] != replicated[other]
            )
            if value != piece.value or apart:
                raise AttachError(
                    f"{name}: not the same on rank {rank} as on rank {other}. The ranks of a process group are watched "
                    "as one model: replicas start from the same values, stages of a pipeline name their parameters as "
                    "the whole model does; ranks that train models of their own need process groups of their own"
                )


def _merged(maps: Sequence[BlockMap]) -> BlockMap:
    """One map of all parameters. Raises `AttachError` where a name has several shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, each in enumerate(maps):
        for name, shape in each.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                raise AttachError(f"{name}: {shape} on rank {rank}, {shapes[name]} on another: not one model")
    if all(each.shapes == shapes for each in maps):
        return maps[0]
    parts: dict[str, list[Part]] = {}
    for each in maps:
        own = {
            name: [part for part in each.parts if part.parameter == name] for name in each.shapes if name not in parts
        }
        parts.update(own)
    return BlockMap(tuple(part for name in shapes for part in parts[name]), shapes)


def _stretched(block_map: BlockMap, times: int) -> BlockMap:
    """`block_map` with each parameter a vector `times` as long."""
    parts = tuple(replace(part, numel=part.numel * times) for part in block_map.parts)
    return BlockMap(parts, {name: (math.prod(shape) * times,) for name, shape in block_map.shapes.items()})


def _replicas(model: nn.Module) -> Sequence[int]:
    """The ranks that DDP keeps alike with this one; none without DDP."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            return dist.get_process_group_ranks(module.process_group)
    return ()


def _fingerprints(model: nn.Module) -> dict[str, _ParameterFingerprint]:
    """This rank's piece of each parameter, by the values in one corner of it; flat ones have no name to compare.

    Raises `BlockError` for a parameter that is placed in partial sums, without entries.
    """
    parameters = {name: each for name, each in model.named_parameters() if not is_flat(each)}
    sums = [_sum(local_tensor(parameter)) for parameter in parameters.values()]
    values = torch.stack([each.to("cpu", non_blocking=False) for each in sums]).tolist() if sums else []
    return {
        # Hashes of numbers and ranges, unlike those of text, are the same in every process.
        name: _ParameterFingerprint(hash(Shard.of(parameters[name]).runs), value)
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
