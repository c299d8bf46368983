"""All ranks of a run, come together at attach: who holds what of the model, and that all want the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
import torch.distributed as dist
from torch import nn

from sharpwatch.agent.distributed.aggregator import RecordAggregator
from sharpwatch.agent.distributed.channel import Introduction, RankGroup, join
from sharpwatch.agent.distributed.rendezvous import Rendezvous
from sharpwatch.agent.distributed.replica_check import ParameterFingerprint, fingerprints, replicas
from sharpwatch.agent.optimizers.deepspeed import fragments
from sharpwatch.agent.optimizers.support import is_flat, lr_refusal
from sharpwatch.agent.options import Options
from sharpwatch.agent.probes.context import ShardReduction
from sharpwatch.agent.safety.exception_barrier import ExceptionBarrier
from sharpwatch.agent.statistics.tap import Tap
from sharpwatch.blocks import BlockMap, Part
from sharpwatch.curvature.parameters.fsdp import DataRank
from sharpwatch.curvature.parameters.shards import Shard, is_sharded, shard_weights
from sharpwatch.errors import AttachError, BlockError


@dataclass(frozen=True, slots=True)
class _RankModel:
    """What one rank has of the model: the division, the entries it holds of each parameter, and what tells them."""

    block_map: BlockMap
    held: Mapping[str, int]
    fingerprints: Mapping[str, ParameterFingerprint]

    @property
    def digest(self) -> bytes:
        """Equal on ranks that have the same."""
        return sha256(repr(self).encode()).digest()


@dataclass(frozen=True, slots=True)
class _RankReport:
    """What one rank brings. Its part of the model only as a digest: most often all have the same."""

    part: bytes
    replicated: Sequence[int]  # ranks that DDP keeps alike with this one
    rules: Mapping[str, str]  # the user's: why one places nothing here, empty where it does
    sharded: bool
    summed: bool
    run: str
    uncontrolled: str


@dataclass(frozen=True, slots=True)
class Topology:
    """The same on every rank, but for `ranks`.

    `block_map` is of the whole model, of which a pipeline's stage has a part. `sharded`: no rank has all weights,
    `summed`: nor all gradients; `shares` weigh this rank's sums then. `uncontrolled`: why the learning rates of one of
    them can't be changed, and so nobody's.
    """

    ranks: RankGroup
    block_map: BlockMap
    shares: Mapping[str, float]
    sharded: bool
    summed: bool
    staged: bool
    run: str
    uncontrolled: str

    def shared(self, tap: Tap, border: ExceptionBarrier, device: torch.device) -> RecordAggregator:
        """The way of records through the ranks; an accelerator's numbers are a step further behind."""
        lag = 1 if device.type == "cpu" else 2
        in_step = self.summed and not self.staged  # floors of a sum are to be alike on all
        return RecordAggregator(
            self.ranks, tap, border, sharded=self.sharded, summed=self.summed, in_step=in_step, lag=lag
        )

    def together(self, model: nn.Module) -> ShardReduction | None:
        """How probes of `model` add up what ranks find; None where each rank has all of it."""
        if not self.sharded or self.staged:
            return None
        return ShardReduction(self.ranks.add, self.shares, DataRank.of(model).number)


def gather_topology(
    meeting: Rendezvous, options: Options, block_map: BlockMap, rules: Mapping[str, str], run: str
) -> Topology:
    """Meet all other ranks; every rank calls this.

    Raises `AttachError` on all of them where one stays away, differs in what must be `equal`, or trains another model.
    """
    model, optimizers = options.model, options.optimizers
    parameters = dict(model.named_parameters())
    cut = fragments(optimizers)
    try:
        shards = {name: Shard.of(parameter) for name, parameter in parameters.items()}
    except BlockError as error:
        raise AttachError(f"model: {error}") from error
    replicated = replicas(model)
    mine = _RankModel(
        block_map,
        {name: cut.get(id(parameter), shards[name]).numel for name, parameter in parameters.items()},
        fingerprints(model, shards),
    )
    meeting.all("attach")
    flat = any(map(is_flat, parameters.values()))
    if flat:  # each rank has its own piece under the same name
        mine = replace(mine, block_map=_stretched(block_map, dist.get_world_size()))
    sharded = flat or is_sharded(model)
    reason = lr_refusal(optimizers, dist.get_world_size(), check_split=options.control != "none")
    own = _RankReport(mine.digest, replicated, rules, sharded, sharded or bool(cut), run, reason)
    channel, all_of_them = join(Introduction(equal=options.equal, own=own))
    owns = [each.own for each in all_of_them if isinstance(each.own, _RankReport)]
    check_rules([own.rules for own in owns])
    parts = [mine] * len(owns)
    if any(each.part != own.part for each in owns):
        dist.all_gather_object(parts, mine, group=channel.group)
    _check_replicas(parts, [own.replicated for own in owns])
    whole = _merged([part.block_map for part in parts])
    staged = any(part.block_map.shapes != whole.shapes for part in parts)
    sharded = staged or any(own.sharded for own in owns)
    summed = sharded or any(own.summed for own in owns)
    numel = {name: math.prod(shape) for name, shape in whole.shapes.items()}
    entries = len(whole.parts) * Tap.columns if summed else 0
    return Topology(
        ranks=RankGroup(channel, entries),
        block_map=whole,
        shares=shard_weights(numel, [part.held for part in parts]) if summed else {},
        sharded=sharded,
        summed=summed,
        staged=staged,
        run=owns[0].run,
        uncontrolled="; ".join(dict.fromkeys(own.uncontrolled for own in owns if own.uncontrolled)),
    )


def check_rules(rules: Sequence[Mapping[str, str]]) -> None:
    """Each of the user's rules must place something on one rank; a pipeline's stages share a file of them."""
    idle = {match: why for each in rules for match, why in each.items()}
    for match, why in idle.items():
        if all(each.get(match, why) for each in rules):
            raise AttachError(f"$SHARPWATCH_BLOCK_RULES: rule {match!r} places nothing: {why}")


def _check_replicas(parts: Sequence[_RankModel], replicated: Sequence[Sequence[int]]) -> None:
    """What several ranks have under one name must be one parameter, or they train several models."""
    first: dict[tuple[str, int], tuple[int, int]] = {}
    for rank, part in enumerate(parts):
        for name, piece in part.fingerprints.items():
            other, value = first.setdefault((name, piece.place), (rank, piece.value))
            apart = (
                part.fingerprints.keys() == parts[other].fingerprints.keys() and replicated[rank] != replicated[other]
            )
            if value != piece.value or apart:
                raise AttachError(
                    f"{name}: not the same on rank {rank} as on rank {other}. The ranks of a process group are watched "
                    "as one model: replicas start from the same values, stages of a pipeline name their parameters as "
                    "the whole model does; ranks that train models of their own need process groups of their own"
                )


def _merged(maps: Sequence[BlockMap]) -> BlockMap:
    """One map of all parameters; of a name that several ranks have, one and the same."""
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
    """The map of vectors `times` as long."""
    parts = tuple(replace(part, numel=part.numel * times) for part in block_map.parts)
    return BlockMap(parts, {name: (math.prod(shape) * times,) for name, shape in block_map.shapes.items()})
